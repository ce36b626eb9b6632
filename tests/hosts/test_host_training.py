"""Unmodified training scripts of hosts: the tools that run them, and runs of them on checkouts."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import conformance.diffusers_stand_ins as diffusers_stand_ins
import diffusers_training
import numpy as np
import pytest
import torch
from conformance.diffusers_stand_ins import Examples
from diffusers_training import Seen
from PIL import Image
from whole_trainings import checks

from speedit_plugins import NoiseSchedule, build_policy

ROOT = Path(__file__).parents[2]
EXAMPLES = "examples/text_to_image/"
SCRIPTS = {
    "train_text_to_image.py": ["accelerate"],
    "train_text_to_image_sdxl.py": ["accelerate"],
    "train_text_to_image_lora.py": ["accelerate", "peft"],
    "train_text_to_image_lora_sdxl.py": ["accelerate", "peft"],
}
FLOW, LINEAR = NoiseSchedule.rectified_flow(), NoiseSchedule.linear()


def started(tool: Any, folder: str, work: Path, *arguments: str) -> tuple[int, dict[str, Any], list[str]]:
    """Exit code, result and the launcher's lines of a tool on a checkout, in a process of its own."""
    checkout = Path(os.environ["SPEEDIT_HOSTS"]) / folder
    if not checkout.is_dir():
        pytest.skip(f"no checkout {folder}")
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tool.__file__, "--checkout", str(checkout), "--work", str(work), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout, done.stderr
    # A progress bar may come before the launcher's words in the same line.
    lines = re.findall(r"speedit-launch: [^\r\n]*", done.stderr)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), lines


@pytest.mark.slow
@pytest.mark.hosts
class TestDiffusersScripts:
    def run(self, script: str, work: Path, *arguments: str) -> tuple[int, dict[str, Any], list[str]]:
        absent = [name for name in SCRIPTS[script] if importlib.util.find_spec(name) is None]
        if absent:
            pytest.skip(f"{script} needs {', '.join(absent)}")
        options = ("--script", EXAMPLES + script, *arguments)
        return started(diffusers_training, "huggingface+diffusers", work, *options)

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_it_follows_the_policy(self, script: str, tmp_path: Path) -> None:
        code, result, lines = self.run(script, tmp_path)
        assert code == 0
        assert len(lines) == 1
        assert lines[0].startswith("speedit-launch: diffusers script, seam D, policy speedit: ")
        assert result["draws"] == diffusers_training.BATCH * diffusers_training.NUM_STEPS
        assert result["worst_sigma"] < 4
        assert result["sigma_from_uniform"] > 4
        # Sums of 64 x 256 float32 squares, compared with float64 sums in another order.
        assert result["loss_error"] < 1e-5

    def test_its_v_prediction_takes_the_weights_of_v(self, tmp_path: Path) -> None:
        more = ("--", "--prediction_type", "v_prediction")
        code, result, lines = self.run("train_text_to_image.py", tmp_path, *more)
        assert (code, len(lines)) == (0, 1)
        assert result["worst_sigma"] < 4
        assert result["loss_error"] < 1e-5

    def test_min_snr_beside_weights_is_refused_in_one_line(self, tmp_path: Path) -> None:
        more = ("--", "--snr_gamma", "5")
        code, result, lines = self.run("train_text_to_image.py", tmp_path, *more)
        assert code == result["exit"] == 2
        assert len(lines) == 1
        assert "drop --snr_gamma" in lines[0]

    @pytest.mark.parametrize("script", ["train_text_to_image.py", "train_text_to_image_lora_sdxl.py"])
    def test_uniform_gives_the_hosts_own_loss_to_the_bit(self, script: str, tmp_path: Path) -> None:
        code, result, _ = self.run(script, tmp_path, "--policy", "uniform")
        assert code == 0
        assert result["loss_difference"] == 0


class TestFit:
    @pytest.mark.parametrize("schedule", [LINEAR, FLOW])
    @pytest.mark.parametrize("policy", ["speedit", "speed"])
    def test_draws_of_the_policy_fit_and_uniform_ones_do_not(
        self, policy: str, schedule: NoiseSchedule
    ) -> None:
        shares = checks.tenths(policy, schedule)
        index = build_policy(policy, schedule).draw(20_000).index
        assert checks.fit(shares, [(index + 0.5) / 1000])["worst_sigma"] < 4
        evenly = (torch.arange(1000).repeat(2) + 0.5) / 1000
        assert checks.fit(shares, [evenly])["worst_sigma"] > 4

    def test_a_hundred_draws_in_the_first_tenth_are_thirty_sigmas_off(self) -> None:
        # (1 - 0.1) / sqrt(0.1 * 0.9 / 100) = 30.
        fitted = checks.fit(torch.full((10,), 0.1), [torch.full((50,), 0.05)] * 2)
        assert fitted == {"draws": 100, "worst_sigma": 30.0, "sigma_from_uniform": 30.0}

    def test_pure_noise_lies_in_the_last_tenth(self) -> None:
        last = torch.tensor([0.0] * 9 + [1.0])
        assert checks.fit(last, [torch.ones(7)])["draws"] == 7

    def test_nothing_drawn(self) -> None:
        assert checks.fit(torch.full((10,), 0.1), []) == {"draws": 0, "worst_sigma": float("inf")}


