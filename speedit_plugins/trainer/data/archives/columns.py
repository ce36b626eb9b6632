"""Values of table columns, as Hugging Face stores images, captions and labels.

Dims: N rows.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speedit_plugins.registry import nearest
from speedit_plugins.trainer.data.archives.images import ImageBytes

IMAGE, CAPTION, LABEL = "image", "text", "label"
DEFAULTS = {"image_column": IMAGE, "caption_column": CAPTION, "label_column": LABEL}


def check_columns(columns: Mapping[str, str], found: Sequence[str], place: object) -> None:
    """Raises ValueError if a wanted column is missing.

    Args:
        columns: option and column name, such as {"image_column": "image"}.
        found: the columns that there are.
        place: the file, for the message.
    """
    for option, name in columns.items():
        if name not in found:
            raise ValueError(
                f"{place} has no column {name!r}{nearest(name, found)}; {option} needs one of"
                f" {', '.join(found)}"
            )


def image_of(value: Any, folder: Path, place: str) -> ImageBytes | Path:
    """The image in a value: bytes, a path, or a mapping with "bytes" and "path", one of them None.

    Args:
        value: the value of the image's column.
        folder: the folder that paths are relative to.
        place: where the value is, for messages.

    Raises:
        ValueError: there is no image, or no such file.
    """
    content, path = value, None
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        content, path = None, value
    if isinstance(content, bytes) and content:
        return ImageBytes(content, place)
    if not isinstance(path, str) or not path:
        raise ValueError(f"{place}: wanted an image as bytes or a path, got {_brief(value)}")
    file = folder / Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{place}: no such image: {file}")
    return file


def texts_of(value: Any, place: str) -> tuple[str, ...]:
    """The captions in a value: a text, or a list of texts; none of them empty.

    Raises:
        ValueError: it is something else.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{place}: wanted a caption, or a list of captions, got {_brief(value)}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: wanted a caption with words, got {_brief(text)}")
    return tuple(text.strip() for text in texts)


def label_of(value: Any, names: Sequence[str] | None) -> str:
    """A label as text; "" for one that is missing or of another kind. Hugging Face writes -1 for no label.

    Args:
        value: the value of the label's column.
        names: names of the classes, if the table has them.
    """
    if isinstance(value, str):
        return value.strip()
    # pandas writes integer columns with gaps as 1.0 and nan.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or value < 0 or (names is not None and value >= len(names)):
        return ""
    return str(int(value))


def class_names(features: Mapping[str, Any], column: str) -> tuple[str, ...] | None:
    """Names of the classes that a column's ClassLabel states; None without.

    Args:
        features: Hugging Face's description of the columns.
        column: name of the column.
    """
    feature = features.get(column)
    names = feature.get("names") if isinstance(feature, Mapping) else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def features_of(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """Hugging Face's description of the columns, from the metadata of an Arrow schema; {} without."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, Mapping) else {}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
