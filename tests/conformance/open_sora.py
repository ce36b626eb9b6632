"""What the plugin keeps in Open-Sora, checked on whatever `opensora` can be imported: stand-in or checkout.

Each check takes a `Host`; `CONTRACT` lists them by the points of contract.py.
"""

import copy
import math
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from torch import Tensor
from torch.testing import assert_close

from conformance.contract import FLOAT64_TOLERANCE, NUM_DRAWS, refused, run_points
from conformance.environments import default_dtype, wrapped_models
from conformance.open_sora_models import Denoiser, TextEncoder
from speedit_plugins.hosts.attachment import attachment_of, is_attached, without_policy
from speedit_plugins.hosts.entry import with_policy
from speedit_plugins.policies.policy import TimestepPolicy

B = 6
SHAPE = (4, 2, 3, 3)
INTEGRATION = Path(__file__).parents[2] / "integrations" / "open_sora"
# Our config, the host's folder that it is copied to, and the host's config that it extends.
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


@dataclass
class Host:
    """The imported host: its version, its folder unless it is a stand-in, and what the checks use of it."""

    version: str
    checkout: Path | None = None

    @property
    def registry(self) -> Any:
        return import_module("opensora.registry").SCHEDULERS

    @property
    def passes_t(self) -> bool:
        return self.version < "1.2"

    def build(self, type: str = "SpeeDiffusion", **options: Any) -> Any:
        import_module("speedit_plugins.hosts.open_sora")
        return import_module("opensora.registry").build_module(dict(type=type, **options), self.registry)

    def original(self, type: str = "iddpm", **options: Any) -> Any:
        """The host's own scheduler, on the CPU where the host says CUDA."""
        gaussian = import_module("opensora.schedulers.iddpm.gaussian_diffusion").GaussianDiffusion
        defaults = gaussian.__init__.__kwdefaults__ or {}
        with mock.patch.dict(defaults, {"device": "cpu"} if "device" in defaults else {}):
            return import_module("opensora.registry").build_module(dict(type=type, **options), self.registry)

    def train(
        self,
        scheduler: Any,
        *,
        t: Tensor | None = None,
        model: Any = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> tuple[dict[str, Tensor], Denoiser]:
        """One training step on fixed data, called as train.py does; t, if given, is the host's draw."""
        model = Denoiser() if model is None else model
        x, noise = (given.to(dtype) for given in _data())
        args = {"y": torch.ones(B, 1)}
        t = torch.arange(B) if t is None else t
        if self.passes_t:
            return scheduler.training_losses(model, x, t, args, noise=noise, **options), model
        with mock.patch.object(torch, "randint", return_value=t.clone()):
            return scheduler.training_losses(model, x, args, noise=noise, **options), model

    def sample(self, scheduler: Any, model: Any = None) -> Tensor:
        torch.manual_seed(3)
        z: Any = SHAPE if self.version == "1.0.0" else torch.randn(2, *SHAPE)
        with torch.no_grad():
            return scheduler.sample(
                model or Denoiser(), TextEncoder(), z, ["one", "other"], torch.device("cpu")
            )


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, *SHAPE, generator=generator), torch.randn(B, *SHAPE, generator=generator)


@contextmanager
def _recorded(scheduler: Any) -> Iterator[list[Tensor]]:
    """The indices that the scheduler's policy draws."""
    drawn: list[Tensor] = []
    draw = scheduler.policy.draw

    def recording(*args: Any, **kwargs: Any) -> Any:
        result = draw(*args, **kwargs)
        drawn.append(result.index.clone())
        return result

    with mock.patch.object(scheduler.policy, "draw", recording):
        yield drawn


