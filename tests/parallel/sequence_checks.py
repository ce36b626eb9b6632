"""Checks of sequence parallelism that need several processes. test_sequence.py starts it under torchrun.

    torchrun --standalone --nproc_per_node 2 tests/parallel/sequence_checks.py OUT_FOLDER

Calls every function `check_...` that takes as many ranks as there are. Rank 0 writes results.json, as
distributed_checks.py does.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

# torchrun starts this file as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
import torch.distributed as dist
from distributed_numbers import Recording
from distributed_runs import (
    PLUGINS,
    TIMEOUT_SECONDS,
    alone,
    everything,
    message_of,
    run_checks,
    steps,
    two_ranks,
    weights,
    without_key_bias,
)
from runs import small_config
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.policies import distributed as gathering
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.layers.sequence import SequenceGroup
from speedit_plugins.trainer.models.text_conditioned.latte_t2v import LatteT2V
from speedit_plugins.trainer.models.text_conditioned.pixart import PixArt
from speedit_plugins.trainer.models.text_conditioned.text_dit import TextDiT
from speedit_plugins.trainer.parallel.runtime import Runtime, launch, sharing_samples

WIDTH, HEADS = 16, 2
Check = Callable[[Runtime, Path], None]


def drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """A model whose weights are all random: a new one passes no gradient through its blocks."""
    torch.manual_seed(0)
    model = build().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def loss_of(model: nn.Module, inputs: tuple[Any, ...], **options: Any) -> Tensor:
    """A loss that reads every value that the model returns, each with a weight of its own."""
    found = model(*inputs, **options)
    parts = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(7)
    return torch.stack(
        [(part.square() * torch.rand(part.shape, generator=generator)).mean() for part in parts]
    ).sum()


def compare(model: nn.Module, inputs: tuple[Any, ...], runtime: Runtime, **options: Any) -> SequenceGroup:
    """Compares loss and every gradient of ranks that share samples with those of one rank.

    Returns:
        The group, with its count of bytes.
    """
    whole = copy.deepcopy(model)
    expected = loss_of(whole, inputs, **options)
    expected.backward()
    group = SequenceGroup(runtime.sequence_group)
    model.sequence = group
    found = loss_of(model, inputs, **options)
    found.backward()
    everyone = runtime.gather_objects(found.item())
    assert everyone == [everyone[0]] * len(everyone)
    assert_close(found, expected, rtol=1e-6, atol=0)
    reference = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            gradient = parameter.grad.clone()
            dist.all_reduce(gradient)
            # What each engine does: the average over all ranks.
            gradient /= runtime.world_size
            # Some sums of float32 in another order.
            assert_close(
                gradient,
                reference[name].grad,
                rtol=1e-5,
                atol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    return group


def dit(**options: Any) -> nn.Module:
    return drawn(
        lambda: DiT(
            8,
            2,
            in_channels=3,
            hidden_size=WIDTH,
            depth=2,
            num_heads=HEADS,
            num_classes=5,
            class_dropout_prob=0.0,
            **options,
        )
    )


def latte(**options: Any) -> nn.Module:
    sizes = {"in_channels": 3, "hidden_size": WIDTH, "depth": 4, "num_heads": HEADS}
    return drawn(lambda: Latte(8, 2, num_frames=5, **sizes, **options))


def inputs_of(*shape: int, labels: bool = True) -> tuple[Any, ...]:
    """x (2, *shape), timesteps, and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *shape, generator=generator)
    return x, torch.tensor([3.0, 700.0]), torch.tensor([0, 4]) if labels else None


