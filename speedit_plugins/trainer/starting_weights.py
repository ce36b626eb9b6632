"""The weights that a model starts from: those of `pretrained`, and what a training has made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints.paths import named_checkpoint
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.lora import add_adapters, check_fit, load_adapters, read_adapters
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.models.weights import LoadReport, fit_weights, load_weights, read_checkpoint


def start_from(
    model: nn.Module,
    weights: str | None,
    config: ExperimentConfig,
    captions: CaptionSource | None = None,
    *,
    say: Callable[[str], object] | None = None,
) -> None:
    """Loads weights into a model, and gives it the adapters of the config's `lora`.

    Args:
        model: freshly built.
        weights: file, or a checkpoint's folder; None leaves the model's own.
        config: the config.
        captions: encodes the empty caption, whose features the model holds.
        say: prints a line; None prints none.

    Raises:
        ValueError: the weights do not fit the model, or the adapters do not.
    """
    fresh: tuple[str, ...] = ()
    if weights is not None:
        report = _load_pretrained(model, weights, captions)
        fresh = report.left_at_init
        if say is not None:
            start = f"; freshly initialised: {', '.join(fresh)}" if fresh else ""
            say(f"fine-tuning from {weights}: {len(report.loaded)} tensors{start}")
    if not config.lora.rank:
        return
    if getattr(model, "is_widened", False):
        raise ValueError(
            "lora with inpainting or super_resolution needs a network that has their input channels: that of"
            f" {config.model['path']} has none, and frozen new ones would stay without effect; wanted the"
            " network of such a model"
        )
    # Embeddings of other classes than the file's are random, so they are trained whole.
    options, source = config.lora, weights or config.model.get("path") or ""
    add_adapters(
        model, rank=options.rank, alpha=options.alpha, targets=options.targets, whole=fresh, source=source
    )


def load_trained(
    model: nn.Module, path: Path, config: ExperimentConfig, captions: CaptionSource | None = None
) -> None:
    """Loads the weights of a training into a freshly built model, after those that its adapters adapt.

    Args:
        model: as `build_model` returns it.
        path: file with the weights.
        config: its `lora` must be that of the training. Without `pretrained`, the path that the file names is
            taken.
        captions: see `start_from`.

    Raises:
        ValueError: the file cannot be read or does not fit the model, or the adapted weights are others than
            in the training.
    """
    found = read_adapters(path)
    if found is None:
        start_from(model, None, config, captions)
        if config.lora.rank:
            check_fit(model, None, read_checkpoint(path), path)
        load_weights(model, path)
        return
    if not config.lora.rank:
        check_fit(model, found, (), path)
    base = config.pretrained
    if base is None and config.model.get("path") is None:
        base = found.source
    start_from(model, base, config, captions)
    load_adapters(model, path)


def _load_pretrained(model: nn.Module, path: str, captions: CaptionSource | None) -> LoadReport:
    folder = named_checkpoint(path, "pretrained")
    source = folder / checkpoints.sampled_file(folder) if folder.is_dir() else folder
    if (adapters := read_adapters(source)) is not None:
        raise ValueError(
            f"pretrained: '{source}' holds adapters alone, of {adapters.source}; wanted whole weights"
        )
    # A fine-tuning usually has other classes, so label embeddings may differ. The empty caption comes from
    # the run's own text encoder.
    found = read_checkpoint(source)
    named = (*model.state_dict(), *found)
    prefixes = ("y_embedder.", "null_tokens", "null_mask")
    excused = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in named)]
    report = fit_weights(model, found, source, allow_mismatch=excused)
    if captions is not None:
        cast(Any, model).set_null_text(captions.encode([""]))
    return report