def config_builds(host: Host) -> None:
    """The shipped configs, copied beside the host's own, parse and build through the host."""
    for name, folder, base in CONFIGS[host.version]:
        with tempfile.TemporaryDirectory() as copied_to:
            for path, source in (
                (Path(copied_to) / name, INTEGRATION / name),
                (
                    Path(copied_to) / base,
                    host.checkout and host.checkout / "configs" / folder / "train" / base,
                ),
            ):
                default = FLOW_BASE if name == "speed_flow.py" else BASE
                path.write_text(source.read_text() if source else default)
            config = _parsed(Path(copied_to) / name).scheduler
            built = import_module("opensora.registry").build_module(config, host.registry)
        is_flow = name == "speed_flow.py"
        assert isinstance(
            built, getattr(import_module("opensora.schedulers"), "RFLOW" if is_flow else "IDDPM")
        )
        if is_flow:
            # What the host's config says beside the type stays.
            assert (config.sample_method, config.use_timestep_transform) == ("logit-normal", True)
            assert (built.thinning.k, built.thinning.lam) == (5.0, None)
        else:
            assert built.policy.name == "speedit"


def policy_options_reach_the_policy(host: Host) -> None:
    """Parameters of a config are the policy's."""
    policy = host.build(policy=dict(type="speed", k=4)).policy
    assert isinstance(policy, TimestepPolicy)
    # k times more before tau = 700 of the linear schedule than from there on: the paper's density.
    assert_close(policy.density[699] / policy.density[700], torch.tensor(4.0).double())


def _parsed(path: Path) -> Any:
    """The host's own parse_configs on this file; mmengine's reader, which it calls, for a stand-in."""
    try:
        config_utils = import_module("opensora.utils.config_utils")
    except ModuleNotFoundError:
        return Config.fromfile(path)
    with mock.patch.object(sys, "argv", ["train.py", str(path)]):
        return config_utils.parse_configs(training=True)


def identity_is_the_hosts_loss(host: Host) -> None:
    """The uniform policy: every term to the bit, with and without a mask."""
    for mask in _masks(host):
        scheduler = host.build(policy="uniform")
        with _recorded(scheduler) as drawn:
            ours, _ = host.train(scheduler, **mask)
        theirs, _ = host.train(host.original(), t=drawn[0], **mask)
        assert sorted(ours) == sorted(theirs)
        for name, term in theirs.items():
            assert torch.equal(ours[name], term), name


def loss_is_weighted_mse_plus_vb(host: Host) -> None:
    """w * mse + vb against the direct sum; the other terms are the host's."""
    for mask in _masks(host):
        scheduler = host.build(policy=dict(type="speedit"))
        with _recorded(scheduler) as drawn:
            ours, model = host.train(scheduler, **mask)
        theirs, _ = host.train(host.original(), t=drawn[0], **mask)
        assert torch.equal(ours["mse"], theirs["mse"])
        assert torch.equal(ours["vb"], theirs["vb"])
        # P2 with gamma = k = 1 is 1 - alpha-bar.
        weight = 1 - torch.as_tensor(host.original().alphas_cumprod).double()[drawn[0]]
        direct = weight * theirs["mse"].double() + theirs["vb"].double()
        # float32 rounds the weight, the product and the sum by 6e-8 each.
        assert_close(ours["loss"].double(), direct, rtol=2e-7, atol=0)
        ours["loss"].mean().backward()
        assert model.gain.grad is not None


def loss_is_weighted_in_float64(host: Host) -> None:
    """The same within 1e-12 on float64 data."""
    scheduler, model = host.build(policy="speedit"), Denoiser().double()
    drawn = []
    draw = scheduler.policy.draw
    with mock.patch.object(scheduler.policy, "draw", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[0]):
        ours, _ = host.train(scheduler, model=model, dtype=torch.float64)
    theirs, _ = host.train(host.original(), t=drawn[0].index, model=Denoiser().double(), dtype=torch.float64)
    direct = drawn[0].weight.double() * theirs["mse"] + theirs["vb"]
    assert ours["loss"].dtype == torch.float64
    assert_close(ours["loss"], direct, rtol=FLOAT64_TOLERANCE, atol=0)


def other_models_train_alike(host: Host) -> None:
    """Compiled and DDP-wrapped models; draws under a bfloat16 default."""
    model = Denoiser()
    with wrapped_models(model) as others:
        losses = []
        for other in (model, *others.values()):
            torch.manual_seed(5)
            losses.append(host.train(host.build(), model=other)[0]["loss"].detach())
    assert all(torch.equal(losses[0], loss) for loss in losses)
    with default_dtype(torch.bfloat16):
        index = host.build(policy="uniform").policy.draw(NUM_DRAWS).index
    assert len(index.unique()) == 1000