def check_two_gradients_of_a_dit(runtime: Runtime, folder: Path) -> None:
    modern = {"norm": "rms", "qk_norm": True, "rope": True, "perceptron": "swiglu"}
    compare(dit(), inputs_of(3, 8, 8), runtime)
    # 3 x 5 = 15 tokens: the last rank has one fewer.
    group = compare(dit(**modern), inputs_of(3, 6, 10), runtime, hidden_after=1)
    compare(dit(**modern, gradient_checkpointing=True), inputs_of(3, 6, 10), runtime)
    # Each block sends q, k and v of the other's heads, and its output back; as much again for gradients. The
    # rank also sends its part of the prediction and of the hidden tokens, padded to 8.
    own = 8 if runtime.rank == 0 else 7
    block = 2 * (3 * own * WIDTH // 2 + (15 - own) * WIDTH // 2)
    back = 2 * (3 * (15 - own) * WIDTH // 2 + own * WIDTH // 2)
    ends = 2 * 8 * (2 * 2 * 2 * 3 + WIDTH)
    assert group.sent_bytes == 4 * (2 * (block + back) + ends)


def check_two_gradients_of_layers_outside_of_the_split(runtime: Runtime, folder: Path) -> None:
    # The draft and its gate see no token: each rank has their whole gradient.
    sizes = {"in_channels": 3, "hidden_size": WIDTH, "depth": 2, "num_heads": HEADS}
    model = drawn(lambda: TextDiT(8, 2, text_width=6, text_length=3, draft=True, **sizes))
    x, timestep, _ = inputs_of(3, 8, 8)
    generator = torch.Generator().manual_seed(2)
    condition = {
        "tokens": torch.randn(2, 3, 6, generator=generator),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    compare(model, (x, timestep, condition), runtime)


def check_two_gradients_of_a_latte(runtime: Runtime, folder: Path) -> None:
    modern = {"qk_norm": True, "rope": True}
    compare(latte(), inputs_of(3, 5, 8, 8, labels=False), runtime)
    # 3 frames of 15 places.
    compare(latte(**modern), inputs_of(3, 3, 6, 10, labels=False), runtime, hidden_after=2)
    compare(latte(**modern, gradient_checkpointing=True), inputs_of(3, 1, 6, 10, labels=False), runtime)


def check_two_networks_of_diffusers_have_the_same_gradients(runtime: Runtime, folder: Path) -> None:
    def network(kind: type[nn.Module], **options: Any) -> nn.Module:
        sizes = {"num_layers": 2, "num_heads": HEADS, "head_dim": 8, "in_channels": 3}
        text = {"text_width": 6, "text_length": 3}
        return drawn(lambda: kind(input_size=8, **sizes, **text, **options))

    generator = torch.Generator().manual_seed(2)
    tokens, mask = torch.randn(2, 3, 6, generator=generator), torch.tensor([[True] * 3, [True, False, False]])
    # 3 x 5 = 15 tokens, in a grid other than the network's own.
    for shape, kind, options in (
        ((3, 8, 8), PixArt, {}),
        ((3, 6, 10), PixArt, {}),
        ((3, 4, 6, 10), LatteT2V, {"num_frames": 4}),
    ):
        x, timestep, _ = inputs_of(*shape)
        given = (x, timestep, {"tokens": tokens, "mask": mask})
        compare(network(kind, **options), given, runtime, hidden_after=1)
        compare(network(kind, gradient_checkpointing=True, **options), given, runtime)


def check_two_steps_are_those_of_one_process(runtime: Runtime, folder: Path) -> None:
    options = {
        "model__patch_size": 2,
        "model__class_dropout_prob": 0.3,
        "data__batch_size": 16,
        "optimizer__grad_accumulation": 2,
        "optimizer__max_grad_norm": 0.1,
        "model__gradient_checkpointing": True,
        # Made of the last two losses of each timestep. They would be one loss if each counted twice.
        "diffusion__policy": "{type: loss_second_moment, history: 2}",
        "diffusion__diffusion_steps": 25,
    }
    # The process by itself would gather what the other one learns.
    with patch.object(gathering, "num_processes", return_value=1):
        lone = steps(alone(folder, **options), 8)
    expected, density, seen = weights(lone), lone.policy.density, lone.window.summary()
    for plugin in PLUGINS:
        trainer = steps(two_ranks(runtime, folder, plugin=plugin, sequence_parallel=2, **options), 8)
        found, summary = weights(trainer), trainer.window.summary(runtime.sum)
        if runtime.is_main:
            # The same labels are dropped. Sums of float32 are in another order.
            assert_close(
                found, expected, rtol=0, atol=1e-6, msg=lambda text, plugin=plugin: f"{plugin}: {text}"
            )
        assert_close(trainer.policy.density, density, rtol=1e-4, atol=0)
        assert density.max() > density.min()
        for key in ("loss", "uniform_mse", "mse_per_bin"):
            assert_close(summary[key], seen[key], rtol=1e-4, atol=0, equal_nan=True)


def check_two_steps_with_other_losses_are_those_of_one_process(runtime: Runtime, folder: Path) -> None:
    base = {"model__patch_size": 2, "model__class_dropout_prob": 0.3, "ema__halflife_steps": 3.0}
    for options in (
        {"alignment__type": "SRA", "alignment__layer": 1, "uncertainty": True, "noise_assignment": "class"},
        {"alignment": "{type: REPA, teacher: embedded, layer: 1}"},
    ):
        expected = without_key_bias(steps(alone(folder, **base, **options), 4).averaged_weights())
        trainer = two_ranks(runtime, folder, plugin="zero2", sequence_parallel=2, **base, **options)
        found = steps(trainer, 4).averaged_weights()
        if runtime.is_main:
            assert_close(without_key_bias(found), expected, rtol=0, atol=1e-6)


def check_two_measurements_see_whole_samples(runtime: Runtime, folder: Path) -> None:
    options = {
        "model__patch_size": 2,
        "validate_every": 2,
        "data__held_out_samples": 21,
        "sample_every": 2,
        "sample_classes": "[3]",
        "evaluate_every": 2,
        "evaluate_samples": 25,
        "features": "pixels@8",
        "guidance_scale": 1.0,
        "profile_every": 2,
    }
    rows = []
    for own, changes in (
        (Runtime(), {}),
        (runtime, {"sequence_parallel": 2}),
        (runtime, {"sequence_parallel": 2, "plugin": "fsdp2"}),
    ):
        trainer = steps(two_ranks(own, folder / str(runtime.rank), **options, **changes), 2)
        profile = trainer._profile()
        assert bool(profile) == own.is_main
        tracker = Recording()
        trainer.measure(tracker)
        # It goes on with split tokens.
        steps(trainer, 1)
        rows.append([*tracker.rows, profile])
    expected, *found = rows
    if runtime.is_main:
        for each in found:
            # Rounding of two orders of summation, as for other plugins.
            assert_close(each, expected, rtol=1e-3, atol=1e-5)


def check_two_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(runtime: Runtime, folder: Path) -> None:
    for plugin, precision in (("ddp", "bf16"), ("zero2", "bf16"), ("fsdp2", "fp32")):
        options = {
            "plugin": plugin,
            "precision": precision,
            "sequence_parallel": 2,
            "model__class_dropout_prob": 0.3,
        }
        whole = steps(two_ranks(runtime, folder / plugin, **options), 4)
        path = steps(two_ranks(runtime, folder / plugin, **options), 2).save()
        resumed = two_ranks(runtime, folder / plugin, **options)
        resumed.restore(path)
        assert_close(everything(steps(resumed, 2)), everything(whole), rtol=0, atol=0)


def check_two_a_checkpoint_goes_on_with_any_size_of_groups(runtime: Runtime, folder: Path) -> None:
    expected = weights(steps(alone(folder), 4))
    for (first, before), (then, after) in (
        (("ddp", 2), ("zero2", 1)),
        (("zero1", 1), ("fsdp2", 2)),
        (("fsdp2", 2), ("ddp", 2)),
    ):
        place = folder / f"{first}_{then}"
        path = steps(two_ranks(runtime, place, plugin=first, sequence_parallel=before), 2).save()
        trainer = two_ranks(runtime, place, plugin=then, sequence_parallel=after)
        trainer.restore(path)
        found = weights(steps(trainer, 2))
        if runtime.is_main:
            assert_close(found, expected, rtol=0, atol=1e-6)


def check_four_steps_are_those_of_one_process(runtime: Runtime, folder: Path) -> None:
    options = {"model__patch_size": 2}
    expected = weights(steps(alone(folder, **options), 5))
    for plugin, more in (("ddp", {}), ("zero2", {}), ("fsdp2", {}), ("fsdp2", {"sharding__replicate": 2})):
        trainer = two_ranks(runtime, folder, plugin=plugin, sequence_parallel=2, **more, **options)
        found = weights(steps(trainer, 5))
        if runtime.is_main:
            assert_close(
                found, expected, rtol=0, atol=1e-6, msg=lambda text, plugin=plugin: f"{plugin}: {text}"
            )


def check_four_what_cannot_be_shared_is_refused(runtime: Runtime, folder: Path) -> None:
    def refused(**options: Any) -> str:
        return message_of(ValueError, lambda: two_ranks(runtime, folder, **options))

    for options, message in (
        (
            {"sequence_parallel": 3},
            "sequence_parallel: wanted a divisor of the number of processes, 4, got 3",
        ),
        (
            {"sequence_parallel": 2, "data__batch_size": 5},
            "data.batch_size counts the samples of all processes: wanted a multiple of 2 groups of 2"
            " processes, got 5",
        ),
        (
            {"data__batch_size": 6},
            "data.batch_size counts the samples of all processes: wanted a multiple of 4 processes, got 6",
        ),
    ):
        config = small_config(folder, **options)
        assert message_of(ValueError, lambda config=config: sharing_samples(runtime, config)) == message
    assert refused(sequence_parallel=4) == (
        "sequence_parallel: wanted a divisor of the model's 2 heads, which the processes share evenly, got 4"
    )
    trainer = two_ranks(runtime, folder, sequence_parallel=2, model__patch_size=8)
    assert message_of(ValueError, lambda: steps(trainer, 1)) == (
        "sequence_parallel: wanted at most as many processes as a sample has tokens, 1, got 2"
    )


def checks(world_size: int) -> dict[str, Check]:
    prefix = {2: "check_two_", 4: "check_four_"}[world_size]
    return {name: check for name, check in globals().items() if name.startswith(prefix)}


def main() -> None:
    out = Path(sys.argv[1])
    runtime = launch(small_config(out, distributed_timeout_seconds=TIMEOUT_SECONDS))
    runtime = sharing_samples(
        runtime, small_config(out, sequence_parallel=2, distributed_timeout_seconds=TIMEOUT_SECONDS)
    )
    every = checks(runtime.world_size)
    run_checks({name: every[name] for name in sys.argv[2:] or every}, runtime, out)


if __name__ == "__main__":
    main()
