"""The phases sample and inference: images or videos from a trained model.

Dims: B samples, C channels, F frames (absent for images), H x W pixels.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from speedit_plugins.data.files import write_whole
from speedit_plugins.data.loader import IMAGE_STREAM, LABEL_STREAM, stream_seed
from speedit_plugins.diffusion import sampling
from speedit_plugins.engine import build, checkpoint, pictures, results
from speedit_plugins.engine.conditions import (
    Conditions,
    all_conditions,
    grid_conditions,
    null_condition,
    prompts,
)
from speedit_plugins.engine.inputs import Encoder, decode_video
from speedit_plugins.engine.replica import AUTOCAST
from speedit_plugins.engine.sample_sets import CAPTIONS, UNFINISHED
from speedit_plugins.engine.schema import ExperimentConfig
from speedit_plugins.engine.tracking import progress, say
from speedit_plugins.evaluation.npz import write_npz
from speedit_plugins.models.interface import Condition, input_shape
from speedit_plugins.models.pretrained import load_weights
from speedit_plugins.models.text import CaptionSource


def sample(config: ExperimentConfig) -> int:
    """Draws the sample grid, a column per class or prompt, `samples_per_class` rows; videos move too."""
    folder = Path(config.experiment_dir)
    generator, captions, source = load_generator(config)
    conditions, path = grid_conditions(config, captions), folder / results.SAMPLES
    if config.inpainting is not None:
        # It needs this module's generator.
        from speedit_plugins.engine.inpaint import draw_fills

        num_samples = draw_fills(generator, conditions, path)
    else:
        num_samples = _grid_size(config, conditions)
        num_batches = -(-num_samples // config.per_proc_batch_size)
        with progress("sampling", total=num_batches * config.sampler.num_steps) as bar:
            num_samples = draw_grid(generator, conditions, path, callback=lambda step, x: bar.update())
    results.save_config(config, "sample")
    say(f"sampled {num_samples} {generator.what} with the weights of {source}")
    results.say_where(folder)
    return 0


def inference(config: ExperimentConfig) -> int:
    """Draws `num_samples` images of random classes or the prompts in turn: PNG files and one ADM-format npz.

    Videos become MP4 files. Prompts are written beside them, as captions.jsonl. The folder has its name when
    it is whole.

    Raises:
        ValueError: an earlier inference has written under the same name.
    """
    source = find_weights(config)
    folder = Path(config.experiment_dir) / results.INFERENCE / _name(config, source)
    suffixes = (UNFINISHED, ".npz", f".npz{UNFINISHED}")
    partial, npz, partial_npz = (folder.with_name(f"{folder.name}{suffix}") for suffix in suffixes)
    for path in (folder, npz):
        if path.exists():
            raise ValueError(f"inference would write over {path}; move or delete it")
    generator, captions, _ = load_generator(config)
    conditions = all_conditions(config, captions)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with progress("inference", total=config.num_samples, unit=generator.what[:-1]) as bar:
        if config.num_frames:
            for _ in _written(generator, conditions, partial, bar):
                pass
        else:
            written = _written(generator, conditions, partial, bar)
            write_npz(partial_npz, written, num_images=config.num_samples)
    partial.rename(folder)
    if not config.num_frames:
        partial_npz.rename(npz)
    results.save_config(config, "inference")
    say(f"drew {config.num_samples} {generator.what} with the weights of {source}")
    say(f"  {generator.what:<12} {folder}/")
    if not config.num_frames:
        say(f"  npz          {npz}")
    return 0


def _name(config: ExperimentConfig, source: Path) -> str:
    """What decides the samples, as far as a name has room."""
    # A checkpoint's folder stands for its average.
    parts = [source.name if source.is_dir() else source.stem]
    if source.name == checkpoint.EMA:
        parts = [source.absolute().parent.name]
    elif source.name == checkpoint.MODEL:
        parts = [source.absolute().parent.name, source.stem]
    sampler = config.sampler
    parts += [f"{sampler.type}{sampler.num_steps}", *([f"eta{sampler.eta:g}"] if sampler.eta else [])]
    parts += [f"n{config.num_samples}", f"cfg{config.guidance_scale:g}", f"seed{config.seed}"]
    if config.text_encoder is not None:
        parts.append(f"prompts{hashlib.sha256(json.dumps(prompts(config)).encode()).hexdigest()[:8]}")
    return "_".join(parts)


class SampleGenerator:
    """Draws images or videos as `sampler`, `guidance_scale` and `seed` of the config say.

    Args:
        model: on the device that samples are drawn on.
        process: not respaced.
        encoder: decodes what the model draws.

    Raises:
        ValueError: guidance that the model or the encoder's channels do not allow.
    """

    def __init__(
        self, model: nn.Module, process: build.Process, encoder: Encoder, config: ExperimentConfig
    ) -> None:
        self.model, self.process, self.encoder, self.config = model, process, encoder, config
        self.what = "videos" if config.num_frames else "images"
        self.device = next(model.parameters()).device
        if config.num_classes and config.guidance_scale != 1 and model.null_label is None:
            raise ValueError(
                f"guidance_scale {config.guidance_scale} needs a model with class_dropout_prob > 0;"
                " this one has no null label"
            )
        channels = config.sampler.guidance_channels
        if channels is not None and channels > encoder.channels:
            raise ValueError(
                f"sampler.guidance_channels needs <= {encoder.channels} channels, got {channels}"
            )

    def draw(
        self,
        condition: Condition,
        num_samples: int,
        *,
        weights: Mapping[str, Tensor] | None = None,
        stream: int = 0,
        callback: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """`num_samples` samples (B, C, [F,] H, W), about [-1, 1], a function of the seed and `stream`.

        Args:
            condition: of B samples; None for an unconditional model.
            weights: parameters by name in place of the model's own, such as an average of them.
            stream: batches of one run draw from different streams, >= 0.
            callback: told the number of sampling steps done, and x, after each.
        """
        seed = stream_seed(self.config.seed, IMAGE_STREAM, stream)
        generator = torch.Generator(self.device).manual_seed(seed)
        options = self.config.sampler
        is_guided = condition is not None and self.config.guidance_scale != 1
        is_training = self.model.training
        self.model.eval()
        try:
            latents = sampling.sample(
                self._model_with(weights),
                self.process,
                torch.randn((num_samples, *input_shape(self.model)), generator=generator, device=self.device),
                condition=condition,
                null_condition=null_condition(self.model, condition) if is_guided else None,
                sampler=cast(str, options.type),
                num_steps=options.num_steps,
                guidance_scale=self.config.guidance_scale,
                guidance_channels=options.guidance_channels,
                clip_sample=options.clip_sample,
                eta=options.eta,
                generator=generator,
                callback=callback,
            )
            return decode_video(self.encoder, latents) if latents.ndim == 5 else self.encoder.decode(latents)
        finally:
            self.model.train(is_training)

    def draw_batches(
        self,
        condition_of: Callable[[Tensor], Condition],
        rows: Tensor,
        *,
        weights: Mapping[str, Tensor] | None = None,
        callback: Callable[[int, Tensor], object] | None = None,
    ) -> Iterator[Tensor]:
        """Samples of the conditions at rows (N,), `per_proc_batch_size` (B, C, [F,] H, W) at a time.

        Args:
            condition_of: the conditions at some of the rows, on the device.
            weights, callback: see `draw`; steps are counted in each batch.
        """
        start = 0
        for some in rows.split(self.config.per_proc_batch_size):
            yield self.draw(condition_of(some), len(some), weights=weights, stream=start, callback=callback)
            start += len(some)

    def _model_with(self, weights: Mapping[str, Tensor] | None) -> sampling.Model:
        own = dict(weights or {})
        is_half = self.config.precision != "fp32"

        def model(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
            with torch.autocast(x.device.type, AUTOCAST[self.config.precision], enabled=is_half):
                return cast(Tensor, functional_call(self.model, own, (x, timestep, condition)))

        return model


def _grid_size(config: ExperimentConfig, conditions: Conditions) -> int:
    """Samples of a grid, of which a model without conditions has one row."""
    return config.samples_per_class * max(1, len(conditions.names))


def draw_grid(
    generator: SampleGenerator,
    conditions: Conditions,
    path: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
) -> int:
    """Writes the grid of `samples_per_class` samples of each condition as PNG; returns how many samples.

    Of videos the PNG shows frames from left to right, and the grid also moves, as MP4 and GIF beside it.

    Args:
        weights: see `SampleGenerator.draw`, as for `callback`.
    """
    config = generator.config
    columns = len(conditions.names) or min(8, config.samples_per_class)
    num_samples = _grid_size(config, conditions)
    rows = torch.arange(num_samples) % columns
    batches = generator.draw_batches(
        lambda some: conditions.of(some, generator.device), rows, weights=weights, callback=callback
    )
    samples = torch.cat([batch.cpu() for batch in batches])
    path.parent.mkdir(parents=True, exist_ok=True)
    # A class is its column; a prompt has to be read.
    titles = conditions.names if conditions.captions is not None else ()
    if samples.ndim == 5:
        pictures.save_videos(
            samples, path, columns=columns, titles=titles, frames_per_second=config.frames_per_second
        )
    else:
        pictures.save_grid(samples, path, columns=columns, titles=titles)
    return num_samples


def _written(generator: SampleGenerator, conditions: Conditions, folder: Path, bar: Any) -> Iterator[Any]:
    """Chunks of uint8 samples (B, [F,] H, W, C), each written to `folder` before it is given on."""
    config = generator.config
    chooser = torch.Generator().manual_seed(stream_seed(config.seed, LABEL_STREAM))
    rows = torch.arange(config.num_samples) % max(1, len(conditions.names))
    if conditions.labels is not None:
        rows = torch.randint(len(conditions.names), (config.num_samples,), generator=chooser)
    done = 0
    for batch in generator.draw_batches(lambda some: conditions.of(some, generator.device), rows):
        samples = pictures.to_uint8(batch)
        for i, item in enumerate(samples, start=done):
            pictures.save(item, folder / f"{i:06d}", frames_per_second=config.frames_per_second)
        done += len(samples)
        bar.update(len(samples))
        yield samples
    if conditions.captions is not None:
        suffix = ".mp4" if config.num_frames else ".png"
        captions = (conditions.names[row] for row in rows.tolist())
        lines = [
            json.dumps({"file_name": f"{i:06d}{suffix}", "caption": text}) for i, text in enumerate(captions)
        ]
        write_whole(folder / CAPTIONS, "".join(f"{line}\n" for line in lines).encode())


def load_generator(config: ExperimentConfig) -> tuple[SampleGenerator, CaptionSource | None, Path]:
    """The generator with averaged weights, the text encoder, and where the weights come from."""
    source = find_weights(config)
    device = build.build_device(config)
    encoder = build.build_encoder(config, device)
    captions = build.build_text_encoder(config, device)
    model = build.build_model(config, encoder, captions).to(device)
    load_weights(model, source / checkpoint.EMA if source.is_dir() else source)
    process = build.build_process(config, respaced=False)
    return SampleGenerator(model, process, encoder, config), captions, source


def find_weights(config: ExperimentConfig) -> Path:
    """`ckpt_path`, or the newest whole checkpoint's folder, which holds averaged weights.

    Raises:
        ValueError: there is none.
    """
    checkpoints = Path(config.experiment_dir) / results.CHECKPOINTS
    found = checkpoint.newest_first(checkpoints)
    named = config.ckpt_path
    source = Path(named) if named else checkpoint.newest_whole(found, only=checkpoint.EMA)
    if source is None:
        raise ValueError(f"no checkpoint in {checkpoints}: train first, or give ckpt_path")
    if source.is_dir() and not (source / checkpoint.EMA).is_file():
        raise ValueError(
            f"ckpt_path needs a file or a step_... folder, got {source} without {checkpoint.EMA}"
        )
    return source
