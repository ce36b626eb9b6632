"""Exports a trained model as a diffusers pipeline for `from_pretrained`, or for `load_stages`.

    python tools/export.py -c image/imagenet_256/dit_xl2.yaml --out pipeline
    python tools/export.py -c text_to_image/emoji_pixart.yaml --out exported --model-only
    python tools/export.py -c text_to_image/sd15.yaml --out adapters --lora lora.rank=16
    python tools/export.py -c text_to_image/cascade_emoji_32.yaml --for-loader 'cascade=[RUN]'

    DiT with classes  ->  DiTPipeline
    PixArt            ->  PixArtAlphaPipeline
    LatteT2V          ->  LattePipeline
    UNet              ->  StableDiffusionPipeline

Each pipeline has a DDIM scheduler on the timesteps 0, T // N, 2 (T // N), ... Our sampler `ddim_leading`, or
`ddim_leading_1` for Stable Diffusion, gives the same images from the same noise, except for differences that
the model card lists. A pipeline needs latents: for a model of pixels only the model and the scheduler can be
written, with --model-only.

The weights are the averaged ones of the newest checkpoint in experiment_dir, or of ckpt_path, as safetensors;
those of the model if the run keeps no average. Adapters (LoRA) are merged into them. With --lora the adapters
alone are written, as pytorch_lora_weights.safetensors: a pipeline of the adapted model takes them by
load_lora_weights. Pipelines without that take them by peft, from the two files beside it; the model card has
the lines.
With --for-loader a folder is written that `load_stages` of this package draws with. It takes every model but
those of inpainting: flows, super-resolution, shapes, and all stages of a `cascade`.
The model card README.md has the config, the data and the last metrics.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

from speedit_plugins.files import naming, usual_mode
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.loading import load_config, to_yaml
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.yaml_text import one_line
from speedit_plugins.trainer.data.loader import IMAGE_STREAM, stream_seed
from speedit_plugins.trainer.logging.tracking import latest, read_metrics
from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder
from speedit_plugins.trainer.models.pretrained.exported import (
    Exported,
    Pipeline,
    check_pipeline,
    export_model,
    save_pipeline,
    save_scheduler,
)
from speedit_plugins.trainer.models.pretrained.exported_adapters import (
    WEIGHTS,
    ExportedAdapters,
    export_adapters,
    save_adapters,
)
from speedit_plugins.trainer.models.pretrained.text import TextEncoder
from speedit_plugins.trainer.sampling.exported_stages import write_stages
from speedit_plugins.trainer.sampling.generator import SampleGenerator, load_generator

# The options that choose a form, and the folder that each writes in experiment_dir by default.
_FORMS = {"lora": "lora", "for-loader": "stages", "model-only": "pipeline"}
CLIPPED_NOTE = (
    "Sampling clamps x_0 (sampler.clip_sample). For the same steps, call scheduler.step(...,"
    " use_clipped_model_output=True)."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, "sample", arguments.overrides, imports=arguments.imports)
        given = [name for name in _FORMS if getattr(arguments, name.replace("-", "_"))]
        if len(given) > 1:
            raise ValueError(
                f"each writes a folder of its own, got --{' and --'.join(given)}; wanted one of them"
            )
        folder = arguments.out or Path(config.experiment_dir) / _FORMS[given[0] if given else "model-only"]
        if arguments.lora:
            said = export_lora(config, folder)
        elif arguments.for_loader:
            said = export_stages(config, folder)
        else:
            said = export(config, folder, model_only=arguments.model_only)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(said)
    return 0


def export(config: ExperimentConfig, folder: Path, *, model_only: bool = False) -> str:
    """Writes the folder, complete or not at all, and returns a short description of its content.

    Raises:
        ValueError: the folder exists, no pipeline fits the model, the pipeline would give other samples, or
            the model has no latents and `model_only` is False.
    """
    if folder.exists():
        raise ValueError(f"--out needs a folder that does not exist, got {folder}")
    _check(config, model_only)
    generator, captions, source = load_generator(config)
    exported = export_model(
        generator.model,
        num_steps=config.sampler.num_steps,
        num_timesteps=config.diffusion.diffusion_steps,
    )
    if config.sampler.is_clamped:
        exported = replace(exported, notes=(*exported.notes, CLIPPED_NOTE))
    text = captions if isinstance(captions, TextEncoder) else None
    if not model_only:
        check_pipeline(exported, generator.encoder, text)
    with _published(folder) as partial:
        _write(partial, config, exported, generator, text, model_only=model_only)
        usage = "" if model_only else _usage(config, exported.pipeline, generator.device.type)
        (partial / "README.md").write_text(_card(config, exported.notes, source, usage), encoding="utf-8")
    pipeline = exported.pipeline
    what = f"{pipeline.subfolder} and scheduler" if model_only else pipeline.name
    lines = [f"{folder}: {what}, with the weights of {source}", *exported.notes]
    return "\n".join(lines)


def export_lora(config: ExperimentConfig, folder: Path) -> str:
    """Writes the folder with the adapters alone, complete or not at all, and returns a short description.

    Raises:
        ValueError: the folder exists, the run trained no adapters, or no pipeline fits the model.
    """
    if folder.exists():
        raise ValueError(f"--out needs a folder that does not exist, got {folder}")
    generator, _, source = load_generator(config)
    exported = export_adapters(
        generator.model,
        num_steps=config.sampler.num_steps,
        num_timesteps=config.diffusion.diffusion_steps,
    )
    usage, base = _lora_usage(exported), exported.adapters.source
    with _published(folder) as partial:
        partial.mkdir(parents=True)
        save_adapters(partial, exported)
        (partial / "README.md").write_text(_card(config, exported.notes, source, usage), encoding="utf-8")
    return f"{folder}: {WEIGHTS}, for {exported.pipeline.name} of {base}, with the adapters of {source}"


def export_stages(config: ExperimentConfig, folder: Path) -> str:
    """Writes the folder for `load_stages`, complete or not at all, and returns a short description.

    Raises:
        ValueError: the folder exists, or see `write_stages`.
    """
    if folder.exists():
        raise ValueError(f"--out needs a folder that does not exist, got {folder}")
    with _published(folder) as partial:
        sources = write_stages(partial, config)
        card = _card(config, (), sources[-1], _stages_usage(config), library="speedit_plugins")
        (partial / "README.md").write_text(card, encoding="utf-8")
    lines = (f"  stage_{number}: the weights of {source}" for number, source in enumerate(sources))
    return "\n".join([f"{folder}: for load_stages of speedit_plugins", *lines])


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """A context with the path of a folder to write. It becomes `folder` when it is complete."""
    partial = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(folder, also=partial):
            yield partial
            # safetensors makes its files private to the user.
            mode = usual_mode(partial)
            for path in partial.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(
    folder: Path,
    config: ExperimentConfig,
    exported: Exported,
    generator: SampleGenerator,
    text: TextEncoder | None,
    *,
    model_only: bool,
) -> None:
    folder.mkdir(parents=True)
    options = {
        "num_timesteps": config.diffusion.diffusion_steps,
        "noise_schedule": config.diffusion.noise_schedule,
        "zero_terminal_snr": config.diffusion.zero_terminal_snr,
        "prediction_type": config.diffusion.prediction_type,
        "clip_sample": config.sampler.is_clamped,
    }
    if model_only:
        exported.net.save_pretrained(folder / exported.pipeline.subfolder)
        save_scheduler(folder / "scheduler", steps_offset=exported.pipeline.steps_offset, **options)
    else:
        save_pipeline(folder, exported, cast(Autoencoder, generator.encoder), text, **options)


def _check(config: ExperimentConfig, model_only: bool) -> None:
    if config.diffusion.is_flow:
        raise ValueError(
            "no pipeline of diffusers samples a RectifiedFlow with these models; --for-loader writes a folder"
            " for load_stages, and tools/convert_checkpoint.py the weights as .pt for other code"
        )
    if config.inpainting is not None:
        raise ValueError("inpainting models cannot be exported; wanted inpainting: null")
    is_unet = model_only and config.model["type"] == "UNet"
    if config.cascade or (config.super_resolution.factor and not is_unet):
        raise ValueError(
            "no pipeline of diffusers samples these super-resolution models; --for-loader writes a folder for"
            f" load_stages, and --model-only a UNet without its cascade; got {config.model['type']}"
        )
    if config.voxel_size:
        raise ValueError(
            f"diffusers has no {config.model['type']}; --for-loader writes a folder for load_stages, with the"
            " weights under the names of DiT-3D"
        )
    if config.encoder["type"] == "Pixels" and not model_only:
        raise ValueError(
            "a pipeline needs latents, got a model of pixels (encoder: Pixels); --model-only writes the model"
            " and the scheduler, and --for-loader a folder for load_stages"
        )
    if config.sampler.percentile is not None:
        raise ValueError(
            "an exported scheduler has no dynamic thresholding; wanted sampler.thresholding static or null"
        )
    if config.sampler.is_clamped and not model_only:
        raise ValueError(
            "with sampler.clip_sample a pipeline clamps x_0 but keeps the predicted noise, unlike our"
            " sampling; wanted clip_sample false, or --model-only"
        )


def _card(
    config: ExperimentConfig,
    said: Sequence[str],
    source: Path,
    usage: str,
    *,
    library: str = "diffusers",
) -> str:
    rows = read_metrics(Path(config.experiment_dir))
    last = {k: v for k, v in latest(rows).items() if isinstance(v, int | float)}
    metrics = "\n".join(f"| {name} | {value:.6g} |" for name, value in last.items()) or "| none | |"
    named = dict.fromkeys((library, "speedit_plugins", config.diffusion.policy.get("type", "custom")))
    tags = "\n".join(f"- {tag}" for tag in named)
    notes = "".join(f"\n{note}\n" for note in said)
    return f"""---
