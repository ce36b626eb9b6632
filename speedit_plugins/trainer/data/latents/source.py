"""Whether a latent cache still fits the images and captions that it was made from."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.identity import TIMES, Identified, differences

# Key of the dataset's identity in what a cache was made from.
IDENTITY, CLASSES = "identity", "classes"
# Options of datasets that say where the data are, not what they are: they may be moved as a whole.
PLACES = ("captions_file", "root", "table")
# A root with one of these names several files; the dataset says which of them are missing.
_PATTERN = re.compile(r"[*?\[{]")


def identity_of(dataset: object) -> dict[str, Any]:
    """What the cache keeps of its source: its identity under IDENTITY, or nothing if it has none."""
    return {IDENTITY: dict(dataset.identity())} if isinstance(dataset, Identified) else {}


def check_same_source(folder: Path, made_from: Mapping[str, Any], dataset: object) -> list[str]:
    """Compares a dataset with the one that the cache in `folder` was made from.

    Files that were written again are taken for edited ones, unless all of them were, at the same sizes. That
    is a copy.

    Args:
        folder: named in messages.
        made_from: as in the cache's index.
        dataset: what the cache was made from, as it is now.

    Returns:
        Lines to print: what could not be compared, or what changed without making the cache stale.

    Raises:
        ValueError: names, classes, captions or files changed.
    """
    found = identity_of(dataset).get(IDENTITY)
    saved = made_from.get(IDENTITY)
    if found is None or saved is None:
        what = "its data have no identity" if found is None else "it does not say what it was made from"
        return [f"the cache in {folder} is not compared with its images: {what}"]
    changes = differences(saved, found, dataset)
    stale = [each for each in changes if each.aspect != TIMES] or [
        each for each in changes if not each.is_everywhere
    ]
    if stale:
        raise ValueError(
            f"the cache in {folder} is stale, the data that it was made from changed:"
            f" {'; '.join(each.text for each in stale)}. Wanted a new cache, in another folder or after"
            " deleting this one; data.dataset.check_source: false trains from it as it is"
        )
    if changes:
        return [
            f"the files that the cache in {folder} was made from were all written again, at the same sizes,"
            " as by a copy: the cache counts as up to date"
        ]
    return []


def compare_with_source(folder: Path, made_from: Mapping[str, Any], *, has_text: bool) -> list[str]:
    """Builds the dataset that the cache in `folder` was made from and compares it, see `check_same_source`.

    Raises:
        ValueError: it changed, or is damaged.
    """
    options = made_from.get("dataset")
    if IDENTITY not in made_from or options is None or DATASETS.get(str(options.get("type"))) is None:
        return [f"the cache in {folder} is not compared with its images: it does not say what they are"]
    given = [options[key] for key in PLACES if isinstance(options.get(key), str)]
    places = [Path(text).expanduser() for text in given]
    if gone := [place for place in places if not (place.exists() or _PATTERN.search(str(place)))]:
        return [f"the cache in {folder} is not compared with its images: they are no longer in {gone[0]}"]
    facts = {key: made_from[key] for key in ("class_cond", "image_size")}
    missing = {key: value for key, value in facts.items() if key not in options}
    try:
        dataset = build(DATASETS, options, text=has_text, random_flip=False, **missing)
    except ValueError as error:
        raise ValueError(
            f"the cache in {folder} cannot be compared with its images: {error}; wanted a new cache, or"
            " data.dataset.check_source: false"
        ) from error
    return check_same_source(folder, made_from, dataset)


def without_places(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """What a cache was made from, without the identity, and without where the data are if it has one."""
    found = {key: value for key, value in made_from.items() if key != IDENTITY}
    if IDENTITY in made_from and isinstance(found.get("dataset"), Mapping):
        found["dataset"] = {key: value for key, value in found["dataset"].items() if key not in PLACES}
    return found


def speaks() -> bool:
    """Whether this process prints for all: rank 0 of a launcher, or a process without one."""
    return os.environ.get("RANK", "0") == "0"
