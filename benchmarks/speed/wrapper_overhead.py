"""What a policy adds to a DiT-S/8 training step: whole steps in turn, and each wrapper's cost by itself.

The true cost is smaller than the noise of whole steps. So each seam is also timed with a model that costs
nothing. The difference between two adjacent calls is then divided by the time of the measured step.

    python -m benchmarks.speed.wrapper_overhead [--rounds 15] [--repetitions 2000] [--threads 2]
        [--device cpu] [--checkout DIR/facebookresearch+DiT] [--report OUT.md]

Dims: B batch, T timesteps.
"""

import argparse
import importlib
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from benchmarks.peers.original_dit import CHECKOUT, load_original
from benchmarks.speed.devices import waiting
from benchmarks.spread import Spread
from speedit_plugins import NoiseSchedule, with_policy
from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.models import dit  # noqa: F401 - registers the models

MODEL = "DiT-S/8"
CHANNELS = 4
# Share of a step that a wrapper may add.
LIMIT = 0.01

Step = Callable[[], None]
# Finishes a step from its loss on.
Finish = Callable[[Tensor], None]


@dataclass(frozen=True)
class Options:
    """What to measure. All numbers are >= 1; the edge of the latents is a multiple of 8.

    `rounds` counts whole steps of each side, `repetitions` counts calls of each side of a seam. `checkout` is
    a checkout of facebookresearch/DiT; None takes this package's model and `SmallDiffusion`. On the device
    cuda a time lasts until the device has done the step or call.
    """

    rounds: int
    repetitions: int
    threads: int
    batch: int
    edge: int
    checkout: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Timings:
    """Seconds of the host alone and with a policy. The index is the round."""

    host: tuple[float, ...]
    ours: tuple[float, ...]

    @property
    def ratios(self) -> Spread:
        """Seconds with the policy / without it, within each round."""
        return Spread.of([ours / host for host, ours in zip(self.host, self.ours, strict=True)])

    @property
    def added_seconds(self) -> Spread:
        """Seconds with the policy - without it, within each round."""
        return Spread.of([ours - host for host, ours in zip(self.host, self.ours, strict=True)])


@dataclass(frozen=True)
class Results:
    """The timings of whole steps, of the host against itself, and of the seams by name."""

    steps: Timings
    control: Timings
    seams: Mapping[str, Timings]

    def share(self, timings: Timings) -> Spread:
        """What a seam adds, as a share of the host's median step."""
        return timings.added_seconds.times(1 / Spread.of(self.steps.host).median)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables. With --report it also writes them as a dated report."""
    options, path = _arguments(argv)
    torch.set_num_threads(options.threads)
    results = measure(options)
    print(tables(results))
    print(answer(results))
    if path is not None:
        path.write_text(report(results, options, date.today()), encoding="utf-8")


def measure(options: Options) -> Results:
    """Times whole steps, then a control and each seam, these with a model that costs nothing."""
    torch.manual_seed(0)
    model, create, label_name = load(options)
    shape = (options.batch, CHANNELS, options.edge, options.edge)
    model = model.to(options.device)
    x, target = torch.randn(shape).to(options.device), torch.randn(shape).to(options.device)
    label = {label_name: torch.randint(0, 1000, (options.batch,)).to(options.device)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)

    def train(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        optimizer.step()

    def whole(diffusion: Any) -> Step:
        return diffusion_step(diffusion, model, x, label, train)

    def direct(diffusion: Any) -> Step:
        return diffusion_step(diffusion, costless(wide), x, label, to_prediction(wide))

    def flow(transport: Any) -> Step:
        finish, answers = to_prediction(narrow), costless(narrow)
        return lambda: finish(transport.training_losses(answers, x)["loss"].mean())

    # The predictions with and without variance channels.
    wide = torch.randn(options.batch, 2 * CHANNELS, options.edge, options.edge)
    wide, narrow = (tensor.to(options.device).requires_grad_() for tensor in (wide, torch.randn(shape)))
    clock = waiting(options.device)
    steps = interleaved(whole(create()), whole(with_policy(create(), "speedit")), options.rounds, clock=clock)
    pairs = {
        "diffusion object, speedit": (direct(create()), direct(with_policy(create(), "speedit"))),
        "flow (transport), speed": (flow(SmallTransport()), flow(with_policy(SmallTransport(), "speed"))),
        "training script, speedit": script_steps(narrow, target),
    }
    return Results(
        steps=steps,
        control=interleaved(direct(create()), direct(create()), options.repetitions, clock=clock),
        seams={name: interleaved(*pair, options.repetitions, clock=clock) for name, pair in pairs.items()},
    )


def interleaved(
    host: Step, ours: Step, rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> Timings:
    """Times both steps in each round. One more round comes first and is not counted.

    The first round also builds the policy's tables; a training does that once. `rounds` is >= 1, and `clock`
    returns seconds.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        # A step finds the caches as the one before left them. So each side comes first in every second round.
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            start = clock()
            (host, ours)[side]()
            seconds[side].append(clock() - start)
    return Timings(tuple(seconds[0][1:]), tuple(seconds[1][1:]))


