"""Seam A for Open-Sora 1.0 to 1.3, on the `opensora` that can be imported: stand-in or checkout.

Dims: B batch, C channels, F frames, H height, W width.
"""

import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from torch import Tensor
from torch.testing import assert_close

from conformance import points
from conformance.diffusion_object import terms_of
from conformance.models import SmallModel, TextEncoder
from conformance.points import on, refused
from conformance.seam import ATTACHED, POLICY, Batch, Seam, Terms, replayed, trained
from speedit_plugins.hosts.attachment import attachment_of, is_attached
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.entry import with_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy

INTEGRATION = Path(__file__).parents[2] / "integrations" / "open_sora"
# Our config, the folder of the host into which it is copied, and the host's config that it extends.
CONFIGS = {
    "1.0.0": [("speed_1_0.py", "opensora", "16x256x256.py")],
    "1.1.0": [("speed_1_1.py", "opensora-v1-1", "stage1.py")],
    "1.2.0": [
        ("speed_1_1.py", "opensora-v1-1", "stage1.py"),
        ("speed_flow.py", "opensora-v1-2", "stage1.py"),
    ],
    "1.3": [
        ("speed_1_1.py", "opensora-v1-1", "stage1.py"),
        ("speed_flow.py", "opensora-v1-3", "stage1.py"),
    ],
}
# What a stand-in's config extends.
FLOW_BASE = "scheduler = dict(type='rflow', use_timestep_transform=True, sample_method='logit-normal')\n"
BASE = 'scheduler = dict(type="iddpm", timestep_respacing="")\n'


