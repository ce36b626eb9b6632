"""Turns the weights of a .pt checkpoint into a safetensors file, or a safetensors file into a .pt.

    python tools/convert_checkpoint.py DiT-XL-2-256x256.pt dit_xl_2.safetensors
    python tools/convert_checkpoint.py 0400000.pt speedit.safetensors --prefer model
    python tools/convert_checkpoint.py dit_xl_2.safetensors DiT-XL-2.pt [--wrap ema]

A .pt may be a bare state dict or a training checkpoint of facebookresearch/DiT or SpeeDiT. What is written as
.pt is a bare state dict, as the official files are; SpeeDiT's own loader wants it under "ema": --wrap ema.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from speedit_plugins.files import replacing
from speedit_plugins.trainer.models.pretrained import WEIGHT_SETS, read_checkpoint

PICKLED = (".pt", ".pth")
SAFE = (".safetensors",)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on stderr that says what is wrong."""
    arguments = _parser().parse_args(argv)
    try:
        weights = convert(
            arguments.source,
            arguments.target,
            prefer=arguments.prefer,
            wrap=arguments.wrap,
            force=arguments.force,
        )
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: error: {error}", file=sys.stderr)
        return 2
    count = sum(tensor.numel() for tensor in weights.values())
    size = arguments.target.stat().st_size / 2**20
    print(f"wrote {arguments.target}: {len(weights)} tensors, {count:,} values, {size:.1f} MiB")
    return 0


def convert(
    source: Path, target: Path, *, prefer: str | None = None, wrap: str | None = None, force: bool = False
) -> dict[str, Tensor]:
    """Writes the weights of `source` to `target`, whole or not at all, and returns them.

    Args:
        source: .pt, .pth or .safetensors.
        target: the other kind.
        prefer: "ema" (the default) or "model", of a .pt; refused for a .safetensors source, with its one set.
        wrap: key under which a .pt keeps the weights, "ema" or "model"; None for a bare state dict.
        force: replace an existing target.

    Raises:
        ValueError: suffixes that are not one of each kind, an existing target, an option without effect, or a
            source that `read_checkpoint` refuses.
        OSError: the target cannot be written; what stood there before is unchanged.
    """
    kinds = {source.suffix in SAFE, target.suffix in SAFE}
    if kinds != {True, False} or not {source.suffix, target.suffix} & set(PICKLED):
        raise ValueError(f"needs a .pt or .pth and a .safetensors, got '{source.name}' and '{target.name}'")
    if prefer is not None and source.suffix in SAFE:
        raise ValueError(f"--prefer {prefer} has no effect: '{source.name}' holds one set of weights")
    if wrap is not None and target.suffix in SAFE:
        raise ValueError(
            f"--wrap {wrap} has no effect on '{target.name}': a safetensors file holds a flat dict"
        )
    if target.exists() and not force:
        raise ValueError(f"'{target}' exists; --force replaces it")
    weights = read_checkpoint(source, prefer=prefer or "ema")
    if target.suffix in SAFE:
        # Tied tensors share memory, which the format refuses: each is written by itself.
        flat = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
        with replacing(target) as partial:
            save_file(flat, partial)
    else:
        content: Mapping[str, object] = weights if wrap is None else {wrap: weights}
        with replacing(target) as partial:
            torch.save(content, partial)
    return weights


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument(
        "--prefer", choices=WEIGHT_SETS, help="weights of a training checkpoint (default: ema)"
    )
    parser.add_argument("--wrap", choices=WEIGHT_SETS, help="key for the weights in a .pt (default: bare)")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    return parser


if __name__ == "__main__":
    sys.exit(main())