def diffusion_step(
    diffusion: Any, model: Any, x: Tensor, model_kwargs: Mapping[str, Tensor], finish: Finish
) -> Step:
    """The step of DiT's training script. Its own draw of t remains, also if a policy draws again."""

    def step() -> None:
        t = torch.randint(0, diffusion.num_timesteps, (len(x),), device=x.device)
        finish(diffusion.training_losses(model, x, t, dict(model_kwargs))["loss"].mean())

    return step


def script_steps(prediction: Tensor, target: Tensor) -> tuple[Step, Step]:
    """The two lines of a diffusers script that `ScriptPolicy` replaces, as the host has them and as ours."""
    scheduler, seam, finish = DDPMScheduler(), ScriptPolicy("speedit"), to_prediction(prediction)

    def host() -> None:
        torch.randint(0, scheduler.config.num_train_timesteps, (len(target),), device=target.device).long()
        finish(F.mse_loss(prediction.float(), target.float(), reduction="mean"))

    def ours() -> None:
        seam.timesteps(scheduler, len(target), target.device)
        finish(seam.mse_loss(prediction.float(), target.float()))

    return host, ours


def costless(prediction: Tensor) -> Callable[..., Tensor]:
    """A model that returns a prepared tensor."""
    return lambda *_, **__: prediction


def to_prediction(prediction: Tensor) -> Finish:
    """The backward pass down to the model's output. It is timed too, because a wrapper adds nodes to it."""

    def finish(loss: Tensor) -> None:
        torch.autograd.grad(loss, prediction)

    return finish