library_name: {library}
tags:
{tags}
---

# {config.experiment_name or Path(config.experiment_dir).name}

Trained by speedit_plugins with the timestep policy `{one_line(config.diffusion.policy)}` on the dataset
`{config.data.dataset}`.
The weights are {_kind(config, source)} `{source.name}`.
{usage}{notes}
## Last metrics

| | |
|---|---|
{metrics}

## Config

```yaml
{to_yaml(config).strip()}
```
"""


def _kind(config: ExperimentConfig, source: Path) -> str:
    is_averaged = source.is_dir() and checkpoints.sampled_file(source) == checkpoints.EMA
    return "the exponential moving average of" if is_averaged else "those of"


def _usage(config: ExperimentConfig, pipeline: Pipeline, device: str) -> str:
    seed = stream_seed(config.seed, IMAGE_STREAM, 0)
    scale = 1.0 if pipeline.guided_note else config.guidance_scale
    changes = (
        f"guidance_scale={scale:g} sampler.type={pipeline.sampler} sampler.eta=0"
        f" sampler.guidance_channels=null precision=fp32 device={device}"
    )
    if config.sampler.guidance_schedule != "constant":
        # A pipeline has one scale for all steps.
        own = "sampler.guidance_power=null sampler.guidance_interval=[]"
        changes = f"{changes} sampler.guidance_schedule=constant {own}"
    return f"""
