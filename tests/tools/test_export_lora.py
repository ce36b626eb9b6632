"""Exported adapters, loaded by diffusers and peft, against the model that was trained."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from saved_models import TEXT_WIDTH, save_pipeline
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.interface import input_shape
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.lora import add_adapters
from speedit_plugins.trainer.models.pretrained.exported import export_model
from speedit_plugins.trainer.models.pretrained.exported_adapters import (
    WEIGHTS,
    export_adapters,
    save_adapters,
)
from speedit_plugins.trainer.models.text_conditioned.latte_t2v import LatteT2V
from speedit_plugins.trainer.models.text_conditioned.pixart import PixArt
from speedit_plugins.trainer.models.text_conditioned.unet import UNet
from speedit_plugins.trainer.training.assembly import build_trainer

EXPORT = runpy.run_path("tools/export.py")
DIGITS = "configs/image/digits/speedit.yaml"
STEPS = 10
SIZE: dict[str, Any] = {"input_size": 4, "text_width": TEXT_WIDTH, "text_length": 8}
BUILDERS: dict[str, Any] = {"UNet": UNet, "PixArt": PixArt, "LatteT2V": LatteT2V}
# Neither rank nor 1: a loader that forgets alpha shows.
RANK, ALPHA = 2, 5.0


def randomised(model: nn.Module, *, seed: int) -> None:
    """Draws what is trained: adapters, or all weights before there are any."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def adapted(folder: Path, kind: str, **options: Any) -> nn.Module:
    """A model of the network in `folder`, with random adapters."""
    frames = {"num_frames": 3, "input_size": 8} if kind == "LatteT2V" else {}
    model = BUILDERS[kind](path=str(folder), **{**SIZE, **frames}).eval()
    add_adapters(model, rank=RANK, alpha=ALPHA, **options)
    randomised(model, seed=1)
    return model


def call(model: nn.Module, net: nn.Module | None = None) -> Tensor:
    """A prediction of the model, or of another network in the place of its own."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, *input_shape(model), generator=generator)
    tokens = torch.randn(2, 8, TEXT_WIDTH, generator=generator)
    if net is not None:
        model.net = net
    return model(x, torch.tensor([3, 500]), {"tokens": tokens, "mask": torch.ones(2, 8, dtype=torch.bool)})


def written(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Exports the adapters, and returns what diffusers keeps in the file's metadata."""
    save_adapters(folder, export_adapters(model, num_steps=STEPS, num_timesteps=1000))
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


