"""The names of inference's results, and samples drawn in batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import arguments, small_config, small_trainer
from safetensors.torch import save_file
from torch import Tensor

from speedit_plugins.cli import main
from speedit_plugins.trainer.build import build_process
from speedit_plugins.trainer.evaluation.npz import read_npz
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.sampling import inference
from speedit_plugins.trainer.sampling.conditions import all_conditions, grid_conditions, random_rows
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.grids import draw_grid
from speedit_plugins.trainer.sampling.inpainting.inpaint import draw_fills


def generator_of(folder: Path, **changes: Any) -> SampleGenerator:
    """A generator with an untrained model. Its last layer is not zero: samples depend on class and noise."""
    config = small_config(folder, "sample", **changes)
    trainer = small_trainer(folder, **{k: v for k, v in changes.items() if not k.startswith("inpaint_")})
    seeded = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(trainer.model.final_layer.linear.weight, std=0.1, generator=seeded)
    process = build_process(config, respaced=False)
    return SampleGenerator(trainer.model, process, trainer.inputs.encoder, config)


def infer(folder: Path, **changes: Any) -> int:
    options = {"num_samples": 3, "per_proc_batch_size": 2, **changes}
    return main(["-c", "configs/image/digits/speedit.yaml", "-p", "inference", *arguments(folder, **options)])


def save_weights(folder: Path, seed: int) -> None:
    """Writes a step's folder with averaged and current weights."""
    folder.mkdir(parents=True)
    weights = small_trainer(folder).model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name in ("ema", "model"):
        drawn = {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
        save_file(drawn, folder / f"{name}.safetensors")


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    for number in (1, 2):
        save_weights(tmp_path / "checkpoints" / f"step_{number}", number)
    return tmp_path / "checkpoints"


def test_what_differs_has_a_name_of_its_own(tmp_path: Path, steps: Path) -> None:
    runs = {
        "step_1_ddpm4_n3_cfg1_seed0": {"ckpt_path": steps / "step_1" / "ema.safetensors"},
        "step_2_ddpm4_n3_cfg1_seed0": {"ckpt_path": steps / "step_2" / "ema.safetensors"},
        "step_1_model_ddpm4_n3_cfg1_seed0": {"ckpt_path": steps / "step_1" / "model.safetensors"},
        "step_1_ddim3_eta0.5_n3_cfg1_seed0": {
            "ckpt_path": steps / "step_1",
            "sampler__type": "ddim",
            "sampler__num_steps": 3,
            "sampler__eta": 0.5,
        },
        "step_1_ddpm4_n3_cfg3_seed0": {"ckpt_path": steps / "step_1", "guidance_scale": 3},
        "step_1_ddpm4_n3_cfg3-power_cosine2_seed0": {
            "ckpt_path": steps / "step_1",
            "guidance_scale": 3,
            "sampler__guidance_schedule": "power_cosine",
            "sampler__guidance_power": 2,
        },
        "step_1_ddpm4_n3_cfg3-interval0-0.6_seed0": {
            "ckpt_path": steps / "step_1",
            "guidance_scale": 3,
            "sampler__guidance_schedule": "interval",
            "sampler__guidance_interval": "[0,0.6]",
        },
    }
    for changes in runs.values():
        assert infer(tmp_path, **changes) == 0
    found = {path.name for path in (tmp_path / "inference").iterdir() if path.is_dir()}
    assert found == set(runs)
    drawn = [read_npz(tmp_path / "inference" / f"{name}.npz") for name in runs]
    for i, first in enumerate(drawn):
        assert all(not np.array_equal(first, other) for other in drawn[:i])


def test_other_prompts_have_another_name(tmp_path: Path) -> None:
    from speedit_plugins.trainer.config.loading import load_config

    names = set()
    for words in ("[red heart]", "[red heart, a sun]", "[red heart]"):
        options = [f"experiment_dir={tmp_path}", f"sample_prompts={words}"]
        config = load_config("configs/text_to_image/emoji_pixart.yaml", "inference", options)
        names.add(inference._name(config, tmp_path / "x.safetensors"))
    assert len(names) == 2


def test_an_earlier_result_is_not_written_over(
    tmp_path: Path, steps: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert infer(tmp_path, ckpt_path=steps / "step_1") == 0
    folder = tmp_path / "inference" / "step_1_ddpm4_n3_cfg1_seed0"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "inference").rglob("*")}
    # Another path to the same averaged weights gives the same name.
    assert infer(tmp_path, ckpt_path=steps / "step_1" / "ema.safetensors") == 2
    assert f"inference would write over {folder}; move or delete it" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "inference").rglob("*")} == before


