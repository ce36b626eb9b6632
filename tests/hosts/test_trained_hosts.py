"""How whole trainings of single hosts are recorded and prepared."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from whole_trainings import child, material, stand_ins, training
from whole_trainings.hosts import dit_3d, image_hosts, mmcv_stand_ins, repa
from whole_trainings.recording import Recorder


class Network(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + t.view(-1, 1)


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes what a recorder does to the calls of modules away again."""
    monkeypatch.setattr(nn.Module, "__call__", nn.Module.__call__)


class Scaled:
    """A loss with an interpolant, as REPA's, whose mse is t squared."""

    def interpolant(self, t: Tensor) -> Tensor:
        return t

    def __call__(self, model: Any, images: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return model(images, t).square().mean(1), torch.zeros(())


@pytest.mark.usefixtures("unwatched")
class TestWatchedClass:
    def test_the_innermost_loss_is_the_mse_and_the_outermost_is_reported(self) -> None:
        recorder = Recorder("Network")
        watched: Any = recorder.watching(type("Loss", (Scaled,), dict(vars(Scaled))))

        class Weighted(watched):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                loss, other = super().__call__(*args, **kwargs)
                return 10 * loss, other

        Weighted()(Network(), torch.zeros(1, 3), torch.tensor([2]))
        (terms,) = recorder.record.terms
        assert (terms["mse"].tolist(), terms["loss"].tolist()) == ([4.0], [40.0])
        assert recorder.record.t[0].tolist() == [2]

    def test_a_transports_mse_is_of_what_its_model_should_answer(self) -> None:
        class Path:
            def plan(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                return t, x, torch.ones_like(x)

        class Transport:
            path_sampler = Path()

            def training_losses(self, model: Any, x: Tensor, t: Tensor) -> dict[str, Tensor]:
                t, x, target = self.path_sampler.plan(t, x)
                answer = model(x, t)
                # As if a policy had weighed it by 3.
                return {"pred": answer, "loss": 3 * (answer - target).square().mean(1)}

        recorder = Recorder("Network")
        recorder.watching(Transport)().training_losses(Network(), torch.zeros(1, 3), torch.tensor([5.0]))
        # The model answers 5, and the target is 1.
        assert recorder.record.terms[0]["mse"].tolist() == [16.0]
        assert recorder.record.terms[0]["loss"].tolist() == [48.0]


class TestChild:
    def test_a_module_is_changed_before_what_imports_it_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "inner_of_a_host.py").write_text("value = 1\n")
        (tmp_path / "outer_of_a_host.py").write_text("from inner_of_a_host import value\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        finder = child.AfterImport()
        finder.add("inner_of_a_host", lambda module: vars(module).update(value=2))
        monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
        outer = importlib.import_module("outer_of_a_host")
        assert outer.value == 2

    def test_a_small_model_has_its_sizes_and_the_hosts_arguments(self) -> None:
        host: Any = ModuleType("host")
        host.Model, host.MODELS = dict, {}
        small = {"module": "host", "model": "Model", "name": "small", "table": "MODELS", "ignores": ("old",)}
        child.add_small(host, {**small, "sizes": {"depth": 2, "width": 8}})
        assert host.MODELS["small"](width=4, old=True) == {"depth": 2, "width": 4}
        child.add_small(host, {**small, "sizes": {}, "table": ""})
        assert host.small(a=1) == {"a": 1}


class TestKernels:
    def test_a_voxel_has_the_mean_of_its_points(self) -> None:
        # Two points in voxel (0, 0, 1) of 2 x 2 x 2, and one in (1, 0, 0).
        coords = torch.tensor([[[0, 0, 1], [0, 0, 0], [1, 1, 0]]])
        means, voxel, count = dit_3d.Kernels.avg_voxelize_forward(
            torch.tensor([[[1.0, 3.0, 5.0]]]), coords, 2
        )
        assert means[0, 0].tolist() == [0, 2, 0, 0, 5, 0, 0, 0]
        shared = dit_3d.Kernels.avg_voxelize_backward(torch.ones_like(means), voxel, count)
        assert shared[0, 0].tolist() == [0.5, 0.5, 1.0]

    def test_between_voxels_features_are_linear(self) -> None:
        # The feature of voxel (x, y, z) is 4x + 2y + z, and at (0.25, 0.5, 0.75) it is 1 + 1 + 0.75.
        features, coords = torch.arange(8.0).view(1, 1, 8), torch.tensor([[[0.25], [0.5], [0.75]]])
        found, place, weight = dit_3d.Kernels.trilinear_devoxelize_forward(2, True, coords, features)
        assert found.item() == pytest.approx(2.75)
        back = dit_3d.Kernels.trilinear_devoxelize_backward(torch.ones(1, 1, 1), place, weight, 2)
        # The eight weights of one point.
        assert back.sum().item() == pytest.approx(1.0)


class TestConfigs:
    def test_lightningdit_keeps_its_published_config(self, tmp_path: Path) -> None:
        published = {
            "data": {"latent_norm": True, "num_classes": 1000},
            "model": {"in_chans": 32, "use_rope": True},
            "train": {"global_seed": 0},
            "transport": {"use_cosine_loss": True, "use_lognorm": True},
            "sample": {"mode": "ODE"},
        }
        host = image_hosts.LightningDiT()
        host.published = tmp_path / "published.yaml"
        host.published.write_text(yaml.safe_dump(published))
        config = yaml.safe_load(host.write_config(tmp_path, "long", {"max_steps": 40}).read_text())
        assert config["transport"] == {"use_cosine_loss": True, "use_lognorm": False}
        assert config["model"]["use_rope"]
        assert config["data"]["num_classes"] == 1000
        assert config["train"]["max_steps"] == 40

    def test_time_is_one_at_noise(self) -> None:
        # DiT counts 1000 steps towards noise; SiT's noise is at 0, and REPA's at 1.
        assert float(image_hosts.DiT().time(torch.tensor(999))) == pytest.approx(0.9995)
        assert float(image_hosts.SiT().time(torch.tensor(0.25))) == 0.75
        assert float(repa.REPA().time(torch.tensor(0.25))) == 0.25
        assert image_hosts.SiT().index(torch.tensor([0.0, 1.0])).tolist() == [999, 0]

    def test_pictures_are_in_folders_by_their_digit(self, tmp_path: Path) -> None:
        ((path, caption), _) = material.write_images(tmp_path, 2, size=32)
        assert path == tmp_path / "0" / "0_0000.png"
        assert caption.startswith("a handwritten 0 ")
        folder = stand_ins.ImageFolder(str(tmp_path))
        assert [label for _, label in folder] == [0, 1]
        assert folder[0][0].size == (32, 32)


class TestLogBuffer:
    def test_it_averages_since_it_was_cleared(self) -> None:
        buffer = mmcv_stand_ins.LogBuffer()
        for value in (1.0, 3.0):
            buffer.update({"loss": value})
        buffer.average()
        assert buffer.output == {"loss": 2.0}
        buffer.clear()
        buffer.average()
        assert buffer.output == {}


class TestTensors:
    def test_all_of_a_checkpoint_are_compared(self, tmp_path: Path) -> None:
        saved = {"model": {"w": torch.ones(1)}, "steps": 3, "args": Namespace(lr=1)}
        torch.save(saved, tmp_path / "saved.pt")
        assert {name: each.tolist() for name, each in training.tensors(tmp_path / "saved.pt").items()} == {
            ".model.w": [1.0]
        }
        assert training.tensors(tmp_path / "none.pt") == {}
