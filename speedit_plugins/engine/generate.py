"""The phases sample and inference: images from a trained model.

Dims: B images, C channels, H x W pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from speedit_plugins.data.loader import IMAGE_STREAM, LABEL_STREAM, stream_seed
from speedit_plugins.diffusion import sampling
from speedit_plugins.diffusion.process import GaussianProcess
from speedit_plugins.engine import build, checkpoint, pictures, results
from speedit_plugins.engine.replica import AUTOCAST
from speedit_plugins.engine.schema import ExperimentConfig
from speedit_plugins.engine.tracking import progress, say
from speedit_plugins.evaluation.npz import write_npz
from speedit_plugins.models.pretrained import load_weights


def sample(config: ExperimentConfig) -> int:
    """Draws `samples.png`: a column per class of `sample_classes`, `samples_per_class` rows."""
    folder = Path(config.experiment_dir)
    generator, source = _load_generator(config)
    with progress("sampling", total=config.sampler.num_steps) as bar:
        num_images = draw_grid(generator, folder / results.SAMPLES, callback=lambda step, x: bar.update())
    results.save_config(config, "sample")
    say(f"sampled {num_images} images with the weights of {source}")
    results.say_where(folder)
    return 0


def inference(config: ExperimentConfig) -> int:
    """Draws `num_samples` images of random classes: PNG files, and one ADM-format npz."""
    generator, source = _load_generator(config)
    weights = source.name if source.is_dir() else source.stem
    name = f"{weights}_n{config.num_samples}_cfg{config.guidance_scale:g}_seed{config.seed}"
    folder = Path(config.experiment_dir) / results.INFERENCE / name
    folder.mkdir(parents=True, exist_ok=True)
    npz = folder.with_name(f"{name}.npz")
    with progress("inference", total=config.num_samples, unit="image") as bar:
        write_npz(npz, _written(generator, folder, bar), num_images=config.num_samples)
    results.save_config(config, "inference")
    say(f"drew {config.num_samples} images with the weights of {source}")
    say(f"  images       {folder}/")
    say(f"  npz          {npz}")
    return 0


class ImageGenerator:
    """Draws images as `sampler`, `guidance_scale` and `seed` of the config say.

    Args:
        model: on the device that images are drawn on.
        process: not respaced.
        encoder: decodes what the model draws.

    Raises:
        ValueError: guidance that the model or the encoder's channels do not allow.
    """

    def __init__(
        self, model: nn.Module, process: GaussianProcess, encoder: build.Encoder, config: ExperimentConfig
    ) -> None:
        self.model, self.process, self.encoder, self.config = model, process, encoder, config
        self._null_label = cast(int | None, model.null_label)
        if config.num_classes and config.guidance_scale != 1 and self._null_label is None:
            raise ValueError(
                f"guidance_scale {config.guidance_scale} needs a model with class_dropout_prob > 0;"
                " this one has no null label"
            )
        channels = config.sampler.guidance_channels
        if channels is not None and channels > encoder.channels:
            raise ValueError(
                f"sampler.guidance_channels needs <= {encoder.channels} channels, got {channels}"
            )

    def images(
        self,
        labels: Tensor | None,
        num_images: int,
        *,
        weights: Mapping[str, Tensor] | None = None,
        stream: int = 0,
        callback: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """`num_images` images (B, C, H, W), about [-1, 1], a function of the seed and `stream`.

        Args:
            labels: int64 (B,) classes; None for an unconditional model.
            weights: parameters by name in place of the model's own, such as an average of them.
            stream: batches of one run draw from different streams, >= 0.
            callback: told the number of sampling steps done, and x, after each.
        """
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(stream_seed(self.config.seed, IMAGE_STREAM, stream))
        size = self.config.image_size // self.encoder.downsample
        shape = (num_images, self.encoder.channels, size, size)
        options = self.config.sampler
        condition = None if labels is None else labels.to(device)
        is_training = self.model.training
        self.model.eval()
        try:
            latents = sampling.sample(
                self._model_with(weights),
                self.process,
                torch.randn(shape, generator=generator, device=device),
                condition=condition,
                null_condition=self._null_labels(condition),
                sampler=options.type,
                num_steps=options.num_steps,
                guidance_scale=self.config.guidance_scale,
                guidance_channels=options.guidance_channels,
                clip_sample=options.clip_sample,
                eta=options.eta,
                generator=generator,
                callback=callback,
            )
        finally:
            self.model.train(is_training)
        return self.encoder.decode(latents)

    def _model_with(self, weights: Mapping[str, Tensor] | None) -> sampling.Model:
        own = dict(weights or {})
        is_half = self.config.precision != "fp32"

        def model(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
            with torch.autocast(x.device.type, AUTOCAST[self.config.precision], enabled=is_half):
                return cast(Tensor, functional_call(self.model, own, (x, timestep, condition)))

        return model

    def _null_labels(self, condition: Tensor | None) -> Tensor | None:
        if condition is None or self.config.guidance_scale == 1:
            return None
        assert self._null_label is not None
        return torch.full_like(condition, self._null_label)


def draw_grid(
    generator: ImageGenerator,
    path: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
) -> int:
    """Writes the grid of the config's `sample_classes` x `samples_per_class` as PNG; returns how many images.

    Args:
        weights: see `ImageGenerator.images`, as for `callback`.
    """
    config = generator.config
    classes = torch.tensor(config.sample_classes) if config.num_classes else None
    columns = min(8, config.samples_per_class) if classes is None else len(classes)
    num_images = config.samples_per_class * (1 if classes is None else columns)
    labels = None if classes is None else classes.repeat(config.samples_per_class)
    images = generator.images(labels, num_images, weights=weights, callback=callback)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_grid(images, path, columns=columns)
    return num_images


def _written(generator: ImageGenerator, folder: Path, bar: Any) -> Iterator[Any]:
    """Chunks of uint8 images (B, H, W, C), each written to `folder` as PNG files before it is given on."""
    config = generator.config
    chooser = torch.Generator().manual_seed(stream_seed(config.seed, LABEL_STREAM))
    for start in range(0, config.num_samples, config.per_proc_batch_size):
        count = min(config.per_proc_batch_size, config.num_samples - start)
        labels = None
        if config.num_classes:
            labels = torch.randint(config.num_classes, (count,), generator=chooser)
        images = pictures.to_uint8(generator.images(labels, count, stream=start))
        for i, image in enumerate(images, start=start):
            pictures.save_png(image, folder / f"{i:06d}.png")
        bar.update(count)
        yield images


def _load_generator(config: ExperimentConfig) -> tuple[ImageGenerator, Path]:
    """The generator with averaged weights, and the checkpoint or file they come from."""
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
    device = build.build_device(config)
    encoder = build.build_encoder(config, device)
    model = build.build_model(config, encoder).to(device)
    load_weights(model, source / checkpoint.EMA if source.is_dir() else source)
    return ImageGenerator(model, build.build_process(config, respaced=False), encoder, config), source