@torch.no_grad()
def test_stable_diffusion_loads_the_adapters_by_its_own_method(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    parts = save_pipeline(tmp_path / "parts", "UNet")
    model = adapted(parts, "UNet", targets=["to_q", "to_out.0", "conv1"])
    trained = call(model)
    metadata = written(model, tmp_path / "lora")
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (RANK, ALPHA)
    assert metadata["unet.target_modules"] == ["conv1", "to_out.0", "to_q"]
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [WEIGHTS]
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(parts / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(parts / "unet"),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(tmp_path / "lora")
    # Float32: the same layers in the same order.
    assert_close(call(model, pipeline.unet), trained, rtol=0, atol=1e-5)
    pipeline.unload_lora_weights()
    assert (call(model, pipeline.unet) - trained).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PixArt", "LatteT2V"])
def test_a_transformer_loads_the_adapters_by_peft_and_by_diffusers_loader(tmp_path: Path, kind: str) -> None:
    import diffusers
    from diffusers.loaders import PeftAdapterMixin
    from peft import PeftModel

    parts = save_pipeline(tmp_path / "parts", kind)
    model = adapted(parts, kind)
    own, trained = type(model.net), call(model)
    metadata = written(model, tmp_path / "lora")
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (RANK, ALPHA)
    assert metadata["transformer.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    plain = own.from_pretrained(parts / "transformer")
    assert (call(model, plain) - trained).abs().max() > 0.01
    by_peft = PeftModel.from_pretrained(plain, tmp_path / "lora")
    assert_close(call(model, by_peft.base_model.model), trained, rtol=0, atol=1e-5)
    # These classes have no loader yet. One that gets diffusers' own takes the same file.
    with_loader = type("WithLoader", (own, PeftAdapterMixin), {})
    net = with_loader.from_pretrained(parts / "transformer")
    net.load_lora_adapter(tmp_path / "lora", weight_name=WEIGHTS, prefix="transformer")
    assert_close(call(model, net), trained, rtol=0, atol=1e-5)
    name = {"PixArt": "PixArtAlphaPipeline", "LatteT2V": "LattePipeline"}[kind]
    assert not hasattr(getattr(diffusers, name), "load_lora_weights")


def dit() -> DiT:
    model = DiT(4, 2, hidden_size=32, depth=2, num_heads=2, num_classes=3).eval()
    randomised(model, seed=0)
    return model


EVERY = [
    *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"),
    *("final_layer.linear", "t_embedder.mlp.0", "t_embedder.mlp.2"),
]


@torch.no_grad()
@pytest.mark.parametrize("targets", [[], EVERY], ids=["default", "every layer"])
def test_the_transformer_of_a_dit_loads_the_adapters_by_peft(tmp_path: Path, targets: list[str]) -> None:
    from peft import PeftModel

    # The base in diffusers' form, then the same model with adapters.
    net = export_model(dit(), num_steps=STEPS, num_timesteps=1000).net.eval()
    model = dit()
    add_adapters(model, rank=RANK, alpha=ALPHA, targets=targets)
    randomised(model, seed=1)
    metadata = written(model, tmp_path)
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (RANK, ALPHA)
    if not targets:
        wanted = [f"attn1.to_{part}" for part in ("k", "out.0", "q", "v")]
        assert metadata["transformer.target_modules"] == wanted
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    label, timestep = torch.tensor([0, 2]), torch.tensor([300, 900])
    trained = model(x, timestep, label)

    def predicted(network: Any) -> Tensor:
        return network(x, timestep=timestep, class_labels=label).sample

    assert (predicted(net) - trained).abs().max() > 0.01
    loaded = PeftModel.from_pretrained(net, tmp_path)
    # The timestep layer is fitted, to float32 rounding at these timesteps.
    assert_close(predicted(loaded), trained, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_pipeline_or_without_adapters_is_refused() -> None:
    options = {"num_steps": STEPS, "num_timesteps": 1000}
    with pytest.raises(ValueError, match="no adapters to export: the run trained all weights"):
        export_adapters(dit(), **options)
    latte = Latte(4, 2, num_frames=3, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    add_adapters(latte, rank=2)
    with pytest.raises(ValueError, match="no pipeline for this Latte"):
        export_adapters(latte, **options)
    model = dit()
    add_adapters(model, rank=2, whole=["y_embedder.embedding_table.weight"], source="dit.pt")
    with pytest.raises(ValueError, match=r"y_embedder.* was too, for other classes than those of dit\.pt"):
        export_adapters(model, **options)


def test_the_tool_writes_a_folder_whose_card_has_the_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (
        "model.hidden_size=32",
        "model.depth=2",
        "model.num_heads=2",
        "precision=fp32",
        "max_training_steps=1",
    )
    base = build_trainer(load_config(DIGITS, "train", [f"experiment_dir={tmp_path / 'base'}", *size]))
    first = base.save()
    options = [f"experiment_dir={tmp_path / 'run'}", f"pretrained={first}", "lora.rank=2", *size]
    build_trainer(load_config(DIGITS, "train", options), weights=str(first)).save()
    arguments = ["-c", DIGITS, "--lora", "--out", str(tmp_path / "out"), *options]
    assert EXPORT["main"](arguments) == 0
    assert f"{WEIGHTS}, for DiTPipeline of {first}" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, FOLDER)" in card
    assert f"The adapters are for the weights of `{first}`" in card
    names = set(load_file(tmp_path / "out" / WEIGHTS))
    assert "transformer.transformer_blocks.1.attn1.to_q.lora_A.weight" in names
    assert len(names) == 2 * 2 * 4
    for changed, message in (
        (arguments, "--out needs a folder that does not exist"),
        ([*arguments, "--model-only"], "each writes a folder of its own, got --lora and --model-only"),
    ):
        assert EXPORT["main"](changed) == 2
        assert message in capsys.readouterr().err
