"""The contract on latent-diffusion and Stable Diffusion 1 and 2, whose classes a config's `target:` names.

The points are those of contract.py.

Dims: B batch, C channels.
"""

import copy
import pickle
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from itertools import chain
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from conformance.contract import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, NUM_DRAWS, POLICY, refused, run_points
from conformance.environments import default_dtype, wrapped_models
from conformance.stand_ins import StandIns
from speedit_plugins.hosts.attachment import attachment_of, is_attached, without_policy
from speedit_plugins.hosts.entry import with_policy
from speedit_plugins.hosts.schedules import prediction_type_of, schedule_of
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw

# Data, conditioning and noise; loss and terms.
Batch = tuple[Tensor, Tensor, Tensor]
Outcome = tuple[Tensor, dict[str, Tensor]]

HOST = "ldm.models.diffusion.ddpm"
PLUGIN = "speedit_plugins.hosts.latent_diffusion"
INERT = ("torchvision", "taming", "clip", "kornia", "open_clip", "cv2")
SHAPE = (6, 3, 4, 4)
# Neither is 1 or 0, so that a term that is lost or weighted by mistake shows.
L_SIMPLE, ELBO = 0.7, 0.01
WHOLE = {"density": {"type": "uniform"}, "weighting": {"type": "p2"}, "scope": "loss"}
SMALL_STAGE = {"target": "torch.nn.Identity"}
# What the constructors of Stability's classes ask for beyond LatentDiffusion's.
EXTRA: dict[str, dict[str, Any]] = {
    "Layout2ImgDiffusion": {"cond_stage_key": "coordinates_bbox"},
    "LatentUpscaleDiffusion": {"low_scale_config": SMALL_STAGE},
    "LatentFinetuneDiffusion": {"concat_keys": ("mask",), "finetune_keys": None},
    "LatentInpaintDiffusion": {"finetune_keys": None},
    "LatentDepth2ImageDiffusion": {"finetune_keys": None, "depth_stage_config": SMALL_STAGE},
    "LatentUpscaleFinetuneDiffusion": {"finetune_keys": None},
    "ImageEmbeddingConditionedLatentDiffusion": {"embedder_config": SMALL_STAGE},
}


class LightningModule(nn.Module):
    """What the host's classes use of Lightning's while they train and sample."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next((each.device for each in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""


class SmallUnet(nn.Module):
    """A model of one parameter that depends on x, t and context, and remembers the t that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen.append(t.detach().clone())
        answer = torch.sin(self.scale * x + 0.01 * t.view(-1, 1, 1, 1))
        return answer if context is None else answer + context.view(len(x), -1, 1, 1)[:, :1]


def lightning_modules() -> dict[str, ModuleType]:
    """pytorch_lightning as far as the hosts import it, by module name."""
    members: dict[str, dict[str, Any]] = {
        "pytorch_lightning": {"LightningModule": LightningModule},
        "pytorch_lightning.utilities": {},
        "pytorch_lightning.utilities.distributed": {"rank_zero_only": lambda function: function},
    }
    modules = {name: ModuleType(name) for name in members}
    for name, contents in members.items():
        vars(modules[name]).update(contents, __path__=[])
    return modules


def install() -> StandIns:
    """Stands in for what the hosts import and is missing here; the finder knows which inert ones it made."""
    try:
        # Before the others are stood in for: it asks for their versions.
        import_module("pytorch_lightning")
    except ImportError:
        sys.modules.update(lightning_modules())
    finder = StandIns(INERT)
    sys.meta_path.append(finder)
    return finder


def check(ddpm: ModuleType) -> list[int]:
    """The points that hold for the classes of a host's `ldm.models.diffusion.ddpm`, in order.

    Raises:
        AssertionError: the first point that does not, its number first.
    """
    return run_points(CONTRACT, ddpm)


