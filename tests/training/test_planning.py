"""What a dry run says of the ranks of a training."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import small_config

from speedit_plugins.trainer.parallel.plan import PLANS
from speedit_plugins.trainer.training.dry_run import describe
from speedit_plugins.trainer.training.planning import Passes, RankPlan, plan_lines, size

UNITS = {"MiB": 2**20, "GiB": 2**30}


def said(
    folder: Path, processes: int | None = None, gpu_memory: int | None = None, **changes: Any
) -> dict[str, str]:
    plan = RankPlan(small_config(folder, **changes), processes)
    return {name.strip(): text for name, text in plan_lines(plan, gpu_memory)}


def num_bytes(text: str) -> float:
    number, unit = re.search(r"([\d.]+) (MiB|GiB)", text).groups()  # type: ignore[union-attr]  # it matches
    return float(number) * UNITS[unit]


def test_the_parts_add_up_to_at_most_the_whole(tmp_path: Path) -> None:
    found = said(tmp_path, 4, plugin="zero2", precision="bf16", model__hidden_size=256)
    assert found["memory of a rank"] == "4 processes, zero2, bf16, 4 samples at a time"
    parts = ("weights", "masters", "moments", "averages")
    held = sum(num_bytes(found[part]) for part in parts)
    more = [num_bytes(found[part]) for part in ("gradients", "buffers", "activations")]
    # Each was rounded to 0.1 MiB.
    assert held + max(more) <= num_bytes(found["in all"]) + 2**20
    assert num_bytes(found["in all"]) <= held + sum(more) + 2**20
    assert found["moments"].endswith("MiB, AdamW")
    sent = [found[kind] for kind in ("reduce-scatter", "all-gather")]
    assert all(text.endswith(", bf16, among 4 ranks") for text in sent)
    assert "teacher" not in found
    assert "sent by a rank" not in said(tmp_path)


def test_both_kinds_of_activations_are_said(tmp_path: Path) -> None:
    kept, again = (
        said(tmp_path, model__gradient_checkpointing=value)["activations"] for value in (False, True)
    )
    assert re.fullmatch(r".* MiB; .* MiB with model\.gradient_checkpointing=true", kept)
    assert re.fullmatch(
        r".* MiB and .* MiB while a block computes again; .* with model\.gradient_checkpointing=false", again
    )
    # The same two numbers, each in its place.
    assert num_bytes(kept.split(";")[0]) == num_bytes(again.split(";")[1])


def test_a_plugin_fits_or_says_why_not(tmp_path: Path) -> None:
    wide = {"model__hidden_size": 384, "plugin": "fsdp2"}
    plans = RankPlan(small_config(tmp_path, **wide), 8)
    needs = {
        name: plans.plan(name).memory.peak(plans.passes(name, is_checkpointed=False).peak(2))
        for name in ("ddp", "zero1", "fsdp2")
    }
    assert needs["fsdp2"] < needs["zero1"] < needs["ddp"]
    assert said(tmp_path, 8, needs["ddp"] - 1, **wide)["ddp"].startswith("too large: ")
    found = said(tmp_path, 8, needs["ddp"], **wide)
    # The plan's own batch is the largest, in 8 processes of 2 samples.
    assert re.match(r"fits: .* MiB, data\.batch_size up to 16, sends ", found["ddp"])
    again = said(tmp_path, 8, needs["ddp"], **wide, model__gradient_checkpointing=True)
    sends = size(sum(each.sent for each in plans.plan("ddp").transfers))
    line = rf"fits: .*, sends {re.escape(sends)} in a step; fits without gradient_checkpointing: .* up to 16"
    assert re.fullmatch(line, again["ddp"])
    assert found["zero1"].startswith("fits: ")
    assert found["gemini"] == "left out: plugin: gemini trains in bf16 or fp16, got precision: fp32"
    assert set(PLANS) <= set(found)
    small = said(tmp_path, 8, 2**20, **wide)
    assert small["fsdp2"].startswith("too large: ")
    assert "no batch fits" in small["fsdp2"]


def test_plugins_that_the_optimizer_does_not_go_with_are_left_out(tmp_path: Path) -> None:
    found = said(tmp_path, 2, 2**30, optimizer__type="Adafactor")
    assert found["ddp"].startswith("fits: ")
    assert all(found[name].startswith("left out: ") for name in PLANS if name != "ddp")
    assert "Adafactor" in found["fsdp2"]


@pytest.mark.parametrize(
    ("processes", "changes", "message"),
    [
        (
            3,
            {},
            "data.batch_size counts the samples of all processes: wanted a multiple of 3 processes, got 16",
        ),
        (
            4,
            {"plugin": "fsdp2", "sharding__replicate": 3},
            r"sharding\.replicate: wanted a divisor of the number of processes, 4, got 3",
        ),
    ],
)
def test_processes_that_the_training_refuses_are_refused(
    tmp_path: Path, processes: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        describe(small_config(tmp_path, **changes), processes=processes)


def test_groups_of_processes_are_named(tmp_path: Path) -> None:
    found = said(tmp_path, 4, plugin="fsdp2", sharding__replicate=2)
    assert found["memory of a rank"] == "4 processes in 2 groups, fsdp2, fp32, 4 samples at a time"
    assert found["all-reduce"].endswith("gradients, float32, between groups, among 2 ranks")


def test_shared_samples_are_counted_by_their_part_of_the_tokens(tmp_path: Path) -> None:
    config = small_config(tmp_path, model__hidden_size=64)
    alone, shared = RankPlan(config, 4), RankPlan(config, 4)
    # As a config with `sequence_parallel: 2`.
    shared.sequence_size, shared.num_samples = 2, 2 * alone.num_samples
    one, two = (plan.passes("ddp", is_checkpointed=False).peak(plan.num_samples) for plan in (alone, shared))
    # What comes out of the two attentions is kept twice.
    assert two == pytest.approx(one + 2 * 4 * 64 * 4 * 8 // 2, rel=1e-3)
    (tokens,) = (each for each in shared.plan("ddp").transfers if each.kind == "all-to-all")
    # Two attentions of 4 tokens of 64 float32 numbers: queries, keys, values and what comes out, forward and
    # backward, of 8 samples. A rank has half of the tokens and keeps half of these.
    assert tokens.sent == 2 * 4 * 64 * 4 * 4 * 2 * 8 // 2 // 2


def test_blocks_across_frames_exchange_nothing(tmp_path: Path) -> None:
    model = {"type": "Latte", "num_frames": 2, "hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 4}
    options = {"model": str(model), "num_frames": 2, "data__dataset": "MovingDigits", "sequence_parallel": 2}
    plan = RankPlan(small_config(tmp_path, **options))
    assert plan.processes == 2
    (tokens,) = (each for each in plan.plan("ddp").transfers if each.kind == "all-to-all")
    # The block within the frames alone: of 2 x 4 tokens, as above, of 16 samples.
    assert tokens.sent == 2 * 4 * 64 * 4 * 4 * 2 * 16 // 2 // 2


def test_a_model_without_condition_is_planned(tmp_path: Path) -> None:
    assert num_bytes(said(tmp_path, num_classes=0)["activations"]) > 0


def test_the_largest_batch_is_where_the_line_meets_the_memory() -> None:
    passes = Passes(100.0, 10.0, ((50.0, 5.0),))
    assert passes.kept(4) == 140
    assert passes.peak(4) == 210
    assert [passes.most_samples(size) for size in (164, 165, 209, 210)] == [0, 1, 3, 4]
    # Few samples are outweighed by what does not grow with them, many are not.
    both = Passes(100.0, 10.0, ((0.0, 5.0), (20.0, 0.0)))
    assert [both.peak(count) for count in (2, 4, 6)] == [140, 160, 190]
    assert [both.most_samples(size) for size in (140, 160, 190)] == [2, 4, 6]


def test_two_averages_are_counted_twice(tmp_path: Path) -> None:
    plan = RankPlan(small_config(tmp_path, ema="power"))
    once = replace(plan.training, num_averages=1)
    assert plan.plan("ddp").memory.averages == 2 * PLANS["ddp"](once, 1, 1).memory.averages
    assert said(tmp_path, ema="power")["averages"].endswith("MiB, 2 of the weights")
