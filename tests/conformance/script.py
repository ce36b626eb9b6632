"""The contract of contract.py for scripts that draw for themselves, with diffusers' own schedulers.

A small script with the lines of diffusers' examples is edited as the launcher does it, and run.

Dims: B batch.
"""

import ast
import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from conformance.contract import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    NUM_DRAWS,
    POLICY,
    SmallModel,
    refused,
    run_points,
)
from conformance.environments import default_dtype, wrapped_models
from speedit_plugins.hosts.schedules import from_diffusers, prediction_type_of
from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.hosts.script_edits import CALLS, ScriptCalls, edited
from speedit_plugins.policies.build import build_policy

SHAPE = (6, 4, 4, 4)
# The draw, the target and the loss of diffusers' text-to-image examples, in their order.
SCRIPT = """
import torch
import torch.nn.functional as F
def step(noise_scheduler, unet, latents, noise, prediction_type=None, snr_gamma=None):
    bsz = latents.shape[0]
    timesteps = torch.randint(
        0, noise_scheduler.config.num_train_timesteps, (bsz,), device=latents.device
    )
    timesteps = timesteps.long()
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    if prediction_type is not None:
        noise_scheduler.register_to_config(prediction_type=prediction_type)
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps)
    if snr_gamma is None:
        loss = F.mse_loss(model_pred, target, reduction="mean")
    else:
        snr = compute_snr(noise_scheduler, timesteps)
        weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
        loss = F.mse_loss(model_pred, target, reduction="none")
        loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
    return loss, timesteps, target, model_pred
"""


