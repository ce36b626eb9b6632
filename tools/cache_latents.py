"""Encodes the dataset of an experiment once, so that training reads latents and caption features from disk.

    python tools/cache_latents.py -c image/imagenet_256/dit_xl2.yaml data.dataset.root=DATA --flip
    python tools/cache_latents.py -c my/experiment.yaml --out latents --dtype float16
    python tools/cache_latents.py -c text_to_image/pixart_256.yaml data.dataset.captions_file=captions.csv

The images are encoded in order, without random flips. The encoder's posterior (scaled mean and standard
deviation) is written, and training still takes a new sample from it at every step. With a text encoder, the
features of all captions are written too. Training picks one of several captions, as it does without a cache.
Training from a cache loads the encoder to compare it with the cache's.

After an interruption, run the same command again: it continues after the last finished shard. A folder with
a cache from another config, or from data that changed since, is refused. At the end, the tool prints the
config keys for training from the cache.

float16 halves the size and keeps 11 bits of a mean. --flip doubles the size and allows random flips in
training. --teacher also writes the features that `alignment: {type: REPA}` wants, in float16: 2 bytes for
each cell and channel of the teacher's map, 393,216 an image for the 16 x 16 x 768 of DINOv2-B.
"""

import argparse
import hashlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from speedit_plugins.files import write_whole
from speedit_plugins.trainer.accelerations.teachers import (
    FeatureNetwork,
    build_network,
    stored_features,
    teacher_facts,
)
from speedit_plugins.trainer.build import build_dataset, build_encoder
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.latents.cache import (
    FLIPPED,
    LATENTS,
    NULL_TEXT,
    TEXT_COUNT,
    null_text_file,
    text_names,
)
from speedit_plugins.trainer.data.latents.shards import (
    ShardIndex,
    append_shard,
    start_or_resume,
)
from speedit_plugins.trainer.data.latents.source import CLASSES, check_same_source, identity_of
from speedit_plugins.trainer.data.loader import SampleSource
from speedit_plugins.trainer.inputs import Encoder
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.parallel.runtime import build_device
from speedit_plugins.trainer.sampling.conditions import build_captions
from speedit_plugins.trainer.terminal import progress

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Caching:
    """Result of a run: the finished index, the number of images encoded now, and the seconds it took."""

    index: ShardIndex
    num_encoded: int
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 after an error message, 130 after Ctrl-C."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        config = load_config(
            arguments.config,
            "train",
            arguments.overrides,
            allow_python=arguments.allow_python_config,
            imports=arguments.imports,
        )
        folder = arguments.out or Path(config.experiment_dir) / "latents"
        done = cache(
            config,
            folder,
            shard_size=arguments.shard_size,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            flip=arguments.flip,
            network=_network(arguments, config),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last finished shard", file=sys.stderr)
        return 130
    _report(done, folder, flip=arguments.flip)
    if arguments.teacher:
        size = f", teacher_size: {arguments.teacher_size}" if arguments.teacher_size else ""
        print(f"    alignment={{type: REPA, teacher: {arguments.teacher}{size}}}")
    return 0


def _network(arguments: argparse.Namespace, config: ExperimentConfig) -> FeatureNetwork | None:
    if arguments.teacher is None:
        return None
    device, download = build_device(config), config.allow_download
    return build_network(
        arguments.teacher, size=arguments.teacher_size, allow_download=download, device=device
    )


def _report(done: Caching, folder: Path, *, flip: bool) -> None:
    index = done.index
    print(f"{folder}: {index.num_samples:,} samples in {len(index.shards)} shards, {index.num_bytes:,} bytes")
    rate = done.num_encoded / done.seconds
    print(f"  {done.num_encoded:,} of them encoded now, {rate:,.1f} images/s")
    if not flip:
        print("  written without --flip: training from it cannot mirror images")
    print("  to train from it, change these keys of the config:")
    print(f"    data.dataset.type=LatentCache\n    data.dataset.root={folder}")


def cache(
    config: ExperimentConfig,
    folder: Path,
    *,
    shard_size: int,
    batch_size: int,
    dtype: str,
    flip: bool,
    network: FeatureNetwork | None = None,
) -> Caching:
    """Writes the missing shards of the experiment's cache.

    Args:
        config: the experiment; its dataset and encoders are used.
        folder: folder of the cache; created if it is missing.
        shard_size: samples per file.
        batch_size: images encoded at once; the last bits of a latent may depend on it.
        dtype: dtype of the latents, a key of DTYPES.
        flip: encode the mirrored images too.
        network: its features are written too.

    Raises:
        ValueError: the samples are not images of one size, an image is damaged, latents are not finite in
            `dtype`, or the folder holds another cache.
        OSError: a file cannot be read or written.
    """
    dataset = build_dataset(config, augmented=False)
    _check_cacheable(dataset, config)
    device = build_device(config)
    encoder, captions = build_encoder(config, device), build_captions(config, dataset, device)
    own = {"dtype": dtype, "flip": flip, "shard_size": shard_size, **teacher_facts(network)}
    made_from = _choices(config, dataset, encoder) | own
    max_captions = getattr(dataset, "max_captions", 1)
    if captions is not None:
        null_text = null_text_file(folder, captions.encode([""]))
        made_from["null_text_sha256"] = hashlib.sha256(null_text).hexdigest()
        if max_captions > 1:
            made_from["max_captions"] = max_captions
    index = start_or_resume(folder, made_from=made_from, num_samples=len(dataset))
    for note in check_same_source(folder, index.made_from, dataset):
        print(note)
    if captions is not None:
        _write_unless_there(folder / NULL_TEXT, null_text)
    cuts = _cuts(index.num_done, len(dataset), shard_size=shard_size, batch_size=batch_size)
    batches = _batches(dataset, [rows for shard in cuts for rows in shard], config.data.num_workers)
    started = time.perf_counter()
    with progress("caching", total=len(dataset), initial=index.num_done, unit="image") as bar:
        for shard in cuts:
            parts: list[dict[str, Tensor]] = []
            for rows in shard:
                batch = next(batches)
                images = batch["image"].to(device)
                part = _encoded(encoder, images, flip=flip, dtype=DTYPES[dtype])
                part |= {"label": batch["label"]} if "label" in batch else {}
                part |= stored_features(network, images, flip=flip)
                parts.append(part | _text(captions, batch, max_captions, DTYPES[dtype]))
                _check_finite(parts[-1], rows, dtype)
                bar.update(len(rows))
            index = append_shard(folder, index, _joined(parts))
    return Caching(index, sum(len(rows) for shard in cuts for rows in shard), time.perf_counter() - started)


def _check_cacheable(dataset: SampleSource, config: ExperimentConfig) -> None:
    if getattr(dataset, "buckets", None) is not None:
        raise ValueError("a latent cache needs images of one size, got a dataset with buckets")
    if config.data.dataset.get("fit") == "random_crop":
        raise ValueError(
            "a latent cache keeps one part of each image: wanted fit: crop or pad, got random_crop"
        )


def _choices(config: ExperimentConfig, dataset: SampleSource, encoder: Encoder) -> dict[str, Any]:
    """What decides the latents; random flips do not, as images are encoded without."""
    options = {key: value for key, value in config.data.dataset.items() if key != "random_flip"}
    classes = getattr(dataset, "classes", ())
    return {
        "encoder": config.encoder,
        "text_encoder": config.text_encoder,
        "dataset": options,
        "image_size": config.image_size,
        "class_cond": config.num_classes > 0,
        "encoder_fingerprint": encoder.fingerprint(),
        "num_classes": dataset.num_classes,
        "scaled": True,
        **({CLASSES: list(classes)} if classes else {}),
        **identity_of(dataset),
    }


def _cuts(first: int, size: int, *, shard_size: int, batch_size: int) -> list[list[range]]:
    """Sample indices of each batch of each shard, from sample `first` on.

    Batches do not cross shards. A resumed run therefore has the same batches, and the same bits, as an
    uninterrupted one.
    """
    shards = (range(start, min(start + shard_size, size)) for start in range(first, size, shard_size))
    return [[shard[i : i + batch_size] for i in range(0, len(shard), batch_size)] for shard in shards]


def _batches(
    dataset: SampleSource, rows: Sequence[range], num_workers: int
) -> Iterator[Mapping[str, Tensor]]:
    """Yields batches in order: "image" (B, 3, H, W), and "label" (B,) or "captions" (B lists of str).

    Raises:
        ValueError: an image is damaged, with the message of the dataset, or the samples are not images.
    """
    loader: DataLoader[Any] = DataLoader(
        _Rows(dataset),
        batch_sampler=rows,
        num_workers=num_workers,
        collate_fn=_collated,
        worker_init_fn=_leave_interrupt_to_parent,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise ValueError(batch)
        if "image" not in batch:
            raise ValueError(f"a latent cache needs images, got a dataset of {sorted(batch)}")
        yield batch


class _Rows:
    """Map-style dataset by index; a sample that cannot be read is returned as its error message."""

    def __init__(self, dataset: SampleSource) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        load = getattr(self.dataset, "load_all", self.dataset.load)
        try:
            # The generator is not used, as there is no augmentation.
            sample = dict(load(index, torch.Generator()))
        except ValueError as error:
            # Returned, not raised: torch would wrap an exception of a worker in the worker's traceback.
            return str(error)
        if "caption" in sample:
            sample["captions"] = [sample.pop("caption")]
        return sample


def _collated(samples: list[dict[str, Any] | str]) -> dict[str, Any] | str:
    whole = [sample for sample in samples if not isinstance(sample, str)]
    if len(whole) < len(samples):
        return next(sample for sample in samples if isinstance(sample, str))
    # Lists of captions have different lengths and cannot be stacked.
    captions = [sample.pop("captions") for sample in whole if "captions" in sample]
    return {**default_collate(whole), **({"captions": captions} if captions else {})}


def _leave_interrupt_to_parent(worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encoded(encoder: Encoder, images: Tensor, *, flip: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Latents (B, C, h, w) of the images, with `flip` also of the mirrored ones."""
    tensors = dict(zip(LATENTS, encoder.posterior(images), strict=True))
    if flip:
        tensors |= zip(FLIPPED, encoder.posterior(images.flip(-1)), strict=True)
    return {name: tensor.to(dtype).cpu() for name, tensor in tensors.items()}


def _text(
    source: CaptionSource | None, batch: Mapping[str, Any], max_captions: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Features (B, L, D) and mask (B, L) of the captions; {} without captions.

    If images have several captions, there is a pair for the first captions, one for the second ones, and so
    on, padded with zeros for images with fewer. The number of captions of each image is stored too.
    """
    if source is None:
        return {}
    found: dict[str, Tensor] = {}
    captions: Sequence[Sequence[str]] = batch["captions"]
    for number in range(max_captions):
        rows = [row for row, texts in enumerate(captions) if number < len(texts)]
        size = (len(captions), source.max_length)
        tokens, mask = torch.zeros(*size, source.width, dtype=dtype), torch.zeros(size, dtype=torch.bool)
        if rows:
            features = source.encode([captions[row][number] for row in rows])
            tokens[rows], mask[rows] = features["tokens"].to(dtype).cpu(), features["mask"].cpu()
        found |= zip(text_names(number), (tokens, mask), strict=True)
    if max_captions > 1:
        found[TEXT_COUNT] = torch.tensor([len(texts) for texts in captions])
    return found


def _write_unless_there(path: Path, content: bytes) -> None:
    # Like a damaged shard, a damaged file is written again.
    if not path.is_file() or path.read_bytes() != content:
        write_whole(path, content)


def _check_finite(tensors: Mapping[str, Tensor], rows: range, dtype: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            number = int((~tensor.flatten(1).isfinite().all(dim=1)).sum())
            wanted = "--dtype float32, or " if dtype != "float32" else ""
            raise ValueError(
                f"{name} of samples {rows[0]}..{rows[-1]} is not finite in {dtype} for {number} of them;"
                f" wanted {wanted}an encoder that does not overflow, as some do in float16"
            )


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted an int >= 1, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "-c", "--config", required=True, help="a file, or a name in ./configs or the packaged configs"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the config")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of the cache (default: latents/ in experiment_dir)"
    )
    parser.add_argument(
        "--shard-size", type=_positive, default=4096, metavar="N", help="samples per file (default: 4096)"
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="images encoded at once (default: 32)"
    )
    parser.add_argument(
        "--teacher", metavar="PATH", help="also cache this vision network's features, see alignment.teacher"
    )
    parser.add_argument(
        "--teacher-size", type=_positive, metavar="N", help="side in pixels, see alignment.teacher_size"
    )
    parser.add_argument("--flip", action="store_true", help="also cache the mirrored images")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the latents (default: float32)"
    )
    parser.add_argument(
        "--allow-python-config", action="store_true", help="allow a .py config of mmengine, which is executed"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers datasets, encoders, ...; may be given several times",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
