import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from speedit_plugins.trainer.models import weights as weight_files
from speedit_plugins.trainer.models.dit import DiT
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
        ({"epoch": 3}, r"contains keys \['epoch'\], wanted a state dict"),
        ([torch.zeros(1)], "contains list, wanted a state dict"),
        ({}, r"contains keys \[\], wanted a state dict"),
    )
    for content, message in contents:
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / "odd.pt")


def test_importing_the_models_loads_neither_diffusers_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from speedit_plugins.trainer.models import autoencoder, dit, latte, text, weights\n"
        "print(sorted({'diffusers', 'transformers', 'omegaconf', 'xformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
