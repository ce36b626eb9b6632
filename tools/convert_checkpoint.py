"""Converts the weights of a .pt checkpoint to a safetensors file, or a safetensors file to a .pt.

    python tools/convert_checkpoint.py DiT-XL-2-256x256.pt dit_xl_2.safetensors
    python tools/convert_checkpoint.py 0400000.pt speedit.safetensors --prefer model
    python tools/convert_checkpoint.py dit_xl_2.safetensors DiT-XL-2.pt [--wrap ema]

An input .pt may be a bare state dict or a training checkpoint: a dict with weights under "ema", "model",
"state_dict" or another usual key. Without --prefer its averaged weights are taken, or else the only ones that
it has. The prefixes of DistributedDataParallel and torch.compile are left out. An output .pt is a bare state
dict, like DiT's official files. SpeeDiT's loader needs it under the key "ema": use --wrap ema.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from speedit_plugins.files import replacing
from speedit_plugins.trainer.models.lora import read_adapters
from speedit_plugins.trainer.models.weights import WEIGHT_SETS, read_checkpoint

PICKLED = (".pt", ".pth")
SAFE = (".safetensors",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
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
    """Writes the weights of `source` to `target`, atomically, and returns them.

    Args:
        source: .pt, .pth or .safetensors.
        target: a file of the other format.
        prefer: which weights of a .pt to use, "ema" or "model"; None takes the averaged ones if there
            are any; not allowed for a .safetensors.
        wrap: key for the weights in an output .pt, "ema" or "model"; None writes a bare state dict.
        force: replace an existing target.

    Raises:
        ValueError: source and target have the same format, the target exists, an option has no effect, or
            `read_checkpoint` refuses the source.
        OSError: the target cannot be written; an existing file is unchanged.
    """
    kinds = {source.suffix in SAFE, target.suffix in SAFE}
    if kinds != {True, False} or not {source.suffix, target.suffix} & set(PICKLED):
        raise ValueError(
            f"needs one .pt or .pth file and one .safetensors file, got '{source.name}' and '{target.name}'"
        )
    if prefer is not None and source.suffix in SAFE:
        raise ValueError(f"--prefer {prefer} has no effect: '{source.name}' has only one set of weights")
    if wrap is not None and target.suffix in SAFE:
        raise ValueError(
            f"--wrap {wrap} has no effect on '{target.name}': a safetensors file is always a flat dict"
        )
    if target.exists() and not force:
        raise ValueError(f"'{target}' exists; use --force to replace it")
    if (adapters := read_adapters(source)) is not None:
        raise ValueError(
            f"'{source}' holds adapters alone, of {adapters.source}, which a .pt does not record; wanted"
            " tools/export.py, which merges them, or with --lora writes them for diffusers"
        )
    weights = read_checkpoint(source, prefer=prefer)
    if target.suffix in SAFE:
        # Copied, because the format refuses tensors that share memory, such as tied weights.
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
        "--prefer",
        choices=WEIGHT_SETS,
        help="which weights of a training checkpoint to use (default: the averaged ones)",
    )
    parser.add_argument("--wrap", choices=WEIGHT_SETS, help="key for the weights in a .pt (default: none)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


if __name__ == "__main__":
    sys.exit(main())