class TestStandIns:
    def test_columns_are_read_through_the_transform(self) -> None:
        rows = Examples({"image": [1, 2, 3], "text": ["a", "b", "c"]})
        doubled = rows.with_transform(lambda batch: {**batch, "twice": [2 * x for x in batch["image"]]})
        assert len(doubled) == 3
        assert doubled.column_names == ["image", "text"]
        assert doubled[1] == {"image": 2, "text": "b", "twice": 4}

    def test_a_map_keeps_the_rows_and_adds_plain_lists(self) -> None:
        rows = Examples({"image": [1, 2, 3]})

        def squared(batch: dict[str, Any]) -> dict[str, Any]:
            assert len(batch["image"]) <= 2
            return {"square": torch.tensor(batch["image"]) ** 2}

        mapped = rows.map(squared, batched=True, batch_size=2, new_fingerprint="any")
        assert [mapped[i] for i in range(3)] == [{"image": n, "square": n * n} for n in (1, 2, 3)]
        both = mapped.remove_columns(["image"]).joined(Examples({"text": ["a", "b", "c"]}))
        assert both[2] == {"square": 9, "text": "c"}
        with pytest.raises(ValueError, match="map needs batched=True"):
            rows.map(squared, batched=False)

    def test_the_transforms_do_what_torchvisions_do(self) -> None:
        transforms = diffusers_stand_ins.stand_ins()["torchvision.transforms"]
        # A column of 0, 85, 170, 255 on each row: 4 x 4 pixels.
        image = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8)[None, :, None] * 85, (4, 1, 3)))
        wide = image.resize((8, 4))
        resize = transforms.Resize(2, interpolation=transforms.InterpolationMode.LANCZOS)
        assert resize(wide).size == (4, 2)
        assert transforms.CenterCrop(2).get_params(wide, (2, 2)) == (1, 3, 2, 2)
        random.seed(0)
        top, left, height, width = transforms.RandomCrop(2).get_params(wide, (2, 2))
        assert (height, width) == (2, 2)
        assert 0 <= top <= 2
        assert 0 <= left <= 6
        mirrored = transforms.RandomHorizontalFlip(p=1.0)(image)
        chain = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
        # 170 / 255 is 2/3, and 2 * 2/3 - 1 = 1/3.
        assert torch.allclose(chain(mirrored)[0, 0], torch.tensor([1.0, 1 / 3, -1 / 3, -1.0]))

    def test_they_are_taken_away_and_other_imports_stay(self) -> None:
        # What a script imports meanwhile has to stay, since some libraries cannot be imported twice.
        assert "torchvision" not in sys.modules
        sys.modules.pop("colorsys", None)
        with diffusers_training.placed(diffusers_stand_ins.stand_ins()):
            import colorsys

            from torchvision import transforms

            assert transforms.Resize is diffusers_stand_ins.Resize
        assert "torchvision" not in sys.modules
        assert sys.modules["colorsys"] is colorsys

    def test_the_pipeline_has_the_hubs_layout(self, tmp_path: Path) -> None:
        diffusers_stand_ins.write_pipeline(tmp_path, is_xl=True)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == "StableDiffusionXLPipeline"
        assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
        scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
        # As in NoiseSchedule.scaled_linear, for which the policy of the comparison is built.
        assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)


class TestReport:
    def seen(self, *, scale: float = 1.0, policy: str = "speedit") -> Seen:
        """A step at every timestep, with an mse of 4 and a loss that is scaled."""
        weight = build_policy(policy, NoiseSchedule.scaled_linear(), "epsilon").weight
        answers, t = torch.full((1000, 1, 2, 2), 2.0), torch.arange(1000)
        return Seen([t], [answers], [torch.zeros_like(answers)], [scale * (weight * 4).mean()])

    def test_a_loss_of_weight_times_mse_has_no_error(self) -> None:
        # Both are the same float64 sum.
        assert diffusers_training.report("speedit", [], self.seen())["loss_error"] < 1e-15

    def test_a_loss_that_is_twice_that_is_seen(self) -> None:
        doubled = diffusers_training.report("speedit", [], self.seen(scale=2.0))
        assert doubled["loss_error"] == pytest.approx(1.0)
        assert not diffusers_training.is_right({**doubled, "worst_sigma": 0.0})

    def test_the_weights_are_those_of_the_prediction_type(self) -> None:
        arguments = ["--prediction_type", "v_prediction"]
        assert (
            diffusers_training.report("min_snr", arguments, self.seen(policy="min_snr"))["loss_error"] > 0.1
        )

    def test_equal_runs_differ_by_nothing_and_others_do(self) -> None:
        first, doubled = self.seen(), self.seen(scale=2.0)
        assert diffusers_training.difference(first, self.seen()) == 0
        assert diffusers_training.difference(first, doubled) == pytest.approx(float(first.losses[0]))

    def test_runs_at_other_timesteps_are_not_compared(self) -> None:
        other = self.seen()
        other.t[0] = other.t[0].flip(0)
        assert diffusers_training.difference(self.seen(), other) == float("inf")
        assert diffusers_training.difference(Seen(), Seen()) == float("inf")
