"""Seam D: a script draws its timesteps and makes its loss itself, with diffusers' own schedulers.

This runs a small script with the lines of diffusers' examples, edited as the launcher edits it.

Dims: B batch.
"""

import ast
import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from conformance import points
from conformance.models import SmallModel
from conformance.points import on, refused
from conformance.seam import POLICY, Batch, Seam, Terms, new_process, trained
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.edits.script_edits import CALLS, ScriptCalls, edited
from speedit_plugins.hosts.schedules import from_diffusers, prediction_type_of
from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy

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
class Run:
    """One run of the script: its noise scheduler, and the policy that draws and weighs, or None."""

    noise_scheduler: Any
    policy: ScriptPolicy | None = None


@dataclass(frozen=True)
class ScriptSeam(Seam):
    """The script with a scheduler class of diffusers.

    Args:
        name: of the class.
        options: of the class.
        prediction_type: the value of the script's option; None leaves it to the scheduler.
        snr_gamma: of the script's Min-SNR weights; None has no weights.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    prediction_type: str | None = None
    snr_gamma: float | None = None
    shape: tuple[int, ...] = (6, 4, 4, 4)
    policies: tuple[Any, ...] = (POLICY, "min_snr")
    draws_in_the_call = False

    def make(self) -> Run:
        return Run(getattr(import_module("diffusers"), self.name)(**self.options))

    def attached(self, policy: Any = POLICY, generator: torch.Generator | None = None) -> Run:
        return replace(self.make(), policy=ScriptPolicy(policy, generator=generator))

    def policy(self, name: Any = POLICY) -> TimestepPolicy:
        scheduler = self.make().noise_scheduler
        stated = "v" if self.prediction_type == "v_prediction" else prediction_type_of(scheduler)
        return build_policy(name, from_diffusers(scheduler), stated)

    def train(self, host: Run, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        step, options = step_of(host.policy), (self.prediction_type, self.snr_gamma)
        own = torch.randint
        with mock.patch.object(torch, "randint", own if t is None else lambda *_, **__: t.clone()):
            loss, timesteps, target, answer = step(host.noise_scheduler, model, *batch, *options)
        if isinstance(model, SmallModel):
            assert torch.equal(timesteps, model.seen[-1]), "the model saw other timesteps"
        mse = functional.mse_loss(answer, target, reduction="none").flatten(1).mean(1)
        # If the last SNR is 0, Min-SNR is 0 / 0 there. Two runs agree if both are nan.
        return Terms(loss.nan_to_num(nan=-1.0), mse=mse)

    def holder(self, host: Run) -> Any:
        return host.policy

    def sample(self, host: Run) -> Tensor:
        scheduler = host.noise_scheduler
        scheduler.set_timesteps(3)
        x, generator = torch.ones(1, 4, 4, 4), torch.Generator().manual_seed(3)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x), t, x, generator=generator).prev_sample
        return x

    def idle(self) -> Run:
        """A run that has trained: this leaves the noise scheduler as it was."""
        host: Run = trained(self).host
        return host

    def is_idle(self, host: Run) -> bool:
        return host.policy is not None and host.policy.state_dict().get("num_steps", 0) == 0

    def is_unused(self, host: Run) -> bool:
        return host.policy is not None and host.policy.state_dict()["num_steps"] == 1


V_OF_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SEAMS = (
    ScriptSeam("DDPMScheduler"),
    ScriptSeam("DDPMScheduler", SCALED),
    ScriptSeam(
        "DDPMScheduler", {**SCALED, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ),
    ScriptSeam("DDIMScheduler", SCALED),
)


def step_of(policy: ScriptPolicy | None, text: str = SCRIPT) -> Callable[..., Any]:
    """The script's training step, edited for a policy; None leaves it as it is."""
    tree = ast.parse(text)
    names: dict[str, Any] = {"compute_snr": import_module("diffusers.training_utils").compute_snr}
    if policy is not None:
        tree, sites = edited(tree)
        assert sites.are_a_seam, f"found {sites}"
        names[CALLS] = ScriptCalls(policy)
    exec(compile(tree, "script", "exec"), names)
    step: Callable[..., Any] = names["step"]
    return step


def scheduler_stays(seam: ScriptSeam) -> None:
    """Point 4: training leaves the noise scheduler as it was."""
    used, unused = trained(seam).host.noise_scheduler, seam.make().noise_scheduler
    assert type(used) is type(unused), "another class"
    assert dict(used.config) == dict(unused.config), "another config"


