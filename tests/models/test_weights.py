import argparse
import os
import re
import subprocess
import sys
import traceback
from fractions import Fraction
from pathlib import Path, PurePosixPath

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from speedit_plugins.trainer.models import weights as weight_files
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.state_dicts import without_wrappers
from speedit_plugins.trainer.models.weights import load_weights, read_checkpoint

SMALL = {"input_size": 4, "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
# The settings of SpeeDiT's train script, as OmegaConf keeps them.
SPEEDIT_SETTINGS = OmegaConf.create(
    {
        "phase": "train",
        "seed": 0,
        "lr": 1e-4,
        "resume": None,
        "class_cond": True,
        "model": {"target": "speed.networks.DiT_XL_2", "params": {"sizes": [32, 32], "note": "${phase}"}},
    }
)
OFFICIAL_SETTINGS = argparse.Namespace(
    model="DiT-XL/2", image_size=256, num_classes=1000, results_dir="results"
)


def filled(value: float, **changes: object) -> dict[str, Tensor]:
    model = DiT(**SMALL | changes)
    return {name: torch.full_like(tensor, value) for name, tensor in model.state_dict().items()}


class Payload:
    """Pickles as a call of `function`, which an ordinary load would run."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def test_a_bare_state_dict_loads_from_every_format(tmp_path: Path) -> None:
    weights = filled(2.0)
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "w.pt", "old.pt"):
        model = DiT(**SMALL)
        report = load_weights(model, tmp_path / name)
        assert set(report.loaded) == set(weights)
        assert (report.left_at_init, report.unused) == ((), ())
        assert all((tensor == 2).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("settings", [OFFICIAL_SETTINGS, SPEEDIT_SETTINGS])
@pytest.mark.parametrize(("prefer", "value"), [("ema", 2.0), ("model", 1.0)])
def test_a_training_checkpoint_loads_the_preferred_weights(
    tmp_path: Path, settings: object, prefer: str, value: float
) -> None:
    model = DiT(**SMALL)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 1])).sum().backward()
    optimizer.step()
    content = {
        "model": filled(1.0),
        "ema": filled(2.0),
        "opt": optimizer.state_dict(),
        "args": settings,
        "step": torch.tensor(400),
    }
    torch.save(content, tmp_path / "0000400.pt")
    load_weights(model, tmp_path / "0000400.pt", prefer=prefer)
    assert all((tensor == value).all() for tensor in model.state_dict().values())


def test_settings_load_as_they_were_saved(tmp_path: Path) -> None:
    for index, settings in enumerate((OFFICIAL_SETTINGS, SPEEDIT_SETTINGS)):
        torch.save(settings, tmp_path / f"{index}.pt")
        assert weight_files._unpickle(tmp_path / f"{index}.pt") == settings


def test_weights_take_the_type_of_the_model(tmp_path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in filled(0.5).items()}, tmp_path / "w.pt")
    model = DiT(**SMALL)
    load_weights(model, tmp_path / "w.pt")
    assert model.pos_embed.dtype == torch.float32
    assert (model.pos_embed == 0.5).all()


@pytest.mark.parametrize("function", [os.mkdir, eval, getattr])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, function: object, zipped: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    arguments = {
        os.mkdir: (str(marker),),
        eval: (f"__import__('os').mkdir({str(marker)!r})",),
        getattr: (1, "real"),
    }
    content = {"model": filled(1.0), "ema": filled(2.0), "args": Payload(function, *arguments[function])}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = DiT(**SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = rf"(\w+\.)?{function.__name__}"
    with pytest.raises(ValueError, match=rf"evil.pt' is refused: it asks for {name}, .* could run any code"):
        load_weights(model, path)
    assert not marker.exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fine_tuning_on_other_classes_reports_what_stays_at_its_initial_value(tmp_path: Path) -> None:
    torch.save(filled(2.0), tmp_path / "w.pt")
    model = DiT(**SMALL | {"num_classes": 7})
    table = "y_embedder.embedding_table.weight"
    before = model.state_dict()[table].clone()
    with pytest.raises(
        ValueError, match=rf"not fit the model: {table}: shape \(4, 8\), wanted shape \(8, 8\); wanted the"
    ):
        load_weights(model, tmp_path / "w.pt")
    report = load_weights(model, tmp_path / "w.pt", allow_mismatch=("y_embedder.",))
    assert report.left_at_init == report.unused == (table,)
    assert torch.equal(model.state_dict()[table], before)
    assert all((tensor == 2).all() for name, tensor in model.state_dict().items() if name != table)


def test_conditional_weights_fit_an_unconditional_model_when_allowed(tmp_path: Path) -> None:
    torch.save(filled(2.0), tmp_path / "w.pt")
    model = DiT(**SMALL | {"num_classes": 0})
    with pytest.raises(ValueError, match=r"embedding_table.weight: shape \(4, 8\), wanted nothing"):
        load_weights(model, tmp_path / "w.pt")
    report = load_weights(model, tmp_path / "w.pt", allow_mismatch=("y_embedder.",))
    assert (report.left_at_init, report.unused) == ((), ("y_embedder.embedding_table.weight",))


def test_a_mismatch_lists_names_and_copies_nothing(tmp_path: Path) -> None:
    torch.save(filled(2.0, depth=3), tmp_path / "w.pt")
    model = DiT(**SMALL)
    # Two blocks of five layers with weight and bias.
    with pytest.raises(
        ValueError,
        match=r"the model: blocks.1.attn.qkv.weight: shape \(24, 8\), wanted n.*; and 17 more; wanted",
    ):
        load_weights(model, tmp_path / "w.pt")
    assert not (model.x_embedder.proj.weight == 2).any()


def test_an_allowance_that_begins_no_name_is_refused(tmp_path: Path) -> None:
    torch.save(filled(2.0), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="no .* starts with 'y_embeder' of .*; did you mean 'y_embedder'"):
        load_weights(DiT(**SMALL), tmp_path / "w.pt", allow_mismatch=("y_embeder",))


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    torch.save(filled(2.0), tmp_path / "w.pt")
    with torch.device("meta"):
        model = DiT(**SMALL)
    with pytest.raises(ValueError, match="model on the meta device; wanted one with memory"):
        load_weights(model, tmp_path / "w.pt")


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint at '.*none.pt': not a file"):
        read_checkpoint(tmp_path / "none.pt")
    save_file(filled(1.0), tmp_path / "w.safetensors")
    torch.save(filled(1.0), tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        whole = (tmp_path / name).read_bytes()
        for length in (0, 100, len(whole) // 2):
            (tmp_path / f"cut_{name}").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"cut_{name}' is .*damaged"):
                read_checkpoint(tmp_path / f"cut_{name}")
    with pytest.raises(ValueError, match="prefer needs one of ema, model, got 'emma'; did you mean 'ema'"):
        read_checkpoint(tmp_path / "w.pt", prefer="emma")
    contents = (
        ({"model": filled(1.0), "opt": {}}, r"has no 'ema' weights, got keys \['model', 'opt'\]"),
        ({"epoch": 3}, r"holds keys \['epoch'\]; wanted a state dict"),
        ([torch.zeros(1)], "holds list; wanted a state dict"),
        (torch.zeros(2), r"holds one tensor of shape \(2,\); wanted a state dict"),
        ({}, r"holds keys \[\]; wanted a state dict"),
        (
            {"ema": {"shadow_params": [torch.zeros(1)], "decay": 0.9}},
            "holds shadow_params, .* under ema; wanted",
        ),
        ({"model": filled(1.0), "state_dict": filled(2.0)}, "has weights under model and state_dict; wanted"),
    )
    for content, message in contents:
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / "odd.pt", prefer="ema" if "opt" in str(message) else None)


@pytest.mark.parametrize(
    "keys",
    [
        ("state_dict",),
        ("model", "state_dict"),
        ("model",),
        ("ema",),
        ("model_ema",),
        ("state_dict_ema",),
        ("ema", "module"),
        ("module",),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_of_other_trainers_load_under_the_names_of_the_model(
    tmp_path: Path, keys: tuple[str, ...], prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    content: dict[str, object] = {f"{prefix}{name}": tensor for name, tensor in filled(2.0).items()}
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pt")
    model = DiT(**SMALL)
    load_weights(model, tmp_path / "w.pt")
    assert all((tensor == 2).all() for tensor in model.state_dict().values())
    # Which weights were taken is told, unless they are the averaged ones under their own key.
    told = [record.getMessage() for record in caplog.records]
    assert told == [] if keys == ("ema",) else f"weights under '{'.'.join(keys)}' are taken" in told[0]


def test_a_compiled_part_of_a_model_has_its_own_names_too(tmp_path: Path) -> None:
    weights = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in filled(2.0).items()}
    save_file(weights, tmp_path / "w.safetensors")
    assert set(read_checkpoint(tmp_path / "w.safetensors")) == set(filled(2.0))
    # A model may have a part of that name.
    own = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert set(without_wrappers(own)) == set(own)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged: it is empty"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page, from a download that failed"),
        (b"\n\n<html>", "is a web page, from a download that failed"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an answer in XML"),
        (b'{"error": "Repository not found"}', "is text in JSON"),
        (LFS, "is a pointer of git-LFS, not the file itself: git lfs pull fetches it"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "is compressed by gzip; unpack it"),
    ],
)
def test_what_was_saved_in_place_of_weights_is_told(
    tmp_path: Path, suffix: str, content: bytes, message: str
) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"w{suffix}' {re.escape(message)}"):
        read_checkpoint(tmp_path / f"w{suffix}")


def test_a_cut_or_misnamed_file_is_told(tmp_path: Path) -> None:
    save_file(filled(1.0), tmp_path / "w.safetensors")
    torch.save(filled(1.0), tmp_path / "w.pt")
    safe, zipped = (tmp_path / "w.safetensors").read_bytes(), (tmp_path / "w.pt").read_bytes()
    cases = {
        "cut.safetensors": (safe[:-4], f"is damaged: it has {len(safe) - 4:,} of {len(safe):,} bytes"),
        "head.safetensors": (safe[:100], "is damaged: cut off after 100 bytes"),
        "cut.pt": (zipped[:-100], f"is damaged: its end is missing after {len(zipped) - 100:,} bytes"),
        "safe.pt": (safe, "is a safetensors file; wanted the suffix .safetensors"),
        "zipped.safetensors": (zipped, "is a file of torch.save; wanted the suffix .pt"),
        "text.safetensors": (b"hello, these are no weights", "is damaged or not a safetensors file"),
        "text.pt": (b"hello, these are no weights", "is damaged or not a file of torch.save"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_checkpoint(tmp_path / name)


def test_a_folder_and_a_missing_file_say_what_there_is(tmp_path: Path) -> None:
    for name in ("a.pt", "config.json", "unet/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"not a file but a folder with a\.pt, config\.json, unet/"):
        read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"'.*' has a\.pt, config\.json, unet/"):
        read_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_class_is_named_without_the_advice_to_run_it(tmp_path: Path, zipped: bool) -> None:
    content = {"model": filled(1.0), "hyper_parameters": PurePosixPath("x"), "callbacks": Fraction(1, 2)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="is refused") as caught:
        read_checkpoint(tmp_path / "w.pt")
    said = str(caught.value)
    assert "pathlib.PurePosixPath" in said
    assert "fractions.Fraction" in said or not zipped
    assert "save_file(model.state_dict(), FILE)" in said
    assert "weights_only" not in said
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = filled(2.0)
    weights["x_embedder.proj.weight"][0, 0, 0, 0] = torch.nan
    torch.save(weights, tmp_path / "w.pt")
    model = DiT(**SMALL)
    with pytest.raises(ValueError, match=r"not finite in 1 of \d+ tensors, such as x_embedder.proj.weight"):
        load_weights(model, tmp_path / "w.pt")
    assert not (model.pos_embed == 2).all()


def test_importing_the_models_loads_neither_diffusers_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from speedit_plugins.trainer.models import dit, latte, weights\n"
        "from speedit_plugins.trainer.models.pretrained import autoencoder, text\n"
        "print(sorted({'diffusers', 'transformers', 'omegaconf', 'xformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