def test_an_interrupted_inference_has_no_finished_name(
    tmp_path: Path, steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = images.save

    def interrupted(sample: Any, stem: Path, *, frames_per_second: float) -> None:
        if stem.name == "000002":
            raise KeyboardInterrupt
        save(sample, stem, frames_per_second=frames_per_second)

    with monkeypatch.context() as patch:
        patch.setattr(images, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inference.inference(
                small_config(
                    tmp_path, "inference", ckpt_path=steps / "step_1", num_samples=3, per_proc_batch_size=2
                )
            )
    name = "step_1_ddpm4_n3_cfg1_seed0"
    # Half a set is of no use.
    assert not list((tmp_path / "inference").iterdir())
    # The next run starts anew and finishes.
    assert infer(tmp_path, ckpt_path=steps / "step_1") == 0
    assert {path.name for path in (tmp_path / "inference").iterdir()} == {name, f"{name}.npz"}
    written = sorted(path.name for path in (tmp_path / "inference" / name).iterdir())
    assert written == ["000000.png", "000001.png", "000002.png", "labels.jsonl"]
    rows = map(json.loads, (tmp_path / "inference" / name / "labels.jsonl").read_text().splitlines())
    conditions = all_conditions(small_config(tmp_path, "inference"), None)
    labels = random_rows(conditions, 3, seed=0).tolist()
    assert list(rows) == [{"file_name": f"00000{i}.png", "label": label} for i, label in enumerate(labels)]


def test_what_happens_while_a_model_is_loaded_changes_neither_weights_nor_an_earlier_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = small_trainer(tmp_path)
    first = trainer.save()
    trainer.optimizer_step()
    load = inference.load_generator

    def later(*given: Any) -> Any:
        trainer.save()
        return load(*given)

    name = f"{first.name}_ddpm4_n3_cfg1_seed0"
    with monkeypatch.context() as patch:
        patch.setattr(inference, "load_generator", later)
        assert infer(tmp_path) == 0
    assert f"with the weights of {first}\n" in capfd.readouterr().out
    assert (tmp_path / "inference" / f"{name}.npz").is_file()

    def finished(*given: Any) -> Any:
        (other / "inference" / name).mkdir(parents=True)
        return load(*given)

    other = tmp_path / "other"
    monkeypatch.setattr(inference, "load_generator", finished)
    assert infer(other, ckpt_path=first) == 2
    assert f"inference would write over {other / 'inference' / name}" in capfd.readouterr().err
    assert [path.name for path in (other / "inference").iterdir()] == [name]


class Counting(SampleGenerator):
    """Records how many samples each call draws."""

    def draw(self, condition: Any, num_samples: int, **options: Any) -> Tensor:
        self.__dict__.setdefault("sizes", []).append(num_samples)
        return super().draw(condition, num_samples, **options)


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [3, 3, 2]), (100, [8])])
def test_a_grid_is_drawn_in_batches(tmp_path: Path, batch_size: int, sizes: list[int]) -> None:
    own = generator_of(tmp_path, sample_classes="[1,2]", samples_per_class=4, per_proc_batch_size=batch_size)
    counting = Counting(own.model, own.process, own.encoder, own.config)
    conditions = grid_conditions(own.config, None)
    assert draw_grid(counting, conditions, tmp_path / "grid.png") == 8
    assert counting.__dict__["sizes"] == sizes
    # Each batch equals `draw` with its conditions and stream.
    rows, parts, start = torch.arange(8) % 2, [], 0
    for size in sizes:
        some = rows[start : start + size]
        parts.append(own.draw(conditions.of(some, own.device), size, stream=start))
        start += size
    images.save_grid(torch.cat(parts), tmp_path / "expected.png", columns=2)
    found, expected = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("grid", "expected"))
    assert np.array_equal(found, expected)


def test_fills_are_drawn_in_batches(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "mask.png")
    own = generator_of(
        tmp_path,
        inpainting="RandomMasks",
        inpaint_image=tmp_path / "image.png",
        inpaint_mask=tmp_path / "mask.png",
        sample_classes="[1,2]",
        samples_per_class=3,
        per_proc_batch_size=4,
    )
    counting = Counting(own.model, own.process, own.encoder, own.config)
    assert draw_fills(counting, grid_conditions(own.config, None), tmp_path / "grid.png") == 6
    assert counting.__dict__["sizes"] == [4, 2]
    # A row of two classes: the hole, then three fills.
    assert Image.open(tmp_path / "grid.png").size == (4 * 66 + 2, 2 * 66 + 2)
