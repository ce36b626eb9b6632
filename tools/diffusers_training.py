"""Runs an unmodified training script of a diffusers checkout through the launcher, on the CPU.

    python tools/diffusers_training.py --checkout DIR/huggingface+diffusers --work EMPTY_DIR \\
        [--policy speedit] [--script examples/text_to_image/train_text_to_image.py] \\
        [-- --prediction_type v_prediction]

The pipeline is tiny and made on the spot, and the images are random. This needs accelerate, and peft for
LoRA. The result is printed as JSON: the launcher's exit code, how well the t that the UNet saw fit the
policy's density, and how far the loss is from the mean of weight * mse. With `--policy uniform` the script
also runs without the launcher at the same t, and the difference of the losses is printed.

This file has the text-to-image scripts. SD3's and Flux's DreamBooth scripts are in
`whole_trainings/diffusers_flows.py`, and are started by the same command.

Dims: B batch.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

# The contract is part of the test suite.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from conformance.diffusers_stand_ins import NAMES, RESOLUTION, stand_ins, write_pipeline
from torch import Tensor, nn
from whole_trainings.checks import fit, tenths
from whole_trainings.diffusers_flows import is_flow
from whole_trainings.diffusers_flows import is_right as is_right_flow
from whole_trainings.diffusers_flows import run as run_flow

from speedit_plugins import NoiseSchedule, build_policy, launch

SCRIPT = "examples/text_to_image/train_text_to_image.py"
BATCH, NUM_STEPS = 64, 32


@dataclass
class Seen:
    """What a script did in each step.

    Args:
        t: timesteps that its UNet saw, int64 (B,).
        answers: of the UNet, shape (B, C, H, W).
        targets: noise or velocity, of the same shape.
        losses: scalars that it differentiated.
    """

    t: list[Tensor] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the launcher's exit code; 1 if the policy is not followed."""
    parser = argparse.ArgumentParser(
        prog="diffusers_training", description="A diffusers example, on the CPU."
    )
    parser.add_argument("--checkout", type=Path, required=True, help="of diffusers")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and results")
    parser.add_argument("--script", default=SCRIPT, help="within the checkout (default: %(default)s)")
    parser.add_argument("--policy", default="speedit", help='its name; of a flow also "NAME --set KEY=VALUE"')
    parser.add_argument("arguments", nargs="*", help="more of the script's own, after --")
    args = parser.parse_args(argv)
    script, work = args.checkout.resolve() / args.script, args.work.resolve()
    if is_flow(script):
        code, result = run_flow(script, work, args.policy, args.arguments)
        print(json.dumps(result))
        return code or (0 if is_right_flow(result) else 1)
    seen, arguments = Seen(), [*script_arguments(script, work), *args.arguments]
    write_pipeline(work / "pipeline", is_xl="sdxl" in script.name)
    is_compared = args.policy == "uniform"
    code = recorded(seen, lambda: launch.main(["--policy", args.policy, str(script), *arguments]))
    result = {"script": script.name, "exit": code, "stand_ins": NAMES}
    if code == 0:
        result |= report(args.policy, arguments, seen)
        if is_compared:
            result["loss_difference"] = difference(seen, replayed(script, arguments, seen.t))
    print(json.dumps(result))
    return code or (0 if is_right(result) else 1)


def is_right(result: Mapping[str, Any]) -> bool:
    """Whether timesteps follow the policy, losses are weight * mse, and, if compared, the host's."""
    # float32 keeps 6e-8 of each sum in a loss. The host's mean and ours add up in different order.
    follows = bool(result["draws"]) and result["worst_sigma"] < 4 and result["loss_error"] < 1e-5
    return follows and result.get("loss_difference", 0.0) == 0


