"""Checks that need two real processes: run under torchrun by test_distributed.py, all in one launch.

    torchrun --standalone --nproc_per_node 2 tests/distributed_checks.py OUT_FOLDER

Every function `check_...` is called on both ranks with a folder of its own; rank 0 writes results.json, a
list of failures (empty: passed) by name.
"""

import json
import math
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from runs import file_size_limit, small_config
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.engine import checkpoint, masters
from speedit_plugins.engine.checkpoint import CheckpointError
from speedit_plugins.engine.interrupt import StopRequest
from speedit_plugins.engine.runtime import Runtime, launch
from speedit_plugins.engine.tracking import SilentTracker
from speedit_plugins.engine.train import build_trainer
from speedit_plugins.engine.trainer import Trainer

PLUGINS = ("ddp", "zero1", "zero2")
PRECISIONS = ("fp32", "bf16", "fp16")
# The gradient of a key's bias is zero on paper: softmax does not see it. AdamW divides its rounding error by
# the rounding error's own size, so two orders of summation go apart there at the learning rate's pace.
KEY_BIAS = ".attn.qkv.bias"


def two_ranks(runtime: Runtime, folder: Path, **changes: Any) -> Trainer:
    options = {
        "model__class_dropout_prob": 0.0,
        "optimizer__lr": 1e-3,
        "optimizer__warmup_steps": 0,
        **changes,
    }
    return build_trainer(small_config(folder, **options), runtime)


def alone(folder: Path, **changes: Any) -> Trainer:
    """The same in each process by itself."""
    return two_ranks(Runtime(), folder, **changes)


