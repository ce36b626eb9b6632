"""Runs an unmodified flow script of a diffusers checkout through the launcher: SD3's and Flux's DreamBooth.

`tools/diffusers_training.py` starts this for scripts that call `compute_density_for_timestep_sampling`. A run
of `NUM_STEPS` steps writes the script's own checkpoints. A second one resumes from the last of them. What the
policy should have done is computed beside: it is built again, sees the same data and losses, and gives the
law and the weights of each step.

Dims: B batch, T timesteps.
"""

import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conformance.diffusers_flows import SHIFT, write_flux, write_images, write_sd3
from conformance.diffusers_stand_ins import RESOLUTION, stand_ins
from torch import Tensor

from speedit_plugins import NoiseSchedule, build_policy, launch
from speedit_plugins.hosts.states.state_file import CHECKPOINT_FILE, read_state
from speedit_plugins.policies.shifted_boundary import with_shifted_boundary
from whole_trainings.checks import fit

BATCH, NUM_STEPS, NUM_MORE = 32, 200, 20
NUM_IMAGES = 64
DENSITY = "compute_density_for_timestep_sampling"
# So many draws of the script's own law are its table: their error is a twentieth of a run's.
_NUM_OF_LAW = 2_000_000
_T = 1000
NAMES = (
    "torchvision (the transforms of the scripts, on PIL images)",
    "the pipeline (a few channels, random weights, small vocabularies) and random images",
)


@dataclass
class Steps:
    """What a script did in each training step.

    Args:
        sigmas: that its transformer saw, float64 (B,).
        errors: mean squared error of each sample, float64 (B,), of what the script takes the error of.
        data: what it noised, (B, ...).
        losses: scalars that it differentiated.
        law: options of its own draw.
    """

    sigmas: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    data: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    law: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """The scripts of one model.

    Args:
        write: saves a tiny pipeline.
        model: name of the transformer's class in diffusers.
        timesteps_per_sigma: the timestep that the transformer gets, divided by sigma.
        is_packed: whether it gets and returns patches as tokens.
        predicts_data: whether the script turns its output into data, by default.
    """

    write: Callable[[Path], None]
    model: str
    timesteps_per_sigma: float
    is_packed: bool
    predicts_data: bool


FAMILIES = {
    "sd3": Family(write_sd3, "SD3Transformer2DModel", 1000.0, is_packed=False, predicts_data=True),
    "flux": Family(write_flux, "FluxTransformer2DModel", 1.0, is_packed=True, predicts_data=False),
}


def is_flow(script: Path) -> bool:
    """Whether a script draws as the flow scripts do."""
    return f"{DENSITY}(" in script.read_text(encoding="utf-8")


