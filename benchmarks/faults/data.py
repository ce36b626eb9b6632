"""Faults of one's own data: folders, captions, videos, caches, and data that change."""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults.bench import Bench, Fault, Outcome

_CONFIG = """\
experiment_dir: unused
image_size: 16
num_classes: {classes}
model: {{type: {model}, patch_size: 4, hidden_size: 32, depth: 1, num_heads: 4}}
encoder: {{type: Pixels, channels: 3}}
{more}
data: {{dataset: {{{dataset}}}, batch_size: 8}}
max_training_steps: 4
"""


def train_on(bench: Bench, dataset: str, *overrides: str, classes: int = 2, more: str = "") -> Outcome:
    """Trains on a dataset section, written as YAML's inner part of a mapping."""
    config = bench.folder / "own.yaml"
    model = "DiT" if classes else "PixArt"
    config.write_text(_CONFIG.format(dataset=dataset, classes=classes, more=more, model=model))
    return bench.command(
        [
            *bench.arguments(config=config)[:7],
            "max_training_steps=4",
            "enable_tensorboard_log=false",
            *overrides,
        ]
    )


def make_images(folder: Path, num: int = 12, *, suffix: str = ".png") -> Path:
    """Images of two classes, in a folder each."""
    for number in range(num):
        path = folder / "images" / ("cat", "dog")[number % 2] / f"{number:03d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder / "images"


def folder_with(change: Callable[[Path], object], *options: str) -> Callable[[Bench], Outcome]:
    """Trains on a folder of images after a change to it."""

    def act(bench: Bench) -> Outcome:
        root = make_images(bench.folder)
        change(root)
        return train_on(bench, ", ".join(("type: ImageFolder", f"root: {root}", *options)))

    return act


def _first(root: Path) -> Path:
    return root / "cat" / "000.png"


def _cut(root: Path) -> None:
    path = _first(root)
    path.write_bytes(path.read_bytes()[:200])


def _emptied(root: Path) -> None:
    for path in root.rglob("*.png"):
        path.unlink()


def _left_out(root: Path) -> None:
    for number in range(3):
        (root / "cat" / f"{number}.psd").write_bytes(b"8BPS")


def _jfif(root: Path) -> None:
    for path in root.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        os.replace(path.with_suffix(".jpg"), path.with_suffix(".jfif"))
        path.unlink()


def captions(rows: Sequence[Sequence[str]], *, encoding: str = "utf-8") -> Callable[[Bench], Outcome]:
    """Trains on a captions file with these rows."""

    def act(bench: Bench) -> Outcome:
        make_images(bench.folder)
        file = bench.folder / "captions.csv"
        with file.open("w", encoding=encoding, newline="") as lines:
            csv.writer(lines).writerows(rows)
        return _train_captions(bench, file)

    return act


def json_lines(text: str) -> Callable[[Bench], Outcome]:
    """Trains on captions in JSON lines."""

    def act(bench: Bench) -> Outcome:
        make_images(bench.folder)
        file = bench.folder / "captions.jsonl"
        file.write_text(text)
        return _train_captions(bench, file)

    return act


def _train_captions(bench: Bench, file: Path) -> Outcome:
    dataset = f"type: ImageCaptions, captions_file: {file}"
    return train_on(bench, dataset, classes=0, more="text_encoder: {type: MiniLM}")


