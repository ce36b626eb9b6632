"""The training loop of one rank.

Dims: B samples of this rank in a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.accelerations.objective import Objective
from speedit_plugins.trainer.checkpoints.best import Best, is_better, read_best
from speedit_plugins.trainer.config.loading import to_yaml
from speedit_plugins.trainer.config.same_run import check_same_run
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.diffusion.gaussian_process import LossTerms
from speedit_plugins.trainer.inputs import BatchEncoder
from speedit_plugins.trainer.logging.step_timer import StepTimer
from speedit_plugins.trainer.logging.timestep_profile import TimestepProfiler
from speedit_plugins.trainer.logging.tracking import LossWindow, Tracker, peak_memory_bytes
from speedit_plugins.trainer.models import lora
from speedit_plugins.trainer.models.interface import num_tokens
from speedit_plugins.trainer.parallel import master_weights
from speedit_plugins.trainer.parallel.replica import Engine, StepResult
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.averages.ema import build_average
from speedit_plugins.trainer.training.averages.snapshots import check_no_snapshots, write_snapshot
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.learning_rate import learning_rate
from speedit_plugins.trainer.training.periodic import Periodic, Snapshot, take
from speedit_plugins.trainer.training.products.choice import restore_products, saved_products
from speedit_plugins.trainer.training.saving.held import Held
from speedit_plugins.trainer.training.saving.resuming import restore_average, restore_optimizer
from speedit_plugins.trainer.training.saving.saved_state import checked_state, load_part
from speedit_plugins.trainer.training.saving.saved_weights import check_finite, hold_weights
from speedit_plugins.trainer.training.saving.saves import build_saves
from speedit_plugins.trainer.training.step_batches import StepBatches
from speedit_plugins.trainer.training.step_draws import StepDraws

# Keys whose measurement the trainer is given.
MEASURED = ("sample_every", "validate_every", "evaluate_every")


@dataclass(frozen=True)
class TrainingParts:
    """The objects that a trainer uses, all on the runtime's device.

    `mfu` maps samples per second to model FLOPs utilisation; None if the device's peak is unknown. `profiler`
    is needed on rank 0 for `profile_every`.
    """

    engine: Engine
    inputs: BatchEncoder
    objective: Objective
    policy: TimestepPolicy
    loader: ResumableLoader
    runtime: Runtime
    mfu: Callable[[float], float] | None = None
    profiler: TimestepProfiler | None = None


class Trainer:
    """Trains a model step by step. Its checkpoint has everything that decides the next step.

    Data order, timesteps and noise are functions of the seed, the step and the sample's position in the
    step's global batch. So a resumed run continues as an uninterrupted one would, on any number of ranks.
    Label dropout and the tokens of a route are functions of seed, step and rank. Accelerations that pair
    samples of a rank's batch depend on the number of ranks. Ranks that share samples count as one.

    Args:
        parts: the objects that the trainer uses.
        config: the experiment, checked for the phase train.
        periodic: what is measured every so many steps: one for each key of `MEASURED` that is not 0.

    Raises:
        ValueError: such a key without its measurement, or `profile_every` without a profiler.
    """

    def __init__(
        self, parts: TrainingParts, config: ExperimentConfig, *, periodic: Sequence[Periodic] = ()
    ) -> None:
        for key in MEASURED:
            if getattr(config, key) and key not in {each.key for each in periodic}:
                raise ValueError(f"{key}: {getattr(config, key)} needs its measurement, got none")
        if config.profile_every and parts.runtime.is_main and parts.profiler is None:
            raise ValueError(f"profile_every: {config.profile_every} needs a profiler, got None")
        self.engine, self.inputs, self.runtime = parts.engine, parts.inputs, parts.runtime
        self.objective, self.policy, self.loader = parts.objective, parts.policy, parts.loader
        self.config, self.device = config, parts.runtime.device
        self.model = self.engine.module
        self.folder = Path(config.experiment_dir)
        self.batch_size = config.data.batch_size * config.optimizer.grad_accumulation
        self._slices = master_weights.owned(self.engine.masters, self.runtime)
        self._shapes = {master.name: master.shape for master in self.engine.masters}
        self.ema = build_average(config.ema, self._slices)
        self.window = LossWindow(self.policy, batch_size=self.batch_size, device=self.device)
        self.timer = StepTimer(self.device)
        self.step = 0
        self.num_skipped = 0
        self._num_skipped_in_a_row = 0
        self._num_tokens = 0
        self._batches = StepBatches(self.runtime)
        self.saves = build_saves(config, self.runtime)
        self.periodic, self._mfu, self.profiler = tuple(periodic), parts.mfu, parts.profiler
        self.best: Best | None = None
        self.draws = StepDraws(config, self.runtime, self.policy)

    def fit(self, tracker: Tracker, stop: StopRequest) -> None:
        """Trains to `max_training_steps`, or until a rank is asked to stop. Both end with a checkpoint.

        Raises:
            ValueError: too many steps in a row were skipped. Nothing is saved then.
            DataError: a batch cannot be read; `save` then writes the last whole step.
            CheckpointError: a checkpoint cannot be written.
        """
        try:
            self._run_steps(tracker, stop)
            if self.step != self.saves.step:
                self.save()
            self.saves.wait()
        finally:
            self.saves.settle()

    def _run_steps(self, tracker: Tracker, stop: StopRequest) -> None:
        self.engine.model.train()
        if self.step == 0 and self.config.ema.snapshot_every:
            check_no_snapshots(self.folder)
        last = self.config.max_training_steps
        is_stopping = False
        while self.step < last and not is_stopping:
            result, is_stopping = self.optimizer_step(stop)
            if is_stopping and self.runtime.is_main:
                say(stop.line(self.step))
            tracker.step_done()
            if self.step % self.config.log_every == 0 or self.step == last:
                self._log(tracker, result)
            if self.step % self.config.ckpt_every == 0:
                self.save()
            if self.config.ema.snapshot_every and self.step % self.config.ema.snapshot_every == 0:
                write_snapshot(self.folder, self.step, self.ema, self._shapes, self.runtime)
            # It takes many model calls, so a pending stop does not wait for it.
            if not is_stopping:
                self.measure(tracker)

    def optimizer_step(self, stop: StopRequest | None = None) -> tuple[StepResult, bool]:
        """Makes one optimizer step over `grad_accumulation` batches.

        If a loss or the gradient norm is not finite on any rank, all ranks skip the step.

        Returns:
            The step's result, and whether any rank was asked to stop.

        Raises:
            ValueError: `max_skipped_steps` steps in a row were skipped.
            DataError: a batch cannot be read, on any rank. The step does not count.
            CheckpointError: a save in the background failed, on any rank. The step does not count.
        """
        self.policy.advance(self.step)
        self.objective.advance(self.step)
        self.draws.begin(self.step)
        self._num_tokens = 0
        seen: list[tuple[TimestepDraw, LossTerms]] = []
        num_batches = self.config.optimizer.grad_accumulation
        self._batches.begin(self.loader)
        for number in range(num_batches):
            with self.timer.phase("data"):
                batch = self._batches.next(self.loader)
            with self.engine.micro_batch(is_last=number + 1 == num_batches):
                seen.append(self.train_step(batch, number))
        with self.timer.phase("optimizer"):
            is_finite = torch.stack([terms.loss.detach().sum() for _, terms in seen]).isfinite().all()
            is_asked = stop is not None and stop.signal_name is not None
            own = [-1 if is_finite else self.runtime.rank, float(is_asked), self._batches.broken_rank]
            bad_rank, is_any_asked, broken_rank, is_unsaved = self.runtime.maximum(
                [*own, float(self.saves.has_failed)]
            )
            self._batches.end(int(broken_rank))
            if is_unsaved:
                self.saves.raise_failure()
            lr = learning_rate(self.config.optimizer, self.step, self.config.max_training_steps)
            result = self.engine.step(lr, is_healthy=bad_rank < 0)
        self.step += 1
        if result.is_skipped:
            self._count_skipped("the gradient norm" if bad_rank < 0 else f"a loss on rank {bad_rank:.0f}")
        else:
            self._learn(seen)
        self.timer.step_done(num_samples=self.batch_size, num_tokens=self._num_tokens)
        return result, bool(is_any_asked)

    def train_step(self, batch: Mapping[str, Tensor], number: int) -> tuple[TimestepDraw, LossTerms]:
        """Runs forward and backward of one batch. Returns its draw, and the losses per sample.

        Args:
            batch: a batch of the loader, see `BatchEncoder.encode`.
            number: of the batch in the step, from 0.
        """
        self.draws.seed(number)
        with self.timer.phase("encode"):
            given = self.inputs.encode(batch, self.draws.generators)
            self._num_tokens += num_tokens(self.model, given.latents) * self.runtime.data_size
        draw = self.draws.timesteps(number, given.latents)
        with self.timer.phase("forward"):
            terms = self.objective.losses(given, draw)
        with self.timer.phase("backward"):
            self.engine.backward(terms.loss.mean() / self.config.optimizer.grad_accumulation)
        return draw, terms

    def measure(self, tracker: Tracker) -> None:
        """Takes the measurements that are due at this step, and keeps the checkpoint if it is the best.

        Collective.
        """
        due = [each for each in self.periodic if self.step % each.every == 0]
        if due:
            gather, others = self.averaged_weights, self.engine.untrained()
            snapshot = Snapshot(self.step, gather, self._shapes, others, self.runtime)
            scores = take(due, snapshot, tracker, self.runtime)
            score = self.config.keep_best
            if score is not None and is_better(scores, self.best, score):
                # The best so far is kept until the new one is there.
                if self.step != self.saves.step:
                    self.save()
                self.best = self.saves.note_best(self.step, score, scores[score])

    def weights(self) -> dict[str, Tensor]:
        """Every trained parameter on rank 0, where it is evaluated; nothing on other ranks. Collective."""
        with self.engine.evaluation_point() as is_moved:
            found = master_weights.gather(self._slices, self._shapes, self.runtime)
            return {name: value.clone() for name, value in found.items()} if is_moved else found

    def averaged_weights(self) -> dict[str, Tensor]:
        """The EMA of every trained parameter on rank 0, nothing on other ranks. Collective.

        The weights themselves, if no average is kept.
        """
        if not self.ema.slices:
            return self.weights()
        return master_weights.gather(self.ema.slices, self._shapes, self.runtime)

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder. Collective.

        With `async_save` it returns when the checkpoint is begun, see `BackgroundSaves`.

        Raises:
            ValueError: a weight is not finite.
            CheckpointError: it cannot be written, or the one before it. Earlier ones stay as they were.
        """
        self.saves.wait()
        check_finite(self._slices, self.runtime, f"at step {self.step}: not saved; {self.saves.last_line()}")
        held = Held(
            step=self.step,
            weights=hold_weights(self.engine, self._slices, self.ema, self._shapes),
            moments=self.engine.moments(self.runtime),
            state={
                "optimizer": self.engine.optimizer_state(),
                "step": self.step,
                "num_skipped": self.num_skipped,
                "ema_updates": self.ema.num_updates,
                "loader": self._batches.position(self.loader),
                "policy": self.policy.state_dict(),
                "accelerations": self.objective.state_dict(),
                "scaler": self.engine.scaler_state(),
                "products": saved_products(self.model),
            },
            config=to_yaml(self.config),
            classes=tuple(getattr(self.loader.dataset, "classes", ())),
            normalization=getattr(self.loader.dataset, "normalization", None),
        )
        return self.saves.save(held)

    def restore(self, path: Path) -> None:
        """Continues from the checkpoint folder `path`, to the bit if as many ranks wrote it.

        Raises:
            CheckpointError: it is missing or damaged, or has another model, policy, encoder or dataset.
        """
        saved = checkpoints.load(path)
        state = checked_state(saved.state, path)
        try:
            # Both in the form in which they are saved: secrets redacted, lists for tuples.
            was = yaml.safe_load(saved.config)
            check_same_run(was, yaml.safe_load(to_yaml(self.config)))
            lora.check_resumed(self.model, saved.model, self.engine.untrained(), path / checkpoints.MODEL)
            self.engine.load_weights(saved.model)
            restore_average(self.ema, saved, was, self.config, self.runtime)
            restore_optimizer(self.engine, saved, was, self.config, self.runtime)
            load_part("scaler", state, self.engine.scaler_state(), self.engine.load_scaler_state)
            load_part("loader", state, self.loader.state_dict(), self.loader.load_state_dict)
            load_part("policy", state, self.policy.state_dict(), self.policy.load_state_dict)
            if "accelerations" in state:
                own, load = self.objective.state_dict(), self.objective.load_state_dict
                load_part("accelerations", state, own, load)
        except (KeyError, ValueError, RuntimeError) as error:
            raise checkpoints.CheckpointError(f"checkpoint {path} is of another run: {error}") from error
        # Checkpoints of before this choice have none: torch's products.
        restore_products(self.model, state.get("products", {}), self.runtime)
        self.step = self.saves.step = state["step"]
        self.saves.last = path
        self.num_skipped = state["num_skipped"]
        best = read_best(self.saves.folder, self.config.keep_best, up_to=self.step)
        # What rank 0 sees counts: all ranks save together.
        self.best = self.runtime.gather_objects(best)[0]

    def _learn(self, seen: list[tuple[TimestepDraw, LossTerms]]) -> None:
        """Updates EMA, metrics and policy after a step that moved the weights."""
        self._num_skipped_in_a_row = 0
        self.objective.after_step()
        with self.timer.phase("ema"):
            if self.ema.slices:
                with self.engine.evaluation_point():
                    self.ema.update()
        for draw, terms in seen if self.runtime.counts_samples else ():
            # Before the policy learns from the losses: they are corrected by the density that drew them.
            self.window.add(draw, terms)
        index = torch.cat([draw.index for draw, _ in seen])
        losses = torch.cat([(terms.mse + terms.vb).detach() for _, terms in seen])
        num_counted = len(index) if self.runtime.counts_samples else 0
        self.policy.update(index[:num_counted], losses[:num_counted])

    def _count_skipped(self, culprit: str) -> None:
        self.num_skipped += 1
        self._num_skipped_in_a_row += 1
        if self.runtime.is_main:
            say(f"step {self.step} skipped: {culprit} is not finite ({self.num_skipped} skipped so far)")
        if self._num_skipped_in_a_row >= self.config.max_skipped_steps:
            raise ValueError(
                f"training diverged: {self._num_skipped_in_a_row} steps in a row up to {self.step} were"
                f" skipped, the last because {culprit} is not finite; {self.saves.last_line()}"
            )

    def _log(self, tracker: Tracker, result: StepResult) -> None:
        losses = self.window.summary(self.runtime.sum)
        pace = self.timer.summary()
        memory = self.runtime.maximum([float(peak_memory_bytes(self.device))])[0]
        row: dict[str, Any] = {
            **losses,
            "grad_norm": result.grad_norm,
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.num_skipped,
            **pace,
            "peak_memory_bytes": int(memory),
        }
        if self.inputs.num_cut_captions is not None:
            row["cut_captions"] = self.inputs.num_cut_captions
        if self._mfu is not None:
            row["mfu"] = self._mfu(pace["samples_per_second"])
        # The first logged step at or after a multiple of profile_every.
        every = self.config.profile_every
        if every and self.step % every < self.config.log_every:
            row |= self._profile()
        tracker.log(self.step, row)

    def _profile(self) -> dict[str, Any]:
        weights, others = self.weights(), self.engine.untrained()
        if self.profiler is None:
            return {}
        profile = asdict(self.profiler.measure(weights, others))
        return {f"profile_{name}": values for name, values in profile.items()}