def made(ddpm: ModuleType, name: str, policy: Any = None, **options: Any) -> Any:
    """A small object of the host's class of this name; with a policy, of ours."""
    owner: Any = ddpm if policy is None else import_module(PLUGIN)
    given: dict[str, Any] = {
        "unet_config": {"target": f"{__name__}.SmallUnet"},
        "timesteps": 1000,
        "image_size": SHAPE[2],
        "channels": SHAPE[1],
        "l_simple_weight": L_SIMPLE,
        "original_elbo_weight": ELBO,
        **({} if policy is None else {"policy": policy}),
    }
    if is_latent(ddpm, name):
        given |= {
            "first_stage_config": SMALL_STAGE,
            "cond_stage_config": "__is_first_stage__",
            "conditioning_key": "crossattn",
        }
    return getattr(owner, name)(**{**given, **EXTRA.get(name, {}), **options})


def is_latent(ddpm: ModuleType, name: str) -> bool:
    """Whether the class of this name has first and conditioning stages."""
    return issubclass(getattr(ddpm, name), ddpm.LatentDiffusion)


def names_of(ddpm: ModuleType) -> list[str]:
    """The host's classes that train."""
    return [k for k, v in vars(ddpm).items() if isinstance(v, type) and issubclass(v, ddpm.DDPM)]


def batch(dtype: torch.dtype = torch.float32) -> Batch:
    """Fixed data, conditioning (B, 1) and noise."""
    generator = torch.Generator().manual_seed(5)
    x, noise = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(2))
    return x, torch.rand(SHAPE[0], 1, generator=generator).to(dtype), noise


def step_of(
    model: Any, data: Batch | None = None, *, generator: torch.Generator | None = None, called: Any = None
) -> Outcome:
    """One step as the host's shared_step takes it: its forward draws a t.

    Args:
        model: of the host's class or ours.
        data: None is `batch()`.
        generator: of our draws.
        called: what wraps the model.
    """
    if generator is not None:
        attachment_of(model).generator = generator
    data = data or batch()
    outcome: Outcome = (model if called is None else called)(*_given(model, data), noise=data[2])
    return outcome


def host_losses(model: Any, data: Batch, t: Tensor) -> Outcome:
    """The host's own loss and terms at a given t (B,)."""
    outcome: Outcome = model.p_losses(*_given(model, data), t, noise=data[2])
    return outcome


def _given(model: Any, data: Batch) -> tuple[Tensor, ...]:
    return data[:2] if hasattr(model, "cond_stage_key") else data[:1]


def draws_are_seen(ddpm: ModuleType) -> None:
    """Point 1, of every class of the host, and that the host's own draw of t is left alone."""
    for name in names_of(ddpm):
        model, draw = _trained(ddpm, name)
        seen = model.model.diffusion_model.seen
        assert len(seen) == 1, f"{name} called its model {len(seen)} times"
        assert torch.equal(seen[0], draw.index), f"{name} drew {draw.index}, the model saw {seen[0]}"
        t = torch.arange(SHAPE[0])
        host_losses(model, batch(), t)
        assert torch.equal(t, torch.arange(SHAPE[0])), f"{name} wrote into the caller's t"


def loss_is_weighted(ddpm: ModuleType) -> None:
    """Point 2: every target, both errors, both scopes, in float32 and float64, and its gradient."""
    targets = ["eps", "x0", *(["v"] if hasattr(ddpm.DDPM, "get_v") else [])]
    options = [{"parameterization": target, "loss_type": "l2"} for target in targets] + [{"loss_type": "l1"}]
    for name in ("DDPM", "LatentDiffusion"):
        for option in options:
            for policy in (POLICY, WHOLE):
                for dtype in (torch.float32, torch.float64):
                    _weighs(ddpm, name, policy, dtype, option)


def uniform_is_the_host(ddpm: ModuleType) -> None:
    """Point 3, and outside training mode every policy: no draw, no weights, no step of a curriculum."""
    for name in names_of(ddpm):
        model, draw = _trained(ddpm, name, "uniform")
        plain = made(ddpm, name)
        _same(step_of(model, generator=seeded()), host_losses(plain, batch(), draw.index), name)
        model, plain = made(ddpm, name, POLICY).eval(), plain.eval()
        torch.manual_seed(4)
        ours = step_of(model)
        torch.manual_seed(4)
        _same(ours, step_of(plain), f"{name} in eval mode")
        assert "val/loss" in ours[1], "the terms of eval mode are not the validation's"
        assert attachment_of(model).num_calls == 0, f"{name} counted a validation step as training"