def _table(*rows: Sequence[str]) -> Callable[[Bench], Outcome]:
    """Trains on a table of videos."""

    def act(bench: Bench) -> Outcome:
        file = bench.folder / "videos.csv"
        with file.open("w", newline="") as lines:
            csv.writer(lines).writerows([("path", "label"), *rows])
        (bench.folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 no more")
        dataset = f"type: VideoTable, table: {file}, text: false, class_cond: true"
        config = bench.folder / "own.yaml"
        config.write_text(_CONFIG.format(dataset=dataset, classes=1, more="num_frames: 4", model="Latte"))
        return bench.command([*bench.arguments(config=config)[:7], "max_training_steps=4"])

    return act


def _changed_cache(bench: Bench) -> Outcome:
    """Caches a folder, exchanges an image for another of the same name, and caches again."""
    root = make_images(bench.folder)
    dataset = f"type: ImageFolder, root: {root}, random_flip: false"
    train_on(bench, dataset, "max_training_steps=1")
    config, cache = str(bench.folder / "own.yaml"), str(bench.folder / "latents")
    made = bench.tool("cache_latents", "-c", config, "--out", cache)
    if made.returncode:
        return made
    Image.new("RGB", (40, 40), (255, 0, 0)).save(_first(root))
    return bench.tool("cache_latents", "-c", config, "--out", cache)


def _changed_while_away(bench: Bench) -> Outcome:
    """Trains, exchanges an image of the folder for another, and goes on."""
    root = make_images(bench.folder)
    dataset = f"type: ImageFolder, root: {root}, random_flip: false"
    first = train_on(bench, dataset)
    if first.returncode:
        return first
    _first(root).rename(root / "dog" / "999.png")
    return train_on(bench, dataset, "max_training_steps=8")


FOLDERS: Sequence[Fault] = (
    Fault(
        "a folder that is not there",
        lambda bench: train_on(bench, f"type: ImageFolder, root: {bench.folder / 'imges'}"),
        ("imges",),
    ),
    Fault("a folder without images", folder_with(_emptied), ("images",)),
    Fault("a cut image", folder_with(_cut), (r"000\.png",)),
    Fault("an image of 0 bytes", folder_with(lambda root: _first(root).write_bytes(b"")), (r"000\.png",)),
    Fault(
        "a cut image, with `on_corrupt: skip`",
        folder_with(_cut, "on_corrupt: skip"),
        ("trained to step 4", "1 (image|sample|file)s?.*(skipped|damaged)|skipped.*1"),
        "well",
    ),
    Fault("three files that are left out", folder_with(_left_out), ("trained to", r"\.psd"), "well"),
    Fault("a folder of `.jfif`", folder_with(_jfif), ("trained to step 4",), "well"),
    Fault(
        "a batch larger than the folder",
        lambda bench: train_on(
            bench, f"type: ImageFolder, root: {make_images(bench.folder, 4)}", "data.batch_size=8"
        ),
        ("batch_size = 8", "4"),
    ),
    Fault(
        "a bucket that the patch does not divide",
        folder_with(lambda root: None, "buckets: [[16, 16], [14, 18]]"),
        ("buckets?", "14"),
    ),
    Fault(
        "a bucket with fewer images than a batch",
        folder_with(
            lambda root: Image.new("RGB", (60, 20)).save(root / "cat" / "wide.png"),
            "buckets: [[16, 16], [8, 32]]",
        ),
        ("trained to step 4", "never drawn|fewer than a batch|starved|too few"),
        "well",
    ),
    Fault("another image since the checkpoint", _changed_while_away, ("data", "changed|differ|another")),
    Fault("another image since the latent cache", _changed_cache, ("changed|differ|another|other",)),
)

CAPTIONS: Sequence[Fault] = (
    Fault("captions without the column", captions([("file", "txt"), ("a", "b")]), (r"captions\.csv", "path")),
    Fault(
        "captions of images that are not there",
        captions([("path", "text"), ("images/cat/0.png", "a cat")]),
        (r"captions\.csv", "missing", r"0\.png"),
    ),
    Fault(
        "an empty caption",
        captions([("path", "text"), ("images/cat/000.png", "")]),
        (r"captions\.csv", "line 2"),
    ),
    Fault(
        "captions with a comma outside quotes",
        captions([("path", "text"), ("images/cat/000.png", "a", "cat")]),
        ("line 2", "quotes"),
    ),
    Fault(
        "captions that are not UTF-8",
        captions([("path", "text"), ("images/cat/000.png", "ein K\xe4tzchen")], encoding="latin-1"),
        (r"captions\.csv", "UTF-8"),
    ),
    Fault("a captions file without rows", captions([("path", "text")]), ("no captions",)),
    Fault("a cut line of JSON", json_lines('{"file_name": "images/cat/000.png", "te'), ("line 1", "JSON")),
    Fault("a line of JSON that is a list", json_lines("[1, 2]\n"), ("line 1", "object")),
    Fault("a table of videos that are not there", _table(("no.mp4", "a")), (r"no\.mp4",)),
    Fault("a video that is cut", _table(("broken.mp4", "a")), (r"broken\.mp4",)),
    Fault("a row of a table without a label", _table(("broken.mp4", "")), ("line 2", "label")),
)
