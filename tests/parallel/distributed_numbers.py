"""Checks what two ranks compute, against one process and after a resume; run by distributed_checks.py."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from distributed_runs import (
    PLUGINS,
    alone,
    everything,
    message_of,
    steps,
    two_ranks,
    weights,
    without_key_bias,
)
from runs import small_config
from torch.testing import assert_close

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.parallel.replica import Replica
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.data_centre import centred
from speedit_plugins.trainer.training.interrupt import StopRequest

PRECISIONS = ("fp32", "bf16", "fp16")


def check_two_ranks_equal_one_process_with_both_half_batches(runtime: Runtime, folder: Path) -> None:
    reference = alone(folder, data__batch_size=8, optimizer__grad_accumulation=2)
    expected = weights(steps(reference, 20))
    for plugin in PLUGINS:
        found = weights(steps(two_ranks(runtime, folder, plugin=plugin), 20))
        if runtime.is_main:
            # float32 gradients are summed in two orders. There are 20 steps of at most lr = 1e-3 each.
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


def check_the_datas_centre_is_that_of_one_process(runtime: Runtime, folder: Path) -> None:
    config = small_config(folder, diffusion__policy="spectral", data__batch_size=32)
    # A rank reads half a batch at a time. In the end these are the same samples.
    expected = centred(replace(config, data=replace(config.data, batch_size=16)), Runtime())
    assert centred(config, runtime).diffusion.policy == expected.diffusion.policy


def check_workers_change_nothing(runtime: Runtime, folder: Path) -> None:
    found = [weights(steps(two_ranks(runtime, folder, data__num_workers=n), 3)) for n in (0, 2)]
    assert_close(found[1], found[0], rtol=0, atol=0)


def check_a_compiled_model_trains_sharded(runtime: Runtime, folder: Path) -> None:
    for plugin in ("zero2", "fsdp2"):
        found, expected = (
            weights(steps(two_ranks(runtime, folder, plugin=plugin, compile=is_compiled), 3))
            for is_compiled in (True, False)
        )
        # Fused kernels round differently. Three AdamW steps at lr = 1e-3 amplify that to less than a step.
        assert_close(found, expected, rtol=0, atol=1e-4)


def check_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runtime: Runtime, folder: Path) -> None:
    for plugin in PLUGINS:
        for precision in PRECISIONS:
            # With dropout and accumulation, because their random numbers are part of the run.
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
        # Each process has a trainer of its own, and only one of them writes.
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


def check_the_loss_scale_goes_on_under_another_plugin(runtime: Runtime, folder: Path) -> None:
    for origin, target in (("zero2", "ddp"), ("ddp", "fsdp2"), ("fsdp2", "zero1")):
        saver = steps(two_ranks(runtime, folder / origin, plugin=origin, precision="fp16"), 3)
        path = saver.save()
        trainer = two_ranks(runtime, folder / origin, plugin=target, precision="fp16")
        trainer.restore(path)
        assert trainer.engine.scaler_state() == {"scale": 2.0**16, "growth_step": 3}
        assert not trainer.optimizer_step()[0].is_skipped


def check_a_step_at_which_the_loss_scale_grows_is_as_long_as_any(runtime: Runtime, folder: Path) -> None:
    moved = {}
    for growth_step in (5, 1999):
        trainer = two_ranks(runtime, folder, plugin="zero2", precision="fp16", optimizer__max_grad_norm=0.01)
        trainer.engine.load_scaler_state({"scale": 2.0**16, "growth_step": growth_step})
        steps(trainer, 1)
        moved[growth_step] = [state["exp_avg"] for state in trainer.engine.optimizer.state.values()]
        assert trainer.engine.scaler_state()["scale"] == 2.0 ** (17 if growth_step == 1999 else 16)
    assert_close(moved[1999], moved[5], rtol=0, atol=0)


def check_ddp_without_colossalai_is_torchs_own(runtime: Runtime, folder: Path) -> None:
    options = {"data__batch_size": 8, "optimizer__grad_accumulation": 2}
    expected = weights(steps(two_ranks(runtime, folder, **options), 3))
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name == "colossalai" else find_spec(name, *more)
    try:
        trainer = two_ranks(runtime, folder, **options)
    finally:
        importlib.util.find_spec = find_spec
    assert type(trainer.engine) is Replica
    found = weights(steps(trainer, 3))
    if runtime.is_main:
        assert_close(found, expected, rtol=0, atol=0)


def check_grids_are_drawn_with_the_gathered_average(runtime: Runtime, folder: Path) -> None:
    options = {
        "sample_every": 2,
        "max_training_steps": 2,
        "precision": "bf16",
        "plugin": "zero1",
        "guidance_scale": 1.0,
    }
    two_ranks(runtime, folder, **options).fit(SilentTracker(), StopRequest())
    runtime.barrier()
    assert [path.name for path in (folder / "grids").iterdir()] == ["step_0000002.png"]


def check_measurements_are_shared_and_equal_those_of_one_process(runtime: Runtime, folder: Path) -> None:
    options = {
        "validate_every": 2,
        "data__held_out_samples": 21,
        "evaluate_every": 2,
        "evaluate_samples": 25,
        "per_proc_batch_size": 4,
        "features": "pixels@8",
        "guidance_scale": 1.0,
        "keep_best": "val_loss",
        "optimizer__lr": 1e-2,
    }
    rows = []
    for name, own, changes in (
        ("two", runtime, {}),
        (f"one_{runtime.rank}", Runtime(), {}),
        ("sharded", runtime, {"plugin": "zero2", "precision": "bf16"}),
        ("fully_sharded", runtime, {"plugin": "fsdp2"}),
    ):
        trainer = steps(two_ranks(own, folder / name, **options, **changes), 2)
        tracker = Recording()
        trainer.measure(tracker)
        rows.append(tracker.rows)
        assert trainer.best is not None
        assert trainer.best.step == 2
    two, one, sharded, fully_sharded = rows
    # Rank 0 measures the samples of all ranks; the loss is known to each of them.
    assert [sorted(row) for row in one] == [
        ["val_loss", "val_loss_per_bin"],
        ["evaluation", "evaluation_samples"],
    ]
    # Rounding of two orders of summation: in the steps, and in the sums.
    assert_close(two, one if runtime.is_main else one[:1], rtol=1e-3, atol=1e-5)
    assert_close(fully_sharded, two, rtol=1e-3, atol=1e-5)
    # bf16 has 8 bits: two steps of training and a forward pass.
    assert_close(sharded[0]["val_loss"], one[0]["val_loss"], rtol=0.03, atol=0)


class Recording(SilentTracker):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        self.rows.append(row)


def check_masters_under_bf16_are_saved_in_full(runtime: Runtime, folder: Path) -> None:
    trainer = steps(two_ranks(runtime, folder, plugin="zero2", precision="bf16"), 3)
    path = trainer.save()
    if runtime.is_main:
        saved = checkpoints.load(path).model
        name = "blocks.0.mlp.fc1.weight"
        assert saved[name].dtype == torch.float32
        # The saved weights have bits that bf16 would have rounded away.
        assert not torch.equal(saved[name], saved[name].bfloat16().float())
        assert_close(saved[name].bfloat16(), trainer.model.state_dict()[name], rtol=0, atol=0)
        # A frozen table. The plugin casts it with the model.
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
    # Each parameter is padded to an even size. Only one here is odd, the bias of a single pixel.
    for plugin in ("zero1", "zero2"):
        assert abs(held[plugin] / held["ddp"] - 0.5) < 1e-3, held
    # Whole rows without padding. The first rank has the middle one of an odd number.
    both = runtime.gather_objects(held["fsdp2"])
    assert sum(both) == held["ddp"]
    middle = [math.prod(m.shape[1:]) for m in trainer.engine.masters if m.shape[0] % 2]
    # Two moments of four bytes.
    assert both[0] - both[1] == 2 * 4 * sum(middle)


def check_copies_of_a_sharded_model_stay_equal_and_are_saved_once(runtime: Runtime, folder: Path) -> None:
    options = {"plugin": "fsdp2", "sharding__replicate": 2, "ema__halflife_steps": 3.0}
    expected = weights(steps(two_ranks(runtime, folder), 4))
    whole = steps(two_ranks(runtime, folder, **options), 4)
    assert_close(weights(whole), expected, rtol=0, atol=1e-6)
    path = steps(first := two_ranks(runtime, folder, **options), 2).save()
    resumed = two_ranks(runtime, folder, **options)
    resumed.restore(path)
    found = everything(steps(resumed, 2))
    assert_close(found, everything(whole), rtol=0, atol=0)
    for part in ("weights", "moments", "ema"):
        ours, theirs = runtime.gather_objects(found[part])
        assert_close(ours, theirs, rtol=0, atol=0)
    # Each rank has all moments, and rank 0 saves them.
    assert set(first.engine.moments(runtime)) == (set(found["moments"]) if runtime.is_main else set())
    options["sharding__replicate"] = 3
    wrong = message_of(ValueError, lambda: two_ranks(runtime, folder, **options))
    assert wrong == "sharding.replicate: wanted a divisor of the number of processes, 2, got 3"


def check_stratified_timesteps_span_the_global_batch(runtime: Runtime, folder: Path) -> None:
    policy = "{type: uniform, stratified: true}"
    trainer = two_ranks(runtime, folder, diffusion__policy=policy, optimizer__grad_accumulation=2)
    trainer.draws.begin(0)
    mine = torch.cat([trainer.draws.timesteps(number, torch.empty(0)).index for number in range(2)])
    index = torch.cat(runtime.gather_objects(mine))
    # 32 samples over 1000 equally likely timesteps: one in each 32nd part.
    assert sorted((index * 32 // 1000).tolist()) == list(range(32))


def check_metrics_are_those_of_all_ranks(runtime: Runtime, folder: Path) -> None:
    lone = steps(alone(folder), 3).window.summary()
    found = steps(two_ranks(runtime, folder), 3).window.summary(runtime.sum)
    # The sums are float64, of float32 losses that differ by rounding.
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