def sampling_is_untouched(ddpm: ModuleType) -> None:
    """Point 4; the policy is built with the model, and sampling asks it nothing."""
    for name in ("DDPM", "LatentDiffusion"):
        short: dict[str, Any] = {"timesteps": 20, "linear_end": 0.5}
        model = made(ddpm, name, "p2", **short)
        samples = []
        for each in (model, made(ddpm, name, **short)):
            torch.manual_seed(3)
            conditioning = (batch()[1],) if hasattr(each, "cond_stage_key") else ()
            samples.append(each.p_sample_loop(*conditioning, SHAPE))
        assert torch.equal(*samples), f"{name}.p_sample_loop differs"
        assert attachment_of(model).num_calls == 0, "sampling counted as training"


def object_is_the_hosts(ddpm: ModuleType) -> None:
    """Point 5, of every class of the host."""
    for name in names_of(ddpm):
        model, plain = made(ddpm, name, POLICY), made(ddpm, name)
        assert isinstance(model, type(plain)), f"not a {name}"
        assert list(model.state_dict()) == list(plain.state_dict()), f"{name} has other weights"
        assert set(vars(model)) - set(vars(plain)) == {"_speedit_attachment"}, "other attributes"
        expected = step_of(model, generator=seeded())
        # A generator has no state that can be copied.
        attachment_of(model).generator = None
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - made here
            assert type(copied) is type(model), f"a copy is a {type(copied)}"
            assert is_attached(copied), "a copy has no policy"
            _same(step_of(copied, generator=seeded()), expected, f"a copy of {name}")


def missing_seam_is_refused(ddpm: ModuleType) -> None:
    """Point 6: options that leave the policy without its effect, and another host."""
    refused(lambda: made(ddpm, "DDPM", POLICY, learn_logvar=True), "wanted learn_logvar=False")
    refused(
        lambda: made(ddpm, "LatentDiffusion", POLICY, num_timesteps_cond=2),
        "num_timesteps_cond=2 noises the conditioning at the t that the host draws",
    )
    refused(lambda: made(ddpm, "DDPM", "spedit"), "did you mean 'speedit'")
    unknown = _reporting_value_errors(lambda: import_module(PLUGIN).LatentDifusion)
    refused(unknown, "did you mean 'LatentDiffusion'")
    without_loss = type("DDPM", (), {"p_losses": ddpm.DDPM.p_losses})
    for members in ({}, {"DDPM": without_loss}):
        other = ModuleType(HOST)
        vars(other).update(members)
        with mock.patch.dict(sys.modules, {HOST: other}):
            del sys.modules[PLUGIN]
            refused(_reporting_value_errors(partial(import_module, PLUGIN)), "no class DDPM with p_losses")


def wrapping_ends(ddpm: ModuleType) -> None:
    """Point 7."""
    for name in names_of(ddpm):
        model, plain = made(ddpm, name, POLICY), made(ddpm, name)
        refused(partial(with_policy, model, POLICY), "has a policy already")
        step_of(model)
        without_policy(model)
        assert type(model) is type(plain), f"left as {type(model)}"
        assert set(vars(model)) == set(vars(plain)), "left something behind"
        t = torch.arange(SHAPE[0])
        _same(host_losses(model, batch(), t), host_losses(plain, batch(), t), name)


def survives_its_surroundings(ddpm: ModuleType) -> None:
    """Point 8: the whole module wrapped, its unet compiled, and a bfloat16 default dtype."""
    for name in ("DDPM", "LatentDiffusion"):
        model, draw = _trained(ddpm, name)
        unet, expected = model.model.diffusion_model, step_of(model, generator=seeded())
        with wrapped_models(model) as others:
            for kind, other in others.items():
                unet.scale.grad = None
                outcome = step_of(model, generator=seeded(), called=other)
                torch.autograd.backward(outcome[0])
                _same(outcome, expected, kind)
                assert unet.scale.grad is not None, f"{kind}: no gradient"
        model.model.diffusion_model = torch.compile(unet, backend="eager")
        _same(step_of(model, generator=seeded()), expected, "with a compiled unet")
        assert len(unet.seen) == 5, f"wanted 5 steps of the unet, got {len(unet.seen)}"
        assert all(torch.equal(seen, draw.index) for seen in unet.seen), "the model saw another t"
        with default_dtype(torch.bfloat16), torch.no_grad():
            model, rows = made(ddpm, name, "uniform"), torch.zeros(NUM_DRAWS, 1, 1, 1)
            step_of(model, (rows, rows[:, 0, 0], rows), generator=seeded())
        reached = len(model.model.diffusion_model.seen[0].unique())
        assert reached == model.num_timesteps, f"a bfloat16 default reaches {reached} timesteps"


