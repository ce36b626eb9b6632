"""Draws samples from a trained model, as the config's sampler, guidance and seed say.

Dims: B samples, C channels, F frames (absent for images), H x W pixels.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from speedit_plugins.trainer import build, checkpoints, results
from speedit_plugins.trainer.checkpoints.best import BEST, FILE, read_best
from speedit_plugins.trainer.checkpoints.paths import named_checkpoint
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import IMAGE_STREAM, stream_seed
from speedit_plugins.trainer.data.shapes.normalization import Normalization
from speedit_plugins.trainer.diffusion import sampling
from speedit_plugins.trainer.diffusion.guidance import GuidanceSchedule, Model, guidance_schedule
from speedit_plugins.trainer.inputs import Encoder, decoded
from speedit_plugins.trainer.layouts import plural
from speedit_plugins.trainer.models.interface import input_shape
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.parallel.replica import AUTOCAST
from speedit_plugins.trainer.parallel.runtime import build_device
from speedit_plugins.trainer.sampling.conditions import null_condition
from speedit_plugins.trainer.sampling.files.shape_files import read_normalization
from speedit_plugins.trainer.sampling.same_meaning import check_drawn
from speedit_plugins.trainer.starting_weights import load_trained
from speedit_plugins.trainer.terminal import say


class SampleGenerator:
    """Draws images, videos or shapes as `sampler`, `guidance_scale` and `seed` of the config say.

    Args:
        model: on the device where samples are drawn.
        process: the process without respacing.
        encoder: decodes the model's latents.
        config: the experiment.
        source: the weights that the model has, for messages.
        normalization: of the data set of point clouds, undone in samples; None leaves them as they are.

    Raises:
        ValueError: the model or the encoder's channels do not allow the config's guidance.
    """

    def __init__(
        self,
        model: nn.Module,
        process: build.Process,
        encoder: Encoder,
        config: ExperimentConfig,
        *,
        source: str | Path = "the model",
        normalization: Normalization | None = None,
    ) -> None:
        self.source, self.normalization = source, normalization
        self.model, self.process, self.encoder, self.config = model, process, encoder, config
        self.what = plural(config)
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
        """`num_samples` samples (B, C, [F,] H, W), about [-1, 1]. They depend on the seed and `stream` only.

        Shapes are voxels (B, C, D, H, W), about [-1, 1], or points (B, C, N) in the units of the data.

        Args:
            condition: condition of the B samples; None for an unconditional model.
            weights: parameters by name that replace the model's own, such as averaged weights.
            stream: number of the random stream, >= 0; each batch of a run has its own.
            callback: called after each sampling step with the number of steps done, and x.
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
                guidance_schedule=self._guidance_schedule() if is_guided else None,
                clip_sample=options.is_clamped,
                dynamic_percentile=options.percentile,
                eta=options.eta,
                generator=generator,
                callback=callback,
            )
            samples = decoded(self.encoder, latents)
            return samples if self.normalization is None else self.normalization.invert(samples)
        finally:
            self.model.train(is_training)

    def _guidance_schedule(self) -> GuidanceSchedule | None:
        options = self.config.sampler
        return guidance_schedule(
            options.guidance_schedule, power=options.guidance_power, interval=options.guidance_interval
        )

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
            weights: as in `draw`.
            callback: as in `draw`; steps are counted in each batch.
        """
        start = 0
        for some in rows.split(self.config.per_proc_batch_size):
            yield self.draw(condition_of(some), len(some), weights=weights, stream=start, callback=callback)
            start += len(some)

    def _model_with(self, weights: Mapping[str, Tensor] | None) -> Model:
        own = dict(weights or {})
        is_half = self.config.precision != "fp32"

        def model(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
            with torch.autocast(x.device.type, AUTOCAST[self.config.precision], enabled=is_half):
                return cast(Tensor, functional_call(self.model, own, (x, timestep, condition)))

        return model


def load_generator(
    config: ExperimentConfig, source: Path | None = None, *, captions: CaptionSource | None = None
) -> tuple[SampleGenerator, CaptionSource | None, Path]:
    """The generator with averaged weights, or the model's if none are kept; text encoder; weights' path.

    Args:
        config: the experiment.
        source: what `find_weights` found before; None looks for the weights.
        captions: the config's text encoder, where it is built already.

    Raises:
        ValueError: there are no weights, they cannot be read, or the config asks them for something else than
            they were trained to predict.
    """
    source = find_weights(config, tell=say) if source is None else source
    check_drawn(source, config)
    device = build_device(config)
    encoder = build.build_encoder(config, device)
    captions = captions or build.build_text_encoder(config, device)
    model = build.build_model(config, encoder, captions).to(device)
    path = source / checkpoints.sampled_file(source) if source.is_dir() else source
    load_trained(model, path, config, captions)
    process = build.build_process(config, respaced=False)
    normalization = read_normalization(source) if config.num_points else None
    if config.num_points and normalization is None:
        say(f"{source} has no {checkpoints.NORMALIZATION}: the points stay as the model sees them")
    generator = SampleGenerator(model, process, encoder, config, source=source, normalization=normalization)
    return generator, captions, source


def find_weights(config: ExperimentConfig, *, tell: Callable[[str], object] | None = None) -> Path:
    """`ckpt_path`, or else the folder of the newest checkpoint that is not damaged.

    A run's folder as `ckpt_path` means its newest checkpoint; `tell` gets a line that says so. `best` is the
    checkpoint that `keep_best` kept in the training.

    Raises:
        ValueError: there is neither, or it has no averaged weights, or the best checkpoint is damaged.
    """
    folder = Path(config.experiment_dir) / results.CHECKPOINTS
    found = checkpoints.newest_first(folder)
    named = config.ckpt_path
    if named == BEST:
        return _best(folder)
    source = (
        named_checkpoint(named, "ckpt_path", run=Path(config.experiment_dir), say=tell)
        if named
        else checkpoints.newest_whole(found, only=checkpoints.EMA)
    )
    if source is None:
        raise ValueError(f"no checkpoint in {folder}: train first, or give ckpt_path")
    if source.is_dir() and not (source / checkpoints.sampled_file(source)).is_file():
        wanted = checkpoints.sampled_file(source)
        raise ValueError(f"ckpt_path needs a file or a step_... folder, got {source} without {wanted}")
    return source


def _best(folder: Path) -> Path:
    best = read_best(folder)
    if best is None:
        problem = "and none is noted"
        if (folder / FILE).is_file():
            problem = f"and the one that {FILE} names is not there"
        raise ValueError(
            f"ckpt_path: best needs a best checkpoint, {problem} in {folder}; keep_best of the training"
            " keeps one"
        )
    path = folder / best.checkpoint
    if reason := checkpoints.damage(path, only=checkpoints.EMA):
        raise ValueError(f"the best checkpoint {path} is damaged: {reason}; wanted another ckpt_path")
    return path