def run(script: Path, work: Path, policy: str, more: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """The launcher's exit code, and what is printed of the whole training and of its resumption.

    Args:
        script: of the checkout.
        work: an empty folder.
        policy: its name, or several options of the launcher's: a name and `--set` with what follows it.
        more: arguments of the script's own.
    """
    family = FAMILIES["flux" if "flux" in script.name else "sd3"]
    family.write(work / "pipeline")
    for folder in ("instance", "class"):
        write_images(work / folder, NUM_IMAGES)
    arguments = [*script_arguments(work), *more]
    options = ["--policy", *policy.split()]

    def launched(*others: str) -> tuple[int, Steps]:
        steps = Steps()
        command = [*options, str(script), *arguments, *others]
        return recorded(steps, script, family, lambda: launch.main(command)), steps

    code, steps = launched("--max_train_steps", str(NUM_STEPS), "--checkpointing_steps", str(NUM_STEPS // 2))
    result: dict[str, Any] = {"script": script.name, "exit": code, "stand_ins": NAMES}
    if code:
        return code, result
    wanted = Wanted(options[1], options[3::2], is_data=_predicts_data(family, arguments))
    result |= report(wanted, steps, arguments)
    saved = work / "results" / f"checkpoint-{NUM_STEPS}" / CHECKPOINT_FILE
    result["state_error"] = state_error(wanted, read_state(saved))
    if options[1] == "uniform":
        result["loss_difference"] = difference(steps, replayed(script, family, arguments, steps))
    last = NUM_STEPS + NUM_MORE
    resuming = ("--resume_from_checkpoint", "latest", "--checkpointing_steps", str(NUM_MORE))
    code, steps = launched("--max_train_steps", str(last), *resuming)
    further = report(wanted, steps, arguments)
    saved = work / "results" / f"checkpoint-{last}" / CHECKPOINT_FILE
    result["resumed"] = {
        "exit": code,
        "steps": len(steps.losses),
        **{name: further[name] for name in ("worst_sigma", "loss_error")},
        "num_steps": read_state(saved)["num_steps"],
        "state_error": state_error(wanted, read_state(saved)),
    }
    return code, result


def is_right(result: Mapping[str, Any]) -> bool:
    """Whether draws follow the policy, losses are weight * mse, and a resumed run goes on with its state."""
    resumed = result["resumed"]
    # float32 keeps 6e-8 of each sum in a loss. The host's mean and ours add up in different order.
    holds = all(each["worst_sigma"] < 4 and each["loss_error"] < 1e-5 for each in (result, resumed))
    goes_on = resumed["exit"] == 0 and resumed["num_steps"] == NUM_STEPS + NUM_MORE
    states = max(result["state_error"], resumed["state_error"]) < 1e-5
    return holds and goes_on and states and result.get("loss_difference", 0.0) == 0


def script_arguments(work: Path) -> list[str]:
    """Arguments with which every flow script is started."""
    paths = {
        "pretrained_model_name_or_path": work / "pipeline",
        "output_dir": work / "results",
        "instance_data_dir": work / "instance",
        "class_data_dir": work / "class",
    }
    texts = {"instance_prompt": "a", "class_prompt": "b", "mixed_precision": "no"}
    numbers = {"resolution": RESOLUTION, "train_batch_size": BATCH, "max_sequence_length": 8, "seed": 0}
    numbers |= {"num_class_images": NUM_IMAGES, "lr_warmup_steps": 0}
    return [
        part for name, value in {**paths, **texts, **numbers}.items() for part in (f"--{name}", str(value))
    ]


def recorded(steps: Steps, script: Path, family: Family, start: Callable[[], int]) -> int:
    """Runs `start` with stand-ins and returns what it returns. Adds what the script did to `steps`."""
    import accelerate
    import diffusers
    from accelerate.state import AcceleratorState
    from diffusers import FluxPipeline, StableDiffusion3Pipeline, training_utils  # noqa: F401 - before the stand-ins
    from diffusers_training import placed

    model = getattr(diffusers, family.model)
    forward, backward = model.forward, accelerate.Accelerator.backward
    randn_like, own_law = torch.randn_like, getattr(training_utils, DENSITY)
    last: dict[str, Tensor] = {}

    def noise(data: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = randn_like(data, *args, **kwargs)
        if sys._getframe(1).f_code.co_filename == str(script):
            last.update(data=data.detach().clone(), noise=made.clone())
        return made

    @wraps(forward)
    def answered(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = forward(self, *args, **kwargs)
        if torch.is_grad_enabled():
            sigma = kwargs["timestep"].double() / family.timesteps_per_sigma
            last.update(sigma=sigma, answer=answer[0].detach().clone(), noised=kwargs["hidden_states"])
        return answer

    def drawn(*args: Any, **kwargs: Any) -> Tensor:
        steps.law = kwargs
        own: Tensor = own_law(*args, **kwargs)
        return own

    def differentiated(self: Any, loss: Tensor, **kwargs: Any) -> None:
        steps.sigmas.append(last["sigma"])
        steps.data.append(last["data"])
        steps.errors.append(_errors(family, last, sys._getframe(1).f_locals["args"]))
        steps.losses.append(loss.detach().clone())
        backward(self, loss, **kwargs)

    AcceleratorState._reset_state(True)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "randn_like", noise))
        stack.enter_context(mock.patch.object(model, "forward", answered))
        stack.enter_context(mock.patch.object(training_utils, DENSITY, drawn))
        stack.enter_context(mock.patch.object(accelerate.Accelerator, "backward", differentiated))
        stack.enter_context(placed(stand_ins()))
        return start()


class Wanted:
    """What a policy should do in each step, given what the script did in it.

    Args:
        policy: its name.
        settings: NAME=VALUE of `--set`.
        is_data: whether the script takes the error of data.
    """

    def __init__(self, policy: str, settings: Sequence[str], *, is_data: bool) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        # From clean to noise. A row of the script's table is T - 1 - index.
        self.table = FlowMatchEulerDiscreteScheduler(shift=SHIFT).sigmas.flip(0).double()
        schedule = NoiseSchedule(1 - self.table, self.table, torch.arange(_T), _T)
        config = {"type": policy, **{name: _value(text) for name, text in (s.split("=") for s in settings)}}
        self.policy = build_policy(
            with_shifted_boundary(config, SHIFT), schedule, "x0" if is_data else "flow"
        )

    def steps(self, steps: Steps) -> Iterator[tuple[Tensor, Tensor]]:
        """The law (T,) and the weights (B,) of each step. The policy goes on by as many."""
        own = _law(steps.law).flip(0)
        for sigma, error, data in zip(steps.sigmas, steps.errors, steps.data, strict=True):
            self.policy.advance()
            density = self.policy.density.double()
            law = own * density if self.policy.is_relative else density
            index = (sigma[:, None] - self.table).abs().argmin(1)
            # The model saw a sigma of the table, not one nearby.
            assert bool((sigma - self.table[index]).abs().max() < 1e-6)
            yield law / law.sum(), self.policy.weight.double()[index]
            self.policy.observe(data)
            self.policy.update(index, error.float())


def report(wanted: Wanted, steps: Steps, arguments: Sequence[str]) -> dict[str, Any]:
    """How well the sigmas fit the law, and the largest relative error of a loss against weight * mse."""
    laws, errors = [], []
    for (law, weight), mse, loss in zip(wanted.steps(steps), steps.errors, steps.losses, strict=True):
        laws.append(law)
        weighed = weight * mse
        parts = weighed.chunk(2) if "--with_prior_preservation" in arguments else (weighed,)
        # --prior_loss_weight is 1 by default.
        mean = sum(float(part.mean()) for part in parts)
        errors.append(abs(float(loss) / mean - 1))
    tenth = (wanted.table * 10).long().clamp(max=9)
    shares = torch.zeros(10, dtype=torch.float64).index_add(0, tenth, torch.stack(laws).mean(0))
    found = torch.histc(torch.cat(steps.sigmas), bins=10, min=0, max=1)
    expected = shares * found.sum()
    return {
        **fit(shares, steps.sigmas),
        "chi_squared": round(float(((found - expected) ** 2 / expected).sum()), 1),
        "tenths": [int(count) for count in found],
        "loss_error": max(errors),
    }


def state_error(wanted: Wanted, saved: Mapping[str, Any]) -> float:
    """The largest relative difference of a number in the saved state; infinite if it is another state."""
    ours, theirs = (list(_numbers(each)) for each in (wanted.policy.state_dict(), saved))
    if [path for path, _ in ours] != [path for path, _ in theirs]:
        return float("inf")
    # The draws were counted by the launched policy alone.
    pairs = [(a, b) for (path, a), (_, b) in zip(ours, theirs, strict=True) if path != "/num_drawn"]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in pairs)


def replayed(script: Path, family: Family, arguments: Sequence[str], before: Steps) -> Steps:
    """What the script does without the launcher, if its draws are those of a run before."""
    from diffusers import FlowMatchEulerDiscreteScheduler, training_utils

    rows = FlowMatchEulerDiscreteScheduler(shift=SHIFT).sigmas.double()
    left, own_law = list(before.sigmas), getattr(training_utils, DENSITY)

    def next_draw(*args: Any, **kwargs: Any) -> Tensor:
        # The script draws all the same, so that its noise is its own.
        own = own_law(*args, **kwargs)
        row = (left.pop(0)[:, None] - rows).abs().argmin(1)
        return ((row + 0.5) / _T).to(own)

    steps = Steps()
    options = ["--max_train_steps", str(len(before.losses)), "--checkpointing_steps", "100000"]

    def start() -> int:
        runpy.run_path(str(script), run_name="__main__")
        return 0

    argv = [str(script), *arguments, *options]
    with mock.patch.object(sys, "argv", argv), mock.patch.object(training_utils, DENSITY, next_draw):
        recorded(steps, script, family, start)
    return steps


def difference(first: Steps, second: Steps) -> float:
    """The largest difference between two runs' losses in a step; infinite if their sigmas differ."""
    is_same = len(first.losses) == len(second.losses) > 0 and all(
        map(torch.equal, first.sigmas, second.sigmas)
    )
    if not is_same:
        return float("inf")
    return float((torch.stack(first.losses) - torch.stack(second.losses)).abs().max())


def _errors(family: Family, last: Mapping[str, Tensor], args: Any) -> Tensor:
    """Mean squared error of each sample, float64 (B,)."""
    data, noise = last["data"].double(), last["noise"].double()
    target, answer = noise - data, last["answer"].double()
    if family.is_packed:
        from diffusers import FluxPipeline

        target = FluxPipeline._pack_latents(target, *data.shape)
    if getattr(args, "precondition_outputs", False):
        sigma = last["sigma"].view(-1, *[1] * (data.dim() - 1))
        answer, target = last["noised"].double() - sigma * answer, data
    return (answer - target).square().flatten(1).mean(1)


def _predicts_data(family: Family, arguments: Sequence[str]) -> bool:
    option = "--precondition_outputs"
    given = arguments[arguments.index(option) + 1] if option in arguments else None
    return family.predicts_data if given is None else bool(int(given))


def _law(options: Mapping[str, Any]) -> Tensor:
    """The script's own probability of each row, float64 (T,)."""
    from diffusers import training_utils

    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        u = getattr(training_utils, DENSITY)(**{**options, "batch_size": _NUM_OF_LAW})
    return torch.bincount((u * _T).long().clamp(max=_T - 1), minlength=_T).double() / _NUM_OF_LAW


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(state: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a state, with its place."""
    if isinstance(state, Mapping):
        for name, value in state.items():
            yield from _numbers(value, f"{path}/{name}")
    elif isinstance(state, Tensor):
        yield from (
            (f"{path}/{place}", value) for place, value in enumerate(state.double().flatten().tolist())
        )
    elif isinstance(state, list | tuple):
        yield from _numbers(dict(enumerate(state)), path)
    elif isinstance(state, bool | int | float):
        yield path, float(state)