@dataclass(frozen=True)
class OpenSoraSeam(Seam):
    """The imported host's IDDPM, and how it builds its schedulers.

    Args:
        version: of the host.
        checkout: its folder; None is a stand-in.
        options: of the scheduler.
        is_masked: whether a step masks frames.
    """

    version: str
    checkout: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    is_masked: bool = False
    shape: tuple[int, ...] = (6, 4, 2, 3, 3)
    added: frozenset[str] = ATTACHED | {"_policy_config"}

    @property
    def registry(self) -> Any:
        return import_module("opensora.registry").SCHEDULERS

    @property
    def passes_t(self) -> bool:
        """Whether the host's trainer draws t."""
        return self.version < "1.2"

    def build(self, type: str = "SpeeDiffusion", **options: Any) -> Any:
        """Our scheduler, through the host's registry."""
        import_module("speedit_plugins.hosts.open_sora")
        build_module = import_module("opensora.registry").build_module
        return build_module({"type": type, **self.options, **options}, self.registry)

    def original(self, type: str = "iddpm", **options: Any) -> Any:
        """The host's own scheduler, on the CPU if the host says CUDA."""
        gaussian = import_module("opensora.schedulers.iddpm.gaussian_diffusion").GaussianDiffusion
        defaults = gaussian.__init__.__kwdefaults__ or {}
        with mock.patch.dict(defaults, {"device": "cpu"} if "device" in defaults else {}):
            return self.build(type, **options)

    def make(self) -> Any:
        return self.original()

    def attached(self, policy: Any = POLICY, generator: torch.Generator | None = None) -> Any:
        scheduler = self.build(policy=policy)
        if generator is not None:
            # A respaced object has no policy, and no place for a generator, before the first use.
            assert isinstance(scheduler.policy, TimestepPolicy)
            attachment_of(scheduler).stream = DrawStream(generator)
        return scheduler

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> SmallModel:
        return SmallModel(1).to(dtype)

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None, **options: Any) -> Terms:
        x, noise = batch
        t = torch.arange(len(x)) if t is None else t
        options["noise"] = noise
        if self.is_masked:
            options["mask"] = torch.tensor([[True, True], [True, False]] * (len(x) // 2))
        args = {"y": torch.ones(len(x), 1)}
        if self.passes_t:
            before = t.clone()
            terms = terms_of(host.training_losses(model, x, t, args, **options))
            assert torch.equal(t, before), "wrote into the trainer's t"
            return terms
        with mock.patch.object(torch, "randint", return_value=t.clone()):
            return terms_of(host.training_losses(model, x, args, **options))

    def sees(self, host: Any, draw: TimestepDraw, seen: Tensor) -> bool:
        return torch.equal(seen, torch.tensor(host.timestep_map)[draw.index])

    def sample(self, host: Any, model: Any = None) -> Tensor:
        shape = self.shape[1:]
        z: Any = shape if self.version == "1.0.0" else torch.randn(2, *shape)
        prompts, device = ["one", "other"], torch.device("cpu")
        sample: Tensor = host.sample(model or SmallModel(1), TextEncoder(), z, prompts, device)
        return sample

    def idle(self) -> Any:
        return self.build(timestep_respacing="")

    def is_unused(self, host: Any) -> bool:
        return not attachment_of(host).is_built


def masks(seam: OpenSoraSeam) -> list[OpenSoraSeam]:
    """Without a mask, and with one if the host takes masks."""
    return [replace(seam, is_masked=mask) for mask in (False, True) if not mask or seam.version > "1.0.0"]


def model_gets_its_arguments(seam: OpenSoraSeam) -> None:
    """Point 1."""
    arguments = trained(seam).model.arguments
    assert torch.equal(arguments[0]["y"], torch.ones(seam.shape[0], 1)), f"the model got {arguments[0]}"


def seen_t_follows_the_policy(seam: OpenSoraSeam) -> None:
    """Point 1: how often the late timesteps reach the model."""
    model, n = SmallModel(1), 20_000
    args: list[Any] = [torch.randint(0, 1000, (n,))] if seam.passes_t else []
    seam.build(policy="speedit").training_losses(model, torch.zeros(n, 4, 1, 1, 1), *args)
    share = float((model.seen[0] >= 642).double().mean())
    # The mass of t >= 642 after the reflection; 4 sigma of a binomial frequency.
    assert abs(share - 0.0509) < 4 * math.sqrt(0.0509 * 0.9491 / n)


def weight_is_one_minus_alpha_bar(seam: OpenSoraSeam) -> None:
    """Point 2: P2 with gamma = k = 1, from the host's own table."""
    weight = seam.build(policy=dict(type="speedit")).policy.weight
    expected = 1 - torch.as_tensor(seam.original().alphas_cumprod).double()
    # float64 keeps 1e-16 of alpha-bar, and 1 - alpha-bar is 1e-4 at t = 0.
    assert_close(weight, expected, rtol=1e-11, atol=0)


def kl_losses_train_with_scope_loss(seam: OpenSoraSeam) -> None:
    """Point 2: a policy of scope "loss" weighs a loss of one term."""
    seam = replace(seam, options={**seam.options, "use_kl": True})
    step = trained(seam, "loss_second_moment")
    # The history is empty, so the density is uniform and every weight 1 / (T p) is 1.
    assert_close(step.terms.loss, replayed(seam, step).terms.loss)
    # The host wraps the model twice on this path, and respaces its t once.
    assert seam.sees(step.host, step.draw, step.model.seen[0]), "the model saw another t"


def training_after_sampling_changes_nothing(seam: OpenSoraSeam) -> None:
    """Point 4: an object made to sample can train, at the timesteps it has, and samples as before."""
    host, plain = seam.attached(), seam.original()
    model = seam.model(host)
    terms = seam.train(host, model, seam.batch())
    assert host.policy.schedule.num_timesteps == 5, f"a schedule of {host.policy.schedule}"
    assert torch.isfinite(terms.loss).all(), "another loss than a finite one"
    samples = []
    for each in (host, plain):
        torch.manual_seed(3)
        with torch.no_grad():
            samples.append(seam.sample(each, model))
    assert torch.equal(*samples), "another sample"


def other_registrations_stay(seam: OpenSoraSeam) -> None:
    """Point 5: the plugin adds its names to the host's registry and changes no other."""
    import_module("opensora.schedulers")
    before = dict(seam.registry.module_dict)
    import_module("speedit_plugins.hosts.open_sora")
    added = {"SpeeDiffusion"} if seam.passes_t else {"SpeeDiffusion", "SpeeDFlow"}
    after = seam.registry.module_dict
    assert set(after) - added == set(before) - added
    assert all(after[name] is before[name] for name in set(before) - added)


def hosts_own_speed_is_undisturbed(seam: OpenSoraSeam) -> None:
    """Point 5: the host's `iddpm-speed` trains in 1.1 and fails in later versions, as without the plugin."""
    if "iddpm-speed" not in seam.registry.module_dict:
        return
    theirs, model, batch = seam.original("iddpm-speed"), SmallModel(1), seam.batch()
    if not seam.passes_t:
        # It passes its t as the model's arguments, and never trained in these versions.
        args = {"y": torch.ones(len(batch[0]), 1)}
        refused(lambda: theirs.training_losses(model, batch[0], args), "shape", AttributeError)
        return
    terms = seam.train(theirs, model, batch)
    plain = seam.train(seam.original(), SmallModel(1), batch, model.seen[0])
    weight = 1 - theirs.alphas_cumprod[model.seen[0]]
    assert terms.mse is not None
    # The host weighs inside the mean over pixels, in float32: rounding of a mean of 72 terms.
    assert_close(terms.mse, weight * plain.mse, rtol=1e-5, atol=0)


def config_builds(seam: OpenSoraSeam) -> None:
    """Point 6: the host parses and builds our configs, copied beside its own."""
    for name, folder, base in CONFIGS[seam.version]:
        default = FLOW_BASE if name == "speed_flow.py" else BASE
        hosts = seam.checkout and seam.checkout / "configs" / folder / "train" / base
        with tempfile.TemporaryDirectory() as copied_to:
            (Path(copied_to) / name).write_text((INTEGRATION / name).read_text())
            (Path(copied_to) / base).write_text(hosts.read_text() if hosts else default)
            config = _parsed(Path(copied_to) / name).scheduler
            built = import_module("opensora.registry").build_module(config, seam.registry)
        is_flow = name == "speed_flow.py"
        assert isinstance(
            built, getattr(import_module("opensora.schedulers"), "RFLOW" if is_flow else "IDDPM")
        )
        if is_flow:
            # Everything but the type stays as in the host's config.
            assert (config.sample_method, config.use_timestep_transform) == ("logit-normal", True)
            assert (built.thinning.k, built.thinning.lam) == (5.0, None)
        else:
            assert built.policy.name == "speedit"


def policy_options_reach_the_policy(seam: OpenSoraSeam) -> None:
    """Point 6: parameters of a config are the policy's."""
    policy = seam.build(policy=dict(type="speed", k=4)).policy
    assert isinstance(policy, TimestepPolicy)
    # k times more before tau = 700 of the linear schedule than from there on: the paper's density.
    assert_close(policy.density[699] / policy.density[700], torch.tensor(4.0).double())


def bad_configs_are_refused(seam: OpenSoraSeam) -> None:
    """Point 6: unknown policies and options, and a KL loss for a policy that weighs the mse."""
    refused(lambda: seam.build(policy="spedit"), "did you mean 'speedit'")
    refused(lambda: seam.build(noise_shedule="linear"), "noise_shedule", TypeError)
    refused(lambda: trained(replace(seam, options={"use_kl": True})), "no mse to weight")


def sampling_objects_are_wrapped_too(seam: OpenSoraSeam) -> None:
    """Point 7: a second policy for an object that has not trained yet."""
    scheduler = seam.build(num_sampling_steps=5)
    assert is_attached(scheduler), "no policy"
    refused(lambda: with_policy(scheduler), "has a policy already")


def double_weights_are_refused(seam: OpenSoraSeam) -> None:
    """Point 7: the host's `weights=` beside a policy. 1.0 has no such argument, and says so."""
    wanted, error = ("weights", TypeError) if seam.version == "1.0.0" else (DOUBLE_WEIGHTS, ValueError)
    host = seam.attached()
    refused(lambda: seam.train(host, SmallModel(1), seam.batch(), weights=torch.ones(1000)), wanted, error)


DOUBLE_WEIGHTS = "got weights, and the policy weighs already"
RESPACED = [{"options": options} for options in ({}, {"timestep_respacing": "100"})]
# As in the host's inference configs.
SAMPLING = [{"options": {"num_sampling_steps": 5}}]
OpenSoraSeam.contract = points.COMMON | {
    1: (
        on(RESPACED, points.draws_are_seen),
        points.data_are_observed,
        model_gets_its_arguments,
        seen_t_follows_the_policy,
    ),
    2: (
        on(masks, points.loss_is_weighted),
        weight_is_one_minus_alpha_bar,
        on(RESPACED, kl_losses_train_with_scope_loss),
    ),
    3: (
        on(masks, points.uniform_is_the_host),
        points.evaluations_are_the_hosts,
        points.random_numbers_are_the_hosts,
    ),
    4: (on(SAMPLING, points.sampling_is_untouched), on(SAMPLING, training_after_sampling_changes_nothing)),
    5: (*points.COMMON[5], other_registrations_stay, hosts_own_speed_is_undisturbed),
    6: (config_builds, policy_options_reach_the_policy, bad_configs_are_refused),
    7: (*points.COMMON[7], sampling_objects_are_wrapped_too, double_weights_are_refused),
}


def _parsed(path: Path) -> Any:
    """This file, read by the host's own parse_configs; for a stand-in, by mmengine's reader."""
    try:
        config_utils = import_module("opensora.utils.config_utils")
    except ModuleNotFoundError:
        return Config.fromfile(path)
    with mock.patch.object(sys, "argv", ["train.py", str(path)]):
        return config_utils.parse_configs(training=True)