def steps(trainer: Trainer, count: int) -> Trainer:
    trainer.engine.model.train()
    for _ in range(count):
        trainer.optimizer_step()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Whole masters on rank 0, with the key biases cut out."""
    slices = masters.owned(
        trainer.engine.masters, trainer.runtime, is_replicated=trainer.engine.is_replicated
    )
    shapes = {master.name: master.shape for master in trainer.engine.masters}
    return without_key_bias(masters.gather(slices, shapes, trainer.runtime))


def without_key_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in tensors.items():
        value = value.clone()
        if name.endswith(KEY_BIAS):
            query, key, rest = value.chunk(3)
            value = torch.cat([query, rest])
        found[name] = value
    return found


def everything(trainer: Trainer) -> dict[str, Any]:
    """All of this rank that decides the next step."""
    parts = masters.owned(trainer.engine.masters, trainer.runtime, is_replicated=trainer.engine.is_replicated)
    moments = masters.optimizer_slices(
        trainer.engine.optimizer,
        trainer.engine.masters,
        trainer.runtime,
        is_replicated=trainer.engine.is_replicated,
    )
    return {
        "weights": {name: part.values for name, part in parts.items()},
        "model": dict(trainer.model.state_dict()),
        "ema": {name: part.values for name, part in trainer.ema.slices.items()},
        "ema_updates": trainer.ema.num_updates,
        "moments": {name: part.values for name, part in moments.items()},
        "lr": trainer.engine.optimizer.param_groups[0]["lr"],
        "scaler": trainer.engine.scaler_state(),
        "step": trainer.step,
        "loader": trainer.loader.state_dict(),
        "next_batch": next(trainer.loader),
        "next_timesteps": trainer._draw_timesteps().index,
    }


def check_two_ranks_equal_one_process_with_both_half_batches(runtime: Runtime, folder: Path) -> None:
    reference = alone(folder, data__batch_size=8, optimizer__grad_accumulation=2)
    expected = weights(steps(reference, 20))
    for plugin in PLUGINS:
        found = weights(steps(two_ranks(runtime, folder, plugin=plugin), 20))
        if runtime.is_main:
            # float32, sums of gradients in two orders, 20 steps of at most lr = 1e-3 each.
            assert_close(
                found, expected, rtol=0, atol=1e-6, msg=lambda text, plugin=plugin: f"{plugin}: {text}"
            )


def check_accumulation_and_recomputation_on_two_ranks_equal_one_batch(runtime: Runtime, folder: Path) -> None:
    clipping = {"optimizer__max_grad_norm": 0.1}
    expected = weights(steps(alone(folder, **clipping), 5))
    for plugin in PLUGINS:
        options = {
            "plugin": plugin,
            "data__batch_size": 8,
            "optimizer__grad_accumulation": 2,
            "model__gradient_checkpointing": True,
            **clipping,
        }
        found = weights(steps(two_ranks(runtime, folder, **options), 5))
        if runtime.is_main:
            assert_close(
                found, expected, rtol=0, atol=1e-6, msg=lambda text, plugin=plugin: f"{plugin}: {text}"
            )


def check_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runtime: Runtime, folder: Path) -> None:
    for plugin in PLUGINS:
        for precision in PRECISIONS:
            # Dropout and accumulation too: their random numbers are part of the run.
            options = {
                "plugin": plugin,
                "precision": precision,
                "optimizer__grad_accumulation": 2,
                "optimizer__schedule": "cosine",
                "optimizer__warmup_steps": 2,
                "model__class_dropout_prob": 0.1,
            }
            place = folder / f"{plugin}_{precision}"
            whole = steps(two_ranks(runtime, place, **options), 6)
            steps(first := two_ranks(runtime, place, **options), 3)
            path = first.save()
            resumed = two_ranks(runtime, place, **options)
            resumed.restore(path)
            assert_close(
                everything(steps(resumed, 3)),
                everything(whole),
                rtol=0,
                atol=0,
                msg=lambda text, place=place: f"{place.name}: {text}",
            )


def check_any_checkpoint_goes_on_under_any_plugin_and_number_of_ranks(runtime: Runtime, folder: Path) -> None:
    expected = weights(steps(alone(folder), 8))
    for origin in (*PLUGINS, "alone"):
        place = folder / origin
        saver = alone(place) if origin == "alone" else two_ranks(runtime, place, plugin=origin)
        steps(saver, 4)
        # A lone trainer in each process: one of them writes.
        path = (
            saver.save() if origin != "alone" or runtime.is_main else place / "checkpoints" / "step_0000004"
        )
        runtime.barrier()
        for target in (*PLUGINS, "alone"):
            trainer = alone(place) if target == "alone" else two_ranks(runtime, place, plugin=target)
            trainer.restore(path)
            found = weights(steps(trainer, 4))
            if runtime.is_main:
                label = f"{origin} to {target}"
                assert_close(
                    found, expected, rtol=0, atol=1e-6, msg=lambda text, label=label: f"{label}: {text}"
                )


def check_masters_under_bf16_are_saved_in_full(runtime: Runtime, folder: Path) -> None:
    trainer = steps(two_ranks(runtime, folder, plugin="zero2", precision="bf16"), 3)
    path = trainer.save()
    if runtime.is_main:
        saved = checkpoint.load(path).model
        name = "blocks.0.mlp.fc1.weight"
        assert saved[name].dtype == torch.float32
        # What bf16 would have rounded away is there.
        assert not torch.equal(saved[name], saved[name].bfloat16().float())
        assert_close(saved[name].bfloat16(), trainer.model.state_dict()[name], rtol=0, atol=0)
        # A frozen table, which the plugin casts with the model.
        fresh = alone(folder).model.state_dict()["pos_embed"]
        assert_close(saved["pos_embed"], fresh, rtol=0, atol=0)


def check_the_average_on_shards_is_that_of_one_process(runtime: Runtime, folder: Path) -> None:
    options = {"ema__halflife_steps": 3.0}
    expected = without_key_bias(steps(alone(folder, **options), 10).averaged_weights())
    for plugin in PLUGINS:
        found = steps(two_ranks(runtime, folder, plugin=plugin, **options), 10).averaged_weights()
        if runtime.is_main:
            assert_close(without_key_bias(found), expected, rtol=0, atol=1e-6)
            assert all(value.dtype == torch.float32 for value in found.values())


def check_zero_shards_the_optimizer(runtime: Runtime, folder: Path) -> None:
    held = {}
    for plugin in PLUGINS:
        trainer = steps(two_ranks(runtime, folder, plugin=plugin), 1)
        state = trainer.engine.optimizer.state.values()
        held[plugin] = sum(value.nbytes for entry in state for value in entry.values() if value.ndim)
    # Each parameter is padded to an even size, and none here is odd but the one of one pixel's bias.
    for plugin in ("zero1", "zero2"):
        assert abs(held[plugin] / held["ddp"] - 0.5) < 1e-3, held


def check_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(runtime: Runtime, folder: Path) -> None:
    for plugin in PLUGINS:
        trainer = steps(two_ranks(runtime, folder / plugin, plugin=plugin, max_skipped_steps=3), 2)
        good = trainer.save()
        before = everything(trainer)
        with poisoned(trainer, only_rank=1):
            result, _ = trainer.optimizer_step()
            assert result.is_skipped
            after = everything(trainer)
            for part in ("weights", "model", "ema", "ema_updates", "moments"):
                assert_close(after[part], before[part], rtol=0, atol=0)
            assert (trainer.step, trainer.num_skipped) == (3, 1)
            trainer.optimizer_step()
            wanted = (
                "3 steps in a row up to 5 were skipped, the last because a loss on rank 1 is not finite;"
                f" the last good checkpoint is {good}"
            )
            assert wanted in message_of(ValueError, trainer.optimizer_step)
        # One good step in between begins a new count.
        result, _ = trainer.optimizer_step()
        assert not result.is_skipped
        assert trainer._num_skipped_in_a_row == 0


def check_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    runtime: Runtime, folder: Path
) -> None:
    for plugin in PLUGINS:
        trainer = steps(two_ranks(runtime, folder / plugin, plugin=plugin), 1)
        before = everything(trainer)
        parameter = trainer.model.blocks[0].mlp.fc1.weight
        handle = parameter.register_hook(lambda grad: grad * (math.nan if runtime.rank == 1 else 1))
        result, _ = trainer.optimizer_step()
        handle.remove()
        assert result.is_skipped, plugin
        after = everything(trainer)
        for part in ("weights", "model", "ema", "moments"):
            assert_close(after[part], before[part], rtol=0, atol=0)
        assert not trainer.optimizer_step()[0].is_skipped


def check_a_stop_asked_of_one_rank_stops_all_at_the_same_step(runtime: Runtime, folder: Path) -> None:
    trainer = two_ranks(runtime, folder, max_training_steps=1000)
    stop = StopRequest()
    if runtime.rank == 1:
        trainer.loader = Asking(trainer.loader, stop, after=3)  # type: ignore[assignment]  # stands in for one
    trainer.fit(SilentTracker(), stop)
    assert runtime.gather_objects(trainer.step) == [3, 3]
    assert checkpoint.newest(folder / "checkpoints") == folder / "checkpoints" / "step_0000003"


def check_stratified_timesteps_span_the_global_batch(runtime: Runtime, folder: Path) -> None:
    policy = "{type: uniform, stratified: true}"
    trainer = two_ranks(runtime, folder, diffusion__policy=policy, optimizer__grad_accumulation=2)
    whole = trainer._draw_timesteps()
    mine = torch.cat([trainer._rows(whole, number).index for number in range(2)])
    index = torch.cat(runtime.gather_objects(mine))
    # 32 samples of 1000 equally likely timesteps: one in each 32nd part.
    assert sorted((index * 32 // 1000).tolist()) == list(range(32))


def check_metrics_are_those_of_all_ranks(runtime: Runtime, folder: Path) -> None:
    lone = steps(alone(folder), 3).window.summary()
    found = steps(two_ranks(runtime, folder), 3).window.summary(runtime.sum)
    # float64 sums of float32 losses that differ by rounding.
    for key in ("loss", "mse", "vb", "uniform_mse"):
        assert_close(found[key], lone[key], rtol=1e-5, atol=0)
    assert_close(found["mse_per_bin"], lone["mse_per_bin"], rtol=1e-5, atol=0)


def check_a_learning_policy_is_the_same_on_all_ranks(runtime: Runtime, folder: Path) -> None:
    options = {
        "diffusion__policy": "{type: loss_second_moment, history: 1}",
        "diffusion__diffusion_steps": 25,
        "data__batch_size": 256,
    }
    trainer = steps(two_ranks(runtime, folder, **options), 2)
    densities = runtime.gather_objects(trainer.policy.density)
    assert torch.equal(densities[0], densities[1])
    assert float(densities[0].max() - densities[0].min()) > 0


def check_a_full_disk_under_one_rank_fails_the_save_on_all_and_keeps_the_last(
    runtime: Runtime, folder: Path
) -> None:
    trainer = steps(two_ranks(runtime, folder, plugin="zero2"), 1)
    good = trainer.save()
    steps(trainer, 1)
    with file_size_limit(10_000 if runtime.rank == 1 else resource.RLIM_INFINITY):
        message = message_of(CheckpointError, trainer.save)
    assert "step_0000002 on rank 1: " in message
    assert f"the last checkpoint is {good}" in message
    runtime.barrier()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000001"]
    assert checkpoint.damage(good, runtime) is None
    # The run itself can go on, and save when there is room again.
    assert steps(trainer, 1).save().name == "step_0000003"


def check_a_folder_that_cannot_be_written_fails_on_all(runtime: Runtime, folder: Path) -> None:
    trainer = two_ranks(runtime, Path("/proc/nowhere"))
    assert "cannot write checkpoint /proc/nowhere" in message_of(CheckpointError, trainer.save)


def check_a_batch_that_ranks_cannot_share_is_refused(runtime: Runtime, folder: Path) -> None:
    config = small_config(folder)
    message = message_of(
        ValueError, lambda: launch(replace(config, data=replace(config.data, batch_size=15)))
    )
    assert "wanted a multiple of 2 processes, got 15" in message


class Asking:
    """A loader in whose batch number `after` a signal arrives."""

    def __init__(self, loader: Any, stop: StopRequest, *, after: int) -> None:
        self._loader, self._stop, self._left = loader, stop, after

    def __next__(self) -> Any:
        self._left -= 1
        if self._left == 0:
            self._stop.signal_name = "SIGTERM"
        return next(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


@contextmanager
def poisoned(trainer: Trainer, *, only_rank: int) -> Iterator[None]:
    encode = trainer.encoder.encode
    factor = math.nan if trainer.runtime.rank == only_rank else 1.0
    trainer.encoder.encode = lambda images, generators: encode(images, generators) * factor  # type: ignore[method-assign]  # for the test
    try:
        yield
    finally:
        trainer.encoder.encode = encode  # type: ignore[method-assign]  # as it was


def message_of(kind: type[Exception], action: Callable[[], Any]) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def main() -> None:
    out = Path(sys.argv[1])
    wanted = sys.argv[2:]
    runtime = launch(small_config(out))
    checks = {name: item for name, item in globals().items() if name.startswith("check_")}
    results = {}
    for name, check in checks.items():
        if wanted and name not in wanted:
            continue
        failure = ""
        try:
            check(runtime, out / name)
        except Exception:
            failure = traceback.format_exc()
        failures = runtime.gather_objects(failure)
        results[name] = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
    if runtime.is_main:
        (out / "results.json").write_text(json.dumps(results, indent=1))
    runtime.close()


if __name__ == "__main__":
    main()
