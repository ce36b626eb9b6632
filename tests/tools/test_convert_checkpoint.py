import argparse
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.lora import Adapters
from speedit_plugins.trainer.models.weights import load_weights, read_checkpoint

SMALL = {"input_size": 4, "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    source = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(value: float) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in DiT(**SMALL).state_dict().items()}


def test_a_bare_pt_comes_back_bit_for_bit(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: torch.randn_like(tensor) for name, tensor in filled(0.0).items()}
    source, middle, target = (str(tmp_path / name) for name in ("w.pt", "w.safetensors", "back.pt"))
    torch.save(weights, source)
    assert tool.main([source, middle]) == 0
    assert tool.main([middle, target]) == 0
    back = torch.load(target, weights_only=True)
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    count = sum(tensor.numel() for tensor in weights.values())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"wrote {middle}: {len(weights)} tensors",
        f"wrote {target}: {len(weights)} tensors",
    ]
    assert f"{count:,} values" in lines[0]
    load_weights(DiT(**SMALL), middle)


@pytest.mark.parametrize(
    ("options", "value"), [([], 2.0), (["--prefer", "ema"], 2.0), (["--prefer", "model"], 1.0)]
)
def test_prefer_chooses_the_weights_of_a_training_checkpoint(
    tool: ModuleType, tmp_path: Path, options: list[str], value: float
) -> None:
    content = {
        "model": filled(1.0),
        "ema": filled(2.0),
        "opt": {},
        "args": argparse.Namespace(model="DiT-XL/2"),
    }
    torch.save(content, tmp_path / "w.pt")
    assert tool.main([str(tmp_path / "w.pt"), str(tmp_path / "w.safetensors"), *options]) == 0
    assert all((tensor == value).all() for tensor in load_file(tmp_path / "w.safetensors").values())


def test_weights_of_other_trainers_are_converted_under_the_names_of_the_model(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in filled(3.0).items()}, "epoch": 3}, tmp_path / "w.pt"
    )
    assert tool.main([str(tmp_path / "w.pt"), str(tmp_path / "w.safetensors")]) == 0
    assert set(load_file(tmp_path / "w.safetensors")) == set(filled(3.0))
    # Weights that were asked for by name must be there.
    assert tool.main([str(tmp_path / "w.pt"), str(tmp_path / "x.safetensors"), "--prefer", "ema"]) == 2
    assert "has no 'ema' weights, got keys ['epoch', 'state_dict']" in capsys.readouterr().err
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html></html>")
    assert tool.main([str(tmp_path / "page.pt"), str(tmp_path / "x.safetensors")]) == 2
    assert "page.pt' is a web page, from a download that failed" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_wrap_writes_what_speedit_loads(tool: ModuleType, tmp_path: Path) -> None:
    save_file(filled(3.0), tmp_path / "w.safetensors")
    assert tool.main([str(tmp_path / "w.safetensors"), str(tmp_path / "w.pt"), "--wrap", "ema"]) == 0
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert list(content) == ["ema"]
    assert set(read_checkpoint(tmp_path / "w.pt")) == set(filled(3.0))


def test_tied_tensors_are_written_each_by_itself(tool: ModuleType, tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, "b": shared, "c": shared.T}, tmp_path / "w.pt")
    tool.convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    back = load_file(tmp_path / "w.safetensors")
    assert torch.equal(back["a"], shared)
    assert torch.equal(back["b"], shared)
    assert torch.equal(back["c"], shared.T)


def test_an_existing_target_is_kept_without_force(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "w.pt", tmp_path / "w.safetensors"
    torch.save(filled(1.0), source)
    target.write_bytes(b"mine")
    assert tool.main([str(source), str(target)]) == 2
    assert target.read_bytes() == b"mine"
    assert "exists; use --force to replace it" in capsys.readouterr().err
    assert tool.main([str(source), str(target), "--force"]) == 0
    assert set(load_file(target)) == set(filled(1.0))


def test_a_failed_write_leaves_the_target_and_no_leftover(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "w.pt", tmp_path / "w.safetensors"
    torch.save(filled(1.0), source)
    target.write_bytes(b"mine")

    def full(_: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool, "save_file", full)
    assert tool.main([str(source), str(target), "--force"]) == 2
    assert capsys.readouterr().err.endswith(f"cannot write {target}: No space left on device\n")
    assert target.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["w.pt", "w.safetensors"]


def test_what_is_written_has_the_permissions_of_any_new_file(tool: ModuleType, tmp_path: Path) -> None:
    torch.save(filled(1.0), tmp_path / "w.pt")
    tool.convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        ("w.pt", "x.pt", [], "one .pt or .pth file and one .safetensors file, got 'w.pt' and 'x.pt'"),
        ("w.pt", "x.bin", [], "needs one .pt or .pth file and one .safetensors file"),
        ("w.bin", "x.safetensors", [], "needs one .pt or .pth file and one .safetensors file"),
        ("none.pt", "x.safetensors", [], "no checkpoint at"),
        ("w.safetensors", "x.pt", ["--prefer", "ema"], "--prefer ema has no effect"),
        ("w.pt", "x.safetensors", ["--wrap", "ema"], "--wrap ema has no effect"),
        ("w.pt", "absent/x.safetensors", [], "No such file or directory"),
        ("evil.pt", "x.safetensors", [], "is refused: it asks for posix.mkdir"),
    ],
)
def test_impossible_conversions_are_one_line_on_stderr(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    target: str,
    options: list[str],
    message: str,
) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(filled(1.0), tmp_path / "w.pt")
    torch.save({"ema": filled(1.0), "args": Payload()}, tmp_path / "evil.pt")
    save_file(filled(1.0), tmp_path / "w.safetensors")
    before = sorted(os.listdir(tmp_path))
    assert tool.main([str(tmp_path / source), str(tmp_path / target), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("convert_checkpoint: error: ")
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_adapters_without_their_weights_are_refused(tool: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "ema.safetensors"
    adapters = Adapters(rank=2, alpha=2.0, targets=("to_q",), base="ab", source="base.pt")
    save_file({"x": torch.zeros(1)}, source, metadata=adapters.metadata())
    with pytest.raises(ValueError, match=r"holds adapters alone, of base\.pt, which a \.pt does not record"):
        tool.convert(source, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