def script_arguments(script: Path, work: Path) -> list[str]:
    """Arguments with which every text-to-image script is started."""
    numbers = {"resolution": RESOLUTION, "train_batch_size": BATCH, "max_train_steps": NUM_STEPS, "seed": 0}
    # Without warm-up every step changes the UNet. The first checkpoint would come after the last step.
    numbers |= {"lr_warmup_steps": 0, "checkpointing_steps": 1000}
    paths = {"pretrained_model_name_or_path": work / "pipeline", "output_dir": work / "results"}
    options = {**paths, **numbers, "dataset_name": "random", "mixed_precision": "no"}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def recorded(seen: Seen, start: Callable[[], int]) -> int:
    """Runs `start` with stand-ins and returns what it returns. Adds what the script did to `seen`."""
    import accelerate
    import diffusers

    # transformers looks once at what is installed, so this import comes before the stand-ins.
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401 - for the import alone

    def asked(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, diffusers.UNet2DConditionModel):
            seen.t.append(inputs[1].detach().clone())

    def answered(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, diffusers.UNet2DConditionModel):
            seen.answers.append(output[0].detach().clone())

    scheduler, backward = diffusers.DDPMScheduler, accelerate.Accelerator.backward
    add_noise, get_velocity = scheduler.add_noise, scheduler.get_velocity

    def noised(self: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Any:
        seen.targets.append(noise.detach().clone())
        return add_noise(self, latents, noise, timesteps)

    def velocity(self: Any, *args: Any) -> Any:
        # This replaces the noise of the step.
        seen.targets[-1] = get_velocity(self, *args)
        return seen.targets[-1]

    def differentiated(self: Any, loss: Tensor, **kwargs: Any) -> None:
        seen.losses.append(loss.detach().clone())
        backward(self, loss, **kwargs)

    modules = nn.modules.module
    with ExitStack() as stack:
        stack.callback(modules.register_module_forward_pre_hook(asked).remove)
        stack.callback(modules.register_module_forward_hook(answered).remove)
        stack.enter_context(mock.patch.multiple(scheduler, add_noise=noised, get_velocity=velocity))
        stack.enter_context(mock.patch.object(accelerate.Accelerator, "backward", differentiated))
        stack.enter_context(placed(stand_ins()))
        return start()


def report(policy: str, arguments: Sequence[str], seen: Seen) -> dict[str, Any]:
    """How well the timesteps fit the density, and the largest relative error of a loss against weight * mse.

    Args:
        policy: its name.
        arguments: of the script. It predicts noise or velocity and has no weights of its own.
        seen: what it did in a whole run.
    """
    schedule = NoiseSchedule.scaled_linear()
    prediction = "v" if "v_prediction" in arguments else "epsilon"
    weight = build_policy(policy, schedule, prediction).weight
    fitted = fit(tenths(policy, schedule), [(t + 0.5) / schedule.num_timesteps for t in seen.t])
    errors = [
        abs(float(loss) / float((weight[t] * mse).mean()) - 1)
        for t, mse, loss in zip(seen.t, _mse(seen), seen.losses, strict=True)
    ]
    return {**fitted, "loss_error": max(errors, default=0.0)}


def replayed(script: Path, arguments: Sequence[str], timesteps: Sequence[Tensor]) -> Seen:
    """What the script does without the launcher, if its draws return these timesteps in turn."""
    from accelerate.state import AcceleratorState

    seen, left, randint = Seen(), list(timesteps), torch.randint

    def next_draw(*args: Any, **kwargs: Any) -> Tensor:
        is_draw = args[:2] == (0, 1000) and sys._getframe(1).f_code.co_filename == str(script)
        # The script draws all the same, so that its noise is its own.
        own = randint(*args, **kwargs)
        return left.pop(0).clone() if is_draw else own

    def start() -> int:
        runpy.run_path(str(script), run_name="__main__")
        return 0

    # The launched run left a state behind.
    AcceleratorState._reset_state(True)
    with mock.patch.object(sys, "argv", [str(script), *arguments]), mock.patch("torch.randint", next_draw):
        recorded(seen, start)
    return seen


def difference(first: Seen, second: Seen) -> float:
    """The largest difference between two runs' losses in a step; infinite if their timesteps differ."""
    is_same = len(first.losses) == len(second.losses) > 0 and all(map(torch.equal, first.t, second.t))
    if not is_same:
        return float("inf")
    return float((torch.stack(first.losses) - torch.stack(second.losses)).abs().max())


def _mse(seen: Seen) -> Iterator[Tensor]:
    for answer, target in zip(seen.answers, seen.targets, strict=True):
        yield (answer.double() - target.double()).square().flatten(1).mean(1)


@contextmanager
def placed(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Puts modules into sys.modules. Unlike mock.patch.dict, it keeps what is imported meanwhile."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


if __name__ == "__main__":
    sys.exit(main())