@dataclass(frozen=True)
class Scheduler:
    """A scheduler class of diffusers and its options."""

    name: str
    options: dict[str, Any]

    def make(self) -> Any:
        """A new one."""
        return getattr(import_module("diffusers"), self.name)(**self.options)


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = (
    Scheduler("DDPMScheduler", {}),
    Scheduler("DDPMScheduler", SCALED),
    Scheduler("DDPMScheduler", {**SCALED, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    Scheduler("DDIMScheduler", SCALED),
)


def check(scheduler: Scheduler) -> list[int]:
    """The points that hold, in order; AssertionError for the first that does not."""
    return run_points(CONTRACT, scheduler)


def seam_of(policy: Any = POLICY) -> ScriptPolicy:
    """A seam whose draws are the same each time."""
    return ScriptPolicy(policy, generator=torch.Generator().manual_seed(7))


def step_of(seam: ScriptPolicy | None, text: str = SCRIPT) -> Callable[..., Any]:
    """The script's training step: edited around a seam, or as it is."""
    tree = ast.parse(text)
    names: dict[str, Any] = {"compute_snr": import_module("diffusers.training_utils").compute_snr}
    if seam is not None:
        tree, sites = edited(tree)
        assert sites.are_a_seam, f"found {sites}"
        names[CALLS] = ScriptCalls(seam)
    exec(compile(tree, "script", "exec"), names)
    step: Callable[..., Any] = names["step"]
    return step


def draws_are_seen(scheduler: Scheduler) -> None:
    """Point 1: what `add_noise` and the model get is the policy's draw."""
    model, noise_scheduler = SmallModel(None), scheduler.make()
    _, timesteps, _, _ = step_of(seam_of())(noise_scheduler, model, *_batch())
    policy = build_policy(POLICY, from_diffusers(noise_scheduler), prediction_type_of(noise_scheduler))
    wanted = policy.draw(SHAPE[0], generator=torch.Generator().manual_seed(7)).index
    assert torch.equal(timesteps, wanted), "the script's timesteps are not the policy's"
    assert torch.equal(model.seen[0], wanted), "the model saw others"


def loss_is_weighted(scheduler: Scheduler) -> None:
    """Point 2, in float32 and float64, with weights of the prediction type that the script states last."""
    for dtype, tolerance in ((torch.float32, FLOAT32_TOLERANCE), (torch.float64, FLOAT64_TOLERANCE)):
        for policy in (POLICY, "min_snr"):
            noise_scheduler = scheduler.make()
            model = SmallModel(None).to(dtype)
            loss, timesteps, target, answer = step_of(seam_of(policy))(
                noise_scheduler, model, *_batch(dtype), prediction_type="v_prediction"
            )
            weight = build_policy(policy, from_diffusers(noise_scheduler), "v").weight.float()[timesteps]
            mse = functional.mse_loss(answer, target, reduction="none").flatten(1).mean(1)
            direct = (weight.to(dtype) * mse).mean()
            error = float(((loss - direct).abs() / direct).detach())
            assert error <= tolerance, f"loss misses w * mse by {error:.1e} relative, wanted {tolerance:.0e}"


def uniform_is_the_host(scheduler: Scheduler) -> None:
    """Point 3: with Min-SNR of the script too, which a policy without weights leaves on."""
    for snr_gamma in (None, 5.0):
        model, seam = SmallModel(None), seam_of("uniform")
        ours, timesteps, _, _ = step_of(seam)(scheduler.make(), model, *_batch(), snr_gamma=snr_gamma)
        own = torch.randint
        try:
            torch.randint = lambda *_, t=timesteps, **__: t.clone()
            theirs, _, _, _ = step_of(None)(scheduler.make(), model, *_batch(), snr_gamma=snr_gamma)
        finally:
            torch.randint = own
        assert torch.equal(ours, theirs) or (ours.isnan() and theirs.isnan()), "another loss"


def sampling_is_untouched(scheduler: Scheduler) -> None:
    """Point 4: training leaves the noise scheduler as it was."""
    used, unused = scheduler.make(), scheduler.make()
    step_of(seam_of())(used, SmallModel(None), *_batch())
    assert type(used) is type(unused), "another class"
    assert dict(used.config) == dict(unused.config), "another config"
    samples = []
    for noise_scheduler in (used, unused):
        noise_scheduler.set_timesteps(3)
        x, generator = torch.ones(1, 4, 4, 4), torch.Generator().manual_seed(3)
        for t in noise_scheduler.timesteps:
            x = noise_scheduler.step(torch.sin(x), t, x, generator=generator).prev_sample
        samples.append(x)
    assert torch.equal(*samples), "another sample"


def seam_copies(scheduler: Scheduler) -> None:
    """Point 5: a seam in use can be copied and pickled, and draws on as the original would."""
    seam, noise_scheduler = seam_of(), scheduler.make()
    step_of(seam)(noise_scheduler, SmallModel(None), *_batch())
    seams = [_without_generator(seam)]
    seams += [copy.deepcopy(seams[0]), pickle.loads(pickle.dumps(seams[0]))]  # noqa: S301 - made here
    draws = []
    for each in seams:
        torch.manual_seed(3)
        draws.append(each.timesteps(noise_scheduler, 6))
        assert each.num_draws == 2, "another number of draws"
    assert all(torch.equal(draws[0], draw) for draw in draws), "another draw"


def other_schedulers_are_refused(scheduler: Scheduler) -> None:
    """Point 6: an index into sigmas is no timestep."""
    diffusers = import_module("diffusers")
    for name in ("EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"):
        other = getattr(diffusers, name)()
        refused(lambda other=other: seam_of().timesteps(other, 6), f"{name} has no alphas_cumprod")
    edm = (
        "i = torch.randint(0, noise_scheduler.config.num_train_timesteps, (2,))\n"
        "t = noise_scheduler.timesteps[i]\nF.mse_loss(1, 2)\n"
    )
    names = {CALLS: ScriptCalls(seam_of()), "noise_scheduler": scheduler.make()}
    refused(lambda: exec(compile(edited(ast.parse(edm))[0], "script", "exec"), names), "EDM style")
    changed = SCRIPT.replace("timesteps.long()", "timesteps.clamp(max=2)")
    refused(
        lambda: step_of(seam_of(), changed)(scheduler.make(), SmallModel(None), *_batch()),
        "at other timesteps",
    )


def weights_are_not_doubled(scheduler: Scheduler) -> None:
    """Point 7: the script's Min-SNR beside a policy with weights."""
    step = step_of(seam_of())
    refused(lambda: step(scheduler.make(), SmallModel(None), *_batch(), snr_gamma=5.0), "drop --snr_gamma")


def other_models_train_alike(scheduler: Scheduler) -> None:
    """Point 8."""
    model = SmallModel(None)
    with wrapped_models(model) as others:
        losses = [
            step_of(seam_of())(scheduler.make(), other, *_batch())[0].detach()
            for other in (model, *others.values())
        ]
    assert all(torch.equal(losses[0], loss) for loss in losses), "another loss"
    with default_dtype(torch.bfloat16):
        timesteps = seam_of("uniform").timesteps(scheduler.make(), NUM_DRAWS)
    assert len(timesteps.unique()) == 1000, "a bfloat16 default leaves timesteps out"


CONTRACT: dict[int, Callable[[Scheduler], None]] = {
    1: draws_are_seen,
    2: loss_is_weighted,
    3: uniform_is_the_host,
    4: sampling_is_untouched,
    5: seam_copies,
    6: other_schedulers_are_refused,
    7: weights_are_not_doubled,
    8: other_models_train_alike,
}


def check_scripts(paths: list[Path]) -> None:
    """Raises AssertionError where the launcher would not edit a script at its draw and its losses."""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        _, sites = edited(ast.parse(text))
        lines = text.splitlines()
        assert sites.are_a_seam, f"{path.name}: found {sites}"
        assert all("torch.randint" in lines[line - 1] for line in sites.draws), f"{path.name}: {sites}"
        assert all("F.mse_loss" in lines[line - 1] for line in sites.losses), f"{path.name}: {sites}"
        assert len(sites.losses) == text.count("F.mse_loss("), f"{path.name}: found {sites}"


def _without_generator(seam: ScriptPolicy) -> ScriptPolicy:
    # A torch.Generator does not pickle.
    copied = copy.copy(seam)
    copied._generator = None
    return copied


def _batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(SHAPE, generator=generator).to(dtype), torch.randn(SHAPE, generator=generator).to(
        dtype
    )
