"""Exports adapters alone, in the form in which diffusers keeps them.

Dims: `D` width, `r` rank.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.lora import Adapters, adapters_of, factors
from speedit_plugins.trainer.models.pretrained.exported import PIPELINES, Pipeline, check_dit, timestep_fit
from speedit_plugins.trainer.models.text_conditioned.wrapper import TextConditioned

WEIGHTS = "pytorch_lora_weights.safetensors"
# The name of a layer of DiT in a block of diffusers, and at the top.
_OF_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "adaLN_modulation.1": ("norm1.linear",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_OF_TOP = {"final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
# In diffusers every block has its own copy.
_OF_TIMESTEP = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}


@dataclass(frozen=True, eq=False)
class ExportedAdapters:
    """The adapters for a network of diffusers: A (r, inputs) and B (outputs, r) by the name of the layer."""

    factors: dict[str, tuple[Tensor, Tensor]]
    adapters: Adapters
    targets: tuple[str, ...]
    pipeline: Pipeline

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user, as in `Exported`."""
        adapters = self.adapters
        return (f"The adapters are for the weights of `{adapters.source}` (SHA-256 {adapters.base[:12]}).",)

    @property
    def has_loader(self) -> bool:
        """Whether the pipeline has `load_lora_weights`; peft loads into the network of the others."""
        import diffusers

        return hasattr(getattr(diffusers, self.pipeline.name), "load_lora_weights")


def export_adapters(model: nn.Module, *, num_steps: int, num_timesteps: int) -> ExportedAdapters:
    """The adapters of a trained model, for its network in diffusers without them.

    Args:
        model: with the adapters, as it was trained.
        num_steps: see `export_model`.
        num_timesteps: see `export_model`.

    Raises:
        ValueError: the model has no adapters, diffusers has no pipeline for it, or more than the adapters was
            trained.
    """
    adapters = adapters_of(model)
    if adapters is None:
        raise ValueError("no adapters to export: the run trained all weights; wanted one with lora.rank")
    others = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if others:
        raise ValueError(
            f"adapters alone are not what was trained: {others[0]} was too, for other classes than those of"
            f" {adapters.source}; wanted the export with merged adapters"
        )
    found = {name: (a.float().cpu(), b.float().cpu()) for name, (a, b) in factors(model).items()}
    if isinstance(model, TextConditioned):
        pipeline = PIPELINES[type(model.net).__name__]
        return ExportedAdapters(found, adapters, adapters.targets, pipeline)
    dit = check_dit(model)
    renamed = dict(_of_dit(found, dit, num_steps, num_timesteps))
    targets = sorted({_end(name) for name in renamed})
    return ExportedAdapters(renamed, adapters, tuple(targets), PIPELINES["DiTTransformer2DModel"])


def save_adapters(folder: Path, exported: ExportedAdapters) -> None:
    """Writes `pytorch_lora_weights.safetensors`, with rank, alpha and targets in its metadata.

    If the pipeline has no `load_lora_weights`, the two files of `PeftModel.from_pretrained` are beside it.
    """
    from diffusers.loaders.lora_base import LoraBaseMixin
    from peft import LoraConfig
    from safetensors.torch import save_file

    options = LoraConfig(
        r=exported.adapters.rank,
        lora_alpha=cast(Any, exported.adapters.alpha),
        target_modules=list(exported.targets),
    )
    prefix = exported.pipeline.subfolder
    LoraBaseMixin.write_lora_layers(
        state_dict=_named(exported, prefix),
        save_directory=str(folder),
        is_main_process=True,
        weight_name=WEIGHTS,
        save_function=None,
        safe_serialization=True,
        lora_adapter_metadata={f"{prefix}.{key}": value for key, value in _plain(options).items()},
    )
    if not exported.has_loader:
        options.inference_mode = True
        options.save_pretrained(str(folder))
        tensors = _named(exported, "base_model.model")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _named(exported: ExportedAdapters, prefix: str) -> dict[str, Tensor]:
    """A and B under the names that diffusers, or peft, gives them."""
    return {
        f"{prefix}.{layer}.lora_{part}.weight": factor.contiguous()
        for layer, pair in exported.factors.items()
        for part, factor in zip("AB", pair, strict=True)
    }


def _plain(options: Any) -> dict[str, Any]:
    """The options in plain values, as JSON keeps them."""
    listed = {
        key: sorted(value) if isinstance(value, set) else value for key, value in options.to_dict().items()
    }
    return cast(dict[str, Any], json.loads(json.dumps(listed, default=str)))


def _of_dit(
    found: dict[str, tuple[Tensor, Tensor]], model: DiT, num_steps: int, num_timesteps: int
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """The adapters of a DiT under diffusers' names. The three of `qkv` share A."""
    fit = timestep_fit(num_steps, num_timesteps)[0]
    for name, (down, up) in found.items():
        if name in _OF_TOP:
            yield _OF_TOP[name], (down, up)
        elif name in _OF_TIMESTEP:
            first = (down.double() @ fit).float() if name == "t_embedder.mlp.0" else down
            for index in range(len(model.blocks)):
                # Copied, because a safetensors file takes no tensor twice.
                yield f"transformer_blocks.{index}.{_OF_TIMESTEP[name]}", (first.clone(), up.clone())
        else:
            _, number, layer = name.split(".", 2)
            theirs = _OF_BLOCK[layer]
            for place, part in zip(theirs, up.chunk(len(theirs)), strict=True):
                yield f"transformer_blocks.{number}.{place}", (down.clone(), part.clone())


def _end(name: str) -> str:
    """The end of a layer's name that all blocks share."""
    return name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name