def policy_copies(seam: ScriptSeam) -> None:
    """Point 5: a policy in use can be copied and pickled. A copy draws what the original would."""
    host = trained(seam).host
    # A torch.Generator does not pickle.
    host.policy._stream = DrawStream()
    pickled = pickle.dumps(host.policy)
    drawn = []
    for each in (host.policy, copy.deepcopy(host.policy), pickle.loads(pickled)):  # noqa: S301 - made here
        torch.manual_seed(3)
        new_process()
        drawn.append(each.timesteps(host.noise_scheduler, 6))
        assert each.policy.num_steps == 2, "another number of draws"
    assert all(torch.equal(drawn[0], index) for index in drawn), "another draw"


def other_schedulers_are_refused(seam: ScriptSeam) -> None:
    """Point 6: an index into sigmas is no timestep."""
    diffusers = import_module("diffusers")
    for name in ("EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"):
        other = getattr(diffusers, name)()
        refused(lambda other=other: ScriptPolicy().timesteps(other, 6), f"{name} has no alphas_cumprod")
    edm = (
        "i = torch.randint(0, noise_scheduler.config.num_train_timesteps, (2,))\n"
        "t = noise_scheduler.timesteps[i]\nF.mse_loss(1, 2)\n"
    )
    names = {CALLS: ScriptCalls(ScriptPolicy()), "noise_scheduler": seam.make().noise_scheduler}
    refused(lambda: exec(compile(edited(ast.parse(edm))[0], "script", "exec"), names), "EDM style")


def every_step_is_watched(seam: ScriptSeam) -> None:
    """Point 1, of a script that changes its timesteps from the third step on; and a validation in between."""
    text = SCRIPT.replace("timesteps.long()", "timesteps.long() if len(latents) < 6 else timesteps // 2")
    step, scheduler = step_of(ScriptPolicy(), text), seam.make().noise_scheduler
    few = tuple(each[:4] for each in seam.batch())
    for _ in range(2):
        step(scheduler, SmallModel(), *few)
    with torch.no_grad():
        step(scheduler, SmallModel(), *seam.batch())
    refused(lambda: step(scheduler, SmallModel(), *seam.batch()), "at other timesteps")
    # The refused step was not finished: a policy made anew goes on with the same scheduler.
    step_of(ScriptPolicy())(scheduler, SmallModel(), *seam.batch())
    assert type(scheduler) is type(seam.make().noise_scheduler), "the scheduler has another class"


def weights_are_not_doubled(seam: ScriptSeam) -> None:
    """Point 7: the script's Min-SNR beside a policy with weights."""
    refused(lambda: trained(replace(seam, snr_gamma=5.0)), "drop --snr_gamma")


# The script sets another prediction type after its draw. The weights are those of that type.
STATING_V = [{"prediction_type": "v_prediction"}]
# A policy without weights leaves the script's own Min-SNR on.
MIN_SNR: list[dict[str, Any]] = [{"snr_gamma": None}, {"snr_gamma": 5.0}]
ScriptSeam.contract = points.COMMON | {
    1: (points.draws_are_seen, points.data_are_observed, every_step_is_watched),
    2: (on(STATING_V, points.loss_is_weighted),),
    3: (
        on(MIN_SNR, points.uniform_is_the_host),
        on(MIN_SNR, points.evaluations_are_the_hosts),
        points.random_numbers_are_the_hosts,
    ),
    4: (points.sampling_is_untouched, scheduler_stays),
    5: (policy_copies,),
    6: (other_schedulers_are_refused,),
    7: (weights_are_not_doubled,),
}


def check_scripts(paths: list[Path]) -> None:
    """Raises AssertionError unless the launcher edits each script at its draw and at its losses."""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        _, sites = edited(ast.parse(text))
        lines = text.splitlines()
        assert sites.are_a_seam, f"{path.name}: found {sites}"
        assert all("torch.randint" in lines[line - 1] for line in sites.draws), f"{path.name}: {sites}"
        assert all("F.mse_loss" in lines[line - 1] for line in sites.losses), f"{path.name}: {sites}"
        assert len(sites.losses) == text.count("F.mse_loss("), f"{path.name}: found {sites}"