CONTRACT: dict[int, Callable[[ModuleType], None]] = {
    1: draws_are_seen,
    2: loss_is_weighted,
    3: uniform_is_the_host,
    4: sampling_is_untouched,
    5: object_is_the_hosts,
    6: missing_seam_is_refused,
    7: wrapping_ends,
    8: survives_its_surroundings,
}


def seeded() -> torch.Generator:
    """A generator of the draws."""
    return torch.Generator().manual_seed(7)


def _reporting_value_errors(action: Callable[[], object]) -> Callable[[], object]:
    def act() -> object:
        try:
            return action()
        except (AttributeError, ImportError) as error:
            raise ValueError(str(error)) from error

    return act


def _trained(ddpm: ModuleType, name: str, policy: Any = POLICY) -> tuple[Any, TimestepDraw]:
    """Our model after one step, and the draw of an independent policy with the same seed."""
    model, plain = made(ddpm, name, policy), made(ddpm, name)
    step_of(model, generator=seeded())
    own = build_policy(policy, schedule_of(plain), prediction_type_of(plain))
    return model, own.draw(SHAPE[0], generator=seeded())


def _weighs(ddpm: ModuleType, name: str, policy: Any, dtype: torch.dtype, options: Mapping[str, Any]) -> None:
    model, plain = made(ddpm, name, policy, **options).to(dtype), made(ddpm, name, **options).to(dtype)
    own = build_policy(policy, schedule_of(plain), prediction_type_of(plain))
    draw, data = own.draw(SHAPE[0], generator=seeded()), batch(dtype)
    loss, terms = step_of(model, data, generator=seeded())
    # Sample by sample, so that the host's own means are not part of the comparison.
    ones = [host_losses(plain, _row(data, i), draw.index[i : i + 1])[1] for i in range(SHAPE[0])]
    mse, vb = (
        torch.stack([one[f"train/{term}"] for one in ones]).double() for term in ("loss_simple", "loss_vlb")
    )
    weight = draw.weight.double()
    direct = (weight * L_SIMPLE * mse + (weight if draw.scope == "loss" else 1) * ELBO * vb).mean()
    what = f"{name}, scope {draw.scope}, {dict(options)}, {dtype}"
    tolerance = FLOAT32_TOLERANCE if dtype is torch.float32 else FLOAT64_TOLERANCE
    error = float(((loss - direct) / direct).abs().detach())
    assert error <= tolerance, f"{what}: loss misses w * mse + vb by {error:.1e}, wanted {tolerance:.0e}"
    assert torch.equal(terms["train/loss"], loss), f"{what}: train/loss is not the loss"
    _, untouched = host_losses(plain, data, draw.index)
    for term in ("train/loss_simple", "train/loss_vlb"):
        assert torch.equal(terms[term], untouched[term]), f"{what}: {term} is not the host's"
    if dtype is torch.float64:
        ours, theirs = (
            torch.autograd.grad(value, each.model.diffusion_model.scale)[0]
            for value, each in ((loss, model), (direct, plain))
        )
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=0), f"{what}: gradient {ours}, not {theirs}"


def _row(data: Batch, i: int) -> Batch:
    x, c, noise = (each[i : i + 1] for each in data)
    return x, c, noise


def _same(ours: Outcome, theirs: Outcome, what: str) -> None:
    assert list(ours[1]) == list(theirs[1]), f"{what}: terms {list(ours[1])}, not {list(theirs[1])}"
    assert torch.equal(ours[0], theirs[0]), f"{what}: loss differs by {float(ours[0] - theirs[0])}"
    for name, value in theirs[1].items():
        assert torch.equal(ours[1][name], value), f"{what}: {name} differs"