```python
import torch
from diffusers import {pipeline.name}

pipeline = {pipeline.name}.from_pretrained(FOLDER).to("{device}")
# With this generator, num_inference_steps={config.sampler.num_steps} and guidance_scale={scale:g}
# the images equal those of `speedit -p sample {changes}`.
generator = torch.Generator("{device}").manual_seed({seed})
```
"""


def _stages_usage(config: ExperimentConfig) -> str:
    given = []
    if config.num_classes:
        given.append(str(config.sample_classes[:2]))
    elif config.text_encoder is not None:
        given.append(str(config.sample_prompts[:2] or ["a caption"]))
    if config.super_resolution.factor and not config.cascade:
        given.append("low_resolution=images")
    arguments = ", ".join(given or ["num_samples=2"])
    return f"""
```python
from speedit_plugins.trainer.sampling.exported_stages import load_stages

stages = load_stages(FOLDER)
samples = stages({arguments}, seed={config.seed})[-1]  # a tensor; [:-1] are the samples of the earlier stages
```
"""


def _lora_usage(exported: ExportedAdapters) -> str:
    name, part = exported.pipeline.name, exported.pipeline.subfolder
    imported, load = "", "pipeline.load_lora_weights(FOLDER)"
    if not exported.has_loader:
        imported = "from peft import PeftModel\n"
        load = f"pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, FOLDER)"
    return f"""
```python
from diffusers import {name}
{imported}
pipeline = {name}.from_pretrained(BASE)
{load}
```
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-c", "--config", required=True, help="config of the training run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the config")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: in experiment_dir pipeline/, lora/ or stages/"
    )
    parser.add_argument("--model-only", action="store_true", help="write only the model and the scheduler")
    parser.add_argument(
        "--for-loader",
        action="store_true",
        help="write a folder for load_stages, with all stages of a cascade",
    )
    parser.add_argument("--lora", action="store_true", help="write only the adapters, unmerged")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers what the config names; may be given several times",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
