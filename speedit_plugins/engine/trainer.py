"""The training loop of one process.

Dims: B batch, C channels, H x W pixels or latent cells.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speedit_plugins.core.policy import TimestepPolicy
from speedit_plugins.data.loader import NOISE_STREAM, ResumableLoader, stream_seed
from speedit_plugins.diffusion.process import GaussianProcess
from speedit_plugins.engine import checkpoint
from speedit_plugins.engine.build import Encoder
from speedit_plugins.engine.config import to_yaml
from speedit_plugins.engine.ema import Ema
from speedit_plugins.engine.interrupt import StopRequest
from speedit_plugins.engine.results import CHECKPOINTS
from speedit_plugins.engine.schema import ExperimentConfig, OptimizerConfig
from speedit_plugins.engine.tracking import LossWindow, Tracker, is_finite

DrawGrid = Callable[[Mapping[str, Tensor], int], object]


@dataclass(frozen=True)
class TrainingParts:
    """What a trainer is made of; `device` is where model, encoder and batches live."""

    model: nn.Module
    encoder: Encoder
    process: GaussianProcess
    policy: TimestepPolicy
    loader: ResumableLoader
    device: torch.device


class Trainer:
    """Trains a model step by step; everything that decides the next step is in its checkpoint.

    Args:
        parts: the objects that train, on their device.
        config: the experiment, phase train.
        draw_grid: called with the averaged weights and the step every `sample_every` steps.

    Raises:
        ValueError: `sample_every` without `draw_grid`.
    """

    def __init__(
        self, parts: TrainingParts, config: ExperimentConfig, *, draw_grid: DrawGrid | None = None
    ) -> None:
        if config.sample_every and draw_grid is None:
            raise ValueError(f"sample_every: {config.sample_every} needs draw_grid, got None")
        self.model, self.encoder = parts.model, parts.encoder
        self.process, self.policy, self.loader = parts.process, parts.policy, parts.loader
        self.config, self.device = config, parts.device
        self.folder = Path(config.experiment_dir)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, config.optimizer)
        self.ema = Ema(self.model, halflife_steps=config.ema.halflife_steps, ramp=config.ema.ramp)
        self.generator = torch.Generator(self.device).manual_seed(stream_seed(config.seed, NOISE_STREAM))
        self.window = LossWindow(self.policy, batch_size=config.data.batch_size, device=self.device)
        self.step = 0
        self._saved_step = -1
        self._draw_grid = draw_grid

    def fit(self, tracker: Tracker, stop: StopRequest) -> None:
        """Trains to `max_training_steps`, or until a stop is requested; saves either way.

        Raises:
            ValueError: the loss or a weight stopped being finite; nothing is saved then.
            CheckpointError: a checkpoint cannot be written.
        """
        self.model.train()
        last = self.config.max_training_steps
        clock, clock_step = time.perf_counter(), self.step
        while self.step < last and stop.signal_name is None:
            is_logged = (self.step + 1) % self.config.log_every == 0 or self.step + 1 == last
            grad_norm = self.optimizer_step(measured=is_logged)
            tracker.step_done()
            if is_logged:
                rate = (self.step - clock_step) / (time.perf_counter() - clock)
                clock, clock_step = time.perf_counter(), self.step
                row = {**self.window.summary(), "grad_norm": float(grad_norm), "steps_per_second": rate}
                self._check_finite(row)
                tracker.log(self.step, {**row, "lr": self.optimizer.param_groups[0]["lr"]})
            if self.step % self.config.ckpt_every == 0:
                self.save()
            # A grid takes many model calls: a pending stop does not wait for it.
            draw_grid = self._draw_grid if stop.signal_name is None else None
            if draw_grid is not None and self.step % self.config.sample_every == 0:
                draw_grid(self.ema.weights, self.step)
        if self.step != self._saved_step:
            self.save()

    def optimizer_step(self, *, measured: bool = False) -> Tensor:
        """One optimizer step over `grad_accumulation` batches.

        Args:
            measured: compute the gradient norm even where nothing is clipped.

        Returns:
            The gradient norm before clipping, a scalar; NaN where it was not computed.
        """
        options = self.config.optimizer
        self.policy.advance(self.step)
        for _ in range(options.grad_accumulation):
            self.train_step(next(self.loader), share=1 / options.grad_accumulation)
        norm = torch.tensor(math.nan)
        if options.max_grad_norm:
            norm = nn.utils.clip_grad_norm_(self.parameters, options.max_grad_norm)
        elif measured:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (self.step + 1) / max(1, options.warmup_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        return norm

    def train_step(self, batch: Mapping[str, Tensor], *, share: float = 1.0) -> None:
        """Forward and backward of one batch; its gradient counts `share`.

        Args:
            batch: "image" (B, C, H, W) in [-1, 1], and "label" (B,) int64 for a conditional model.
        """
        latents, condition = self._encode(batch)
        draw = self.policy.draw(len(latents), device=self.device, generator=self.generator)
        noised = self.process.corrupt(latents, draw, generator=self.generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            prediction = self.model(noised.x_t, noised.timestep, condition)
        terms = self.process.loss(prediction, noised, draw)
        (terms.loss.mean() * share).backward()
        # Scored by the law it was drawn from, before the policy learns from it.
        self.window.add(draw, terms)
        self.policy.update(draw.index, (terms.mse + terms.vb).detach())

    def save(self) -> Path:
        """Writes a checkpoint of this step, and returns its folder.

        Raises:
            ValueError: a weight is not finite.
            CheckpointError: it cannot be written; earlier ones are as before.
        """
        finite = [p.detach().isfinite().all() for p in self.parameters]
        if not torch.stack(finite).all():
            raise ValueError(
                f"a weight is not finite at step {self.step}: not saved; {self._last_checkpoint()}"
            )
        contents = checkpoint.Contents(
            model=self.model.state_dict(),
            ema=self.ema.state_dict(self.model),
            state={
                "step": self.step,
                "device": self.device.type,
                "diffusion": asdict(self.config.diffusion),
                "ema_updates": self.ema.num_updates,
                "optimizer": self.optimizer.state_dict(),
                "loader": self.loader.state_dict(),
                "policy": self.policy.state_dict(),
                "rng": self._rng_state(),
            },
            config=to_yaml(self.config),
        )
        path = checkpoint.save(
            self.folder / CHECKPOINTS, self.step, contents, keep_last=self.config.keep_last
        )
        self._saved_step = self.step
        return path

    def restore(self, path: Path) -> None:
        """Continues from the checkpoint folder `path`, bit for bit.

        Raises:
            CheckpointError: it is missing, damaged, or of another model, policy or dataset.
        """
        contents = checkpoint.load(path)
        state = contents.state
        try:
            _check_same_run(state, device=self.device.type, diffusion=asdict(self.config.diffusion))
            _check_shapes(contents.model, self.model.state_dict())
            self.model.load_state_dict(contents.model)
            self.ema.load(contents.ema, state["ema_updates"])
            self.optimizer.load_state_dict(state["optimizer"])
            # The state brings its own hyperparameters; the config's are those that count from here on.
            for group in self.optimizer.param_groups:
                group.update(
                    betas=self.config.optimizer.betas, weight_decay=self.config.optimizer.weight_decay
                )
            self.loader.load_state_dict(state["loader"])
            self.policy.load_state_dict(state["policy"])
            self._set_rng_state(state["rng"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise checkpoint.CheckpointError(f"checkpoint {path} is of another run: {error}") from error
        self.step = self._saved_step = state["step"]

    def _encode(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        images = batch["image"].to(self.device, non_blocking=True)
        with torch.no_grad():
            latents = self.encoder.encode(images, self.generator)
        conditional = self.config.num_classes > 0
        return latents, batch["label"].to(self.device, non_blocking=True) if conditional else None

    def _check_finite(self, row: Mapping[str, Any]) -> None:
        if not is_finite(row):
            values = ", ".join(f"{key} {row[key]}" for key in ("loss", "mse", "vb", "grad_norm"))
            raise ValueError(f"training diverged by step {self.step}: {values}; {self._last_checkpoint()}")

    def _last_checkpoint(self) -> str:
        last = checkpoint.newest(self.folder / CHECKPOINTS)
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def _rng_state(self) -> dict[str, Tensor]:
        states = {"noise": self.generator.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_rng_state(self, states: Mapping[str, Tensor]) -> None:
        self.generator.set_state(states["noise"])
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)


def _check_same_run(state: Mapping[str, Any], *, device: str, diffusion: Mapping[str, Any]) -> None:
    if state["device"] != device:
        raise ValueError(f"saved on {state['device']}, got {device}: random states do not carry over")
    for key, value in diffusion.items():
        if state["diffusion"].get(key) != value:
            raise ValueError(f"diffusion.{key} was {state['diffusion'].get(key)!r}, got {value!r}")


def _check_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (found, wanted)]
    for name in (*shapes[0], *shapes[1]):
        got, needed = (table.get(name) for table in shapes)
        if got != needed:
            raise ValueError(f"{name} has shape {got}, wanted {needed}")


def build_optimizer(parameters: list[nn.Parameter], options: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters, in torch's fused form."""
    return torch.optim.AdamW(
        parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
    )