def _masks(host: Host) -> list[dict[str, Tensor]]:
    if host.version == "1.0.0":
        return [{}]
    return [{}, {"mask": torch.tensor([[True, True], [True, False]] * (B // 2))}]


def model_sees_the_drawn_t(host: Host) -> None:
    """On the whole schedule and on a respaced one."""
    for options in ({}, {"timestep_respacing": "100"}):
        scheduler = host.build(policy="speedit", **options)
        with _recorded(scheduler) as drawn:
            _, model = host.train(scheduler)
        assert len(model.seen) == 1
        assert torch.equal(model.seen[0], torch.tensor(scheduler.timestep_map)[drawn[0]])
        assert torch.equal(model.arguments[0]["y"], torch.ones(B, 1))


def evaluations_are_the_hosts(host: Host) -> None:
    """Without gradients t and loss are the host's own, and no training call is counted."""
    scheduler, t = host.build(), torch.arange(0, 600, 100)
    with torch.no_grad():
        (ours, model), (theirs, _) = host.train(scheduler, t=t), host.train(host.original(), t=t)
    assert torch.equal(model.seen[0], t)
    assert all(torch.equal(ours[name], term) for name, term in theirs.items())
    assert attachment_of(scheduler).num_calls == 0


def callers_t_is_left_alone(host: Host) -> None:
    """The trainer's tensor of t is not written to."""
    t = torch.arange(B)
    host.train(host.build(), t=t)
    assert torch.equal(t, torch.arange(B))


def seen_t_follows_the_policy(host: Host) -> None:
    """How often the late timesteps reach the model."""
    scheduler, model, n = host.build(policy="speedit"), Denoiser(), 20_000
    x = torch.zeros(n, 4, 1, 1, 1)
    args: list[Any] = [torch.randint(0, 1000, (n,))] if host.passes_t else []
    scheduler.training_losses(model, x, *args)
    share = float((model.seen[0] >= 642).double().mean())
    # The mass of t >= 642 after the reflection; 4 sigma of a binomial frequency.
    assert abs(share - 0.0509) < 4 * math.sqrt(0.0509 * 0.9491 / n)


def sampling_is_the_hosts(host: Host) -> None:
    """The host's sampler, to the bit, before and after training."""
    scheduler = host.build(num_sampling_steps=5, timestep_respacing="")
    assert torch.equal(host.sample(scheduler), host.sample(host.original(num_sampling_steps=5)))
    assert scheduler._speedit_attachment is None
    # The same object trains, on the timesteps it has.
    terms, model = host.train(scheduler)
    assert scheduler.policy.schedule.num_timesteps == 5
    assert torch.isfinite(terms["loss"]).all()
    # Training leaves nothing behind: the model that trained samples as before.
    assert torch.equal(host.sample(scheduler, model), host.sample(host.original(num_sampling_steps=5)))


def copies_train_alike(host: Host) -> None:
    """A deep copy and a pickled one draw and weigh as the original."""
    scheduler = host.build()
    copies = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]  # noqa: S301 - written here
    torch.manual_seed(5)
    expected, _ = host.train(scheduler)
    for other in copies:
        assert type(other) is type(scheduler)
        assert other.policy is not scheduler.policy
        torch.manual_seed(5)
        assert torch.equal(host.train(other)[0]["loss"], expected["loss"])


def double_weights_are_refused(host: Host) -> None:
    """The host's `weights=` beside a policy."""
    if host.version == "1.0.0":
        # This version has no such argument, and says so.
        refused(lambda: host.train(host.build(), weights=torch.ones(1000)), "weights", TypeError)
        return
    refused(
        lambda: host.train(host.build(), weights=torch.ones(1000)),
        "got weights, and the policy weights already",
    )


def policies_are_not_stacked(host: Host) -> None:
    """`with_policy` on top; and back to the host's class."""
    for scheduler in (host.build(), host.build(num_sampling_steps=5)):
        assert is_attached(scheduler)
        refused(lambda scheduler=scheduler: with_policy(scheduler), "has a policy already")
    scheduler, t = host.build(), torch.arange(0, 600, 100)
    bare = without_policy(scheduler)
    assert type(bare) is type(host.original())
    assert torch.equal(host.train(bare, t=t)[0]["loss"], host.train(host.original(), t=t)[0]["loss"])


def bad_configs_are_refused(host: Host) -> None:
    """Unknown policies and options, and a KL loss for a policy that weighs the mse."""
    refused(lambda: host.build(policy="spedit"), "did you mean 'speedit'")
    refused(lambda: host.build(noise_shedule="linear"), "noise_shedule", TypeError)
    refused(lambda: host.train(host.build(use_kl=True)), "no mse to weight")


def kl_losses_train_with_scope_loss(host: Host) -> None:
    """A policy of scope loss weighs a loss of one term."""
    for options in ({}, {"timestep_respacing": "100"}):
        scheduler = host.build(use_kl=True, policy="loss_second_moment", **options)
        with _recorded(scheduler) as drawn:
            ours, model = host.train(scheduler)
        theirs, _ = host.train(host.original(use_kl=True, **options), t=drawn[0])
        # The history is empty, so the density is uniform and every weight 1 / (T p) is 1.
        assert_close(ours["loss"], theirs["loss"])
        # The host wraps the model twice on this path, and respaces its t once.
        assert torch.equal(model.seen[0], torch.tensor(scheduler.timestep_map)[drawn[0]])


def other_registrations_stay(host: Host) -> None:
    """The plugin adds its names to the host's registry and changes no other."""
    import_module("opensora.schedulers")
    before = dict(host.registry.module_dict)
    import_module("speedit_plugins.hosts.open_sora")
    added = {"SpeeDiffusion"} if host.passes_t else {"SpeeDiffusion", "SpeeDFlow"}
    after = host.registry.module_dict
    assert set(after) - added == set(before) - added
    assert all(after[name] is before[name] for name in set(before) - added)


def hosts_own_speed_is_undisturbed(host: Host) -> None:
    """`iddpm-speed` trains where it trained (1.1) and fails where it failed."""
    if "iddpm-speed" not in host.registry.module_dict:
        return
    import_module("speedit_plugins.hosts.open_sora")
    theirs, (x, noise) = host.original("iddpm-speed"), _data()
    if host.passes_t:
        model = Denoiser()
        torch.manual_seed(2)
        terms = theirs.training_losses(model, x, torch.arange(B), {"y": torch.ones(B, 1)}, noise=noise)
        plain, _ = host.train(host.original(), t=model.seen[0])
        weight = 1 - theirs.alphas_cumprod[model.seen[0]]
        # The host weighs inside the mean over pixels, in float32: rounding of a mean of 72 terms.
        assert_close(terms["mse"], weight * plain["mse"], rtol=1e-5, atol=0)
    else:
        # It passes its t as the model's arguments, and never trained on these versions.
        refused(
            lambda: theirs.training_losses(Denoiser(), x, {"y": torch.ones(B, 1)}), "shape", AttributeError
        )


CONTRACT: dict[int, tuple[Callable[[Host], None], ...]] = {
    1: (model_sees_the_drawn_t, callers_t_is_left_alone, seen_t_follows_the_policy),
    2: (loss_is_weighted_mse_plus_vb, loss_is_weighted_in_float64, kl_losses_train_with_scope_loss),
    3: (identity_is_the_hosts_loss, evaluations_are_the_hosts),
    4: (sampling_is_the_hosts,),
    5: (copies_train_alike, other_registrations_stay, hosts_own_speed_is_undisturbed),
    6: (config_builds, policy_options_reach_the_policy, bad_configs_are_refused),
    7: (policies_are_not_stacked, double_weights_are_refused),
    8: (other_models_train_alike,),
}


def check(host: Host, contract: Mapping[int, tuple[Callable[[Host], None], ...]]) -> list[int]:
    """The points of a contract that hold, in order; AssertionError for the first check that does not."""

    def together(checks: tuple[Callable[[Host], None], ...]) -> Callable[[Host], None]:
        def all_of(host: Host) -> None:
            for each in checks:
                torch.manual_seed(0)
                try:
                    each(host)
                except AssertionError as error:
                    raise AssertionError(f"{each.__name__}: {error}") from error

        return all_of

    return run_points({point: together(checks) for point, checks in contract.items()}, host)