class SmallDiffusion:
    """A small version of DiT's object: `training_losses`, linear schedule, T = 1000, with learned variance.

    `vb` is the variance's part of the variational bound: the Kullback-Leibler divergence of two normal
    distributions with the same mean. Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15.
    """

    model_mean_type = "epsilon"

    def __init__(self) -> None:
        self.alphas_cumprod = NoiseSchedule.linear().alphas_cumprod
        self.num_timesteps = len(self.alphas_cumprod)
        before = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        # ln(beta / posterior variance). At index 0 it is infinite, so the value of index 1 replaces it.
        gap = ((1 - self.alphas_cumprod) / (1 - before)).log()
        gap[0] = gap[1]
        self._log_gap = gap.float()
        self._signal = self.alphas_cumprod.sqrt().float()
        self._noise = (1 - self.alphas_cumprod).sqrt().float()

    def training_losses(
        self, model: Any, x_start: Tensor, t: Tensor, model_kwargs: Any = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Per-sample mse, vb and their sum, each (B,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        rows = (-1, 1, 1, 1)
        # Tables move at each call, as those of DiT's object do.
        signal, table, gap = (each.to(t.device)[t] for each in (self._signal, self._noise, self._log_gap))
        x_t = signal.view(rows) * x_start + table.view(rows) * noise
        mean, variance = model(x_t, t, **(model_kwargs or {})).chunk(2, dim=1)
        log_ratio = (variance + 1) / 2 * gap.view(rows)
        mse = ((mean - noise) ** 2).flatten(1).mean(1)
        vb = (0.5 * (torch.exp(-log_ratio) - 1 + log_ratio)).flatten(1).mean(1)
        return {"loss": mse + vb, "mse": mse, "vb": vb}


class ICPlan:
    """The straight path from noise at t = 0 to data at t = 1, under the name that SiT gives it."""

    def compute_alpha_t(self, t: Tensor) -> tuple[Tensor, int]:
        """The factor of the data, and its derivative."""
        return t, 1

    def compute_sigma_t(self, t: Tensor) -> tuple[Tensor, int]:
        """The factor of the noise, and its derivative."""
        return 1 - t, -1


class SmallTransport:
    """A small version of SiT's transport: draws t and noise in `sample`, and predicts the velocity."""

    model_type = SimpleNamespace(name="VELOCITY")

    def __init__(self) -> None:
        self.path_sampler = ICPlan()

    def sample(self, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t (B,) in [0, 1), the noise, and x1."""
        noise = torch.randn_like(x1)
        return torch.rand(len(x1)).to(x1), noise, x1

    def training_losses(self, model: Any, x1: Tensor, model_kwargs: Any = None) -> dict[str, Tensor]:
        """The per-sample squared error of the velocity, (B,)."""
        t, x0, x1 = self.sample(x1)
        row = t.view(-1, 1, 1, 1)
        prediction = model(row * x1 + (1 - row) * x0, t, **(model_kwargs or {}))
        return {"pred": prediction, "loss": ((prediction - (x1 - x0)) ** 2).flatten(1).mean(1)}


def load(options: Options) -> tuple[nn.Module, Callable[[], Any], str]:
    """A DiT-S/8, a factory of diffusion objects for it, and the name of the model's argument for labels.

    Raises:
        ValueError: `checkout` is no checkout of facebookresearch/DiT.
    """
    checkout = options.checkout
    create: Callable[[], Any]
    if checkout is None:
        model: nn.Module = build(MODELS, {"type": MODEL, "input_size": options.edge})
        create, label = SmallDiffusion, "condition"
    elif checkout.name != CHECKOUT:
        raise ValueError(f"--checkout needs a folder named {CHECKOUT}, got {checkout.name}")
    else:
        model = load_original(checkout.parent).DiT_models[MODEL](input_size=options.edge)
        sys.path.insert(0, str(checkout))
        create, label = partial(importlib.import_module("diffusion").create_diffusion, ""), "y"
    # Some layers start at zero. Random weights keep special values out of every operation.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.train(), create, label


def tables(results: Results) -> str:
    """Two Markdown tables: whole steps, and what each seam adds."""
    host, ours, ratio = Spread.of(results.steps.host), Spread.of(results.steps.ours), results.steps.ratios
    lines = [
        f"| {MODEL} step, host alone | with speedit | ratio within a round | quartiles |",
        "|---|---|---|---|",
        f"| {host.median:.4f} s | {ours.median:.4f} s | {ratio.median:.4f} "
        f"| {ratio.low:.4f}, {ratio.high:.4f} |",
        "",
        "| seam | call, host alone | added | quartiles | share of the step | at the upper quartile |",
        "|---|---|---|---|---|---|",
    ]
    for name, timings in {"control: host against itself": results.control, **results.seams}.items():
        call, added = Spread.of(timings.host).times(1e6), timings.added_seconds.times(1e6)
        share = results.share(timings).times(100)
        lines.append(
            f"| {name} | {call.median:.0f} us | {added.median:.1f} us | {added.low:.1f}, {added.high:.1f} us "
            f"| {share.median:.4f} % | {share.high:.4f} % |"
        )
    return "\n".join(lines)


def answer(results: Results) -> str:
    """One sentence: whether every seam, at its upper quartile, adds less than `LIMIT` of the step."""
    largest = max(
        (results.share(timings) for timings in results.seams.values()), key=lambda share: share.high
    )
    return (
        f"Does each of the wrappers timed add less than {100 * LIMIT:g} % to a {MODEL} step? "
        f"{'Yes' if largest.high < LIMIT else 'No'}: the costliest adds {100 * largest.median:.4f} %, "
        f"{100 * largest.high:.4f} % at its upper quartile."
    )


def report(results: Results, options: Options, day: date) -> str:
    """The report in Markdown, with its date."""
    sizes = [f"--{name} {value}" for name, value in vars(options).items() if isinstance(value, int)]
    command = " ".join(sizes) + f" --device {options.device}" * (options.device != "cpu")
    host = "this package's model, and a small diffusion object with DiT's signatures"
    if options.checkout is not None:
        command += f" --checkout DIR/{CHECKOUT}"
        host = "model and diffusion object of facebookresearch/DiT"
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch threads: {options.threads}"
    if options.device == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    return f"""# What a policy adds to a training step

{answer(results)}

Machine: {machine}, torch {torch.__version__}, Python {platform.python_version()}.
Host: {host}. Inputs: {options.batch} x {CHANNELS} x {options.edge} x {options.edge} latents, float32.
Rounds: {options.rounds} whole steps and {options.repetitions} calls of each side. Date: {day.isoformat()}.

    python -m benchmarks.speed.wrapper_overhead {command}

{tables(results)}

Both sides of a row run in turn in one process, in alternating order, after a round that is not counted; the
first call with a policy also builds its tables, once per training. A step is the host's draw of t, forward,
loss, backward and AdamW; ratio = with the policy / without. Whole steps resolve no less than their quartiles.

A seam's cost is the difference of two adjacent calls with a model that answers a prepared tensor: the host's
draw, its loss, and the backward pass down to that tensor. The control is the diffusion object without a
policy on both sides: its distance from 0 is the error of the method. The flow is a small transport with
SiT's signatures; the script is `torch.randint` and `F.mse_loss` against `ScriptPolicy` with diffusers'
`DDPMScheduler`, by the documented edit. Shares are of the step in the first table, for every seam.
"""


def _arguments(argv: Sequence[str] | None) -> tuple[Options, Path | None]:
    """The options, and the path of the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.wrapper_overhead", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=15, help="number of timed whole steps of each side")
    parser.add_argument(
        "--repetitions", type=int, default=2000, help="number of timed calls of each side of a seam"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--edge", type=int, default=32, help="edge of the latents")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--checkout", type=Path, help=f"take model and diffusion from DIR/{CHECKOUT}")
    parser.add_argument("--report", type=Path, help="also write a dated report here")
    values = vars(parser.parse_args(argv))
    path: Path | None = values.pop("report")
    # Checked before the minutes of measuring, not after.
    if wrong := [
        f"--{name} {value}" for name, value in values.items() if isinstance(value, int) and value < 1
    ]:
        parser.error(f"wanted numbers >= 1, got {', '.join(wrong)}")
    if path is not None and not path.parent.is_dir():
        parser.error(f"--report needs an existing folder, got {path.parent}")
    return Options(**values), path


if __name__ == "__main__":
    main()
