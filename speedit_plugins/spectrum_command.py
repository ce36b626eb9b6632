"""The command line `speedit-spectrum`: the number `mean` of the spectral policies, measured on your data.

    speedit-spectrum latents.npz
    speedit-spectrum images/ --image-size 256 --encoder path/to/autoencoder
    speedit-spectrum images/ --image-size 8 16 32

It prints the centre of the data, what each policy makes of it, and the shift that puts a logit-normal law
where `spectral_flow` draws.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from speedit_plugins.files import write_whole
from speedit_plugins.registry import is_raised_here

if TYPE_CHECKING:
    from speedit_plugins.spectrum_report import Measurement
    from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder

PROGRAM = "speedit-spectrum"
USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments after the program's name. None takes those of the process.

    Returns:
        0, or with one line on stderr 2 after a user's error and 130 after Ctrl-C.
    """
    try:
        arguments = parser().parse_args(argv)
        # This imports torch, so it comes after the arguments were read.
        from speedit_plugins.spectrum_report import as_json, comparison, report

        measurements = _measured(arguments)
        if arguments.json is not None:
            content = {
                "source": str(arguments.source),
                "encoder": arguments.encoder,
                "seed": arguments.seed,
                "measurements": [as_json(each) for each in measurements],
            }
            write_whole(arguments.json, f"{json.dumps(content, indent=2)}\n".encode())
        if len(measurements) == 1:
            text = report(measurements[0], str(arguments.source))
        else:
            text = comparison(measurements, str(arguments.source))
        sys.stdout.write(f"{text}\n")
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: interrupted\n")
        return INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # A ValueError raised inside a library is a fault of this program.
        if isinstance(error, ValueError) and not is_raised_here(error):
            raise
        sys.stderr.write(f"{PROGRAM}: error: {_one_line(error)}\n")
        return USER_ERROR
    return 0


def parser() -> argparse.ArgumentParser:
    """The options. It raises ValueError for wrong ones."""
    options = _Parser(
        prog=PROGRAM,
        description="Measure at which noise level half of your data's variance can be told from the noise."
        " That is the number `mean` of the spectral policies.",
        epilog=f"example: {PROGRAM} images/ --image-size 256 --encoder path/to/autoencoder",
        allow_abbrev=False,
    )
    options.add_argument(
        "source",
        type=Path,
        metavar="DIR|LATENTS",
        help="a folder of images, read as RGB; a folder that tools/cache_latents.py wrote; or a .npy, .npz,"
        " .pt or .safetensors file of latents, or of images in [-1, 1], with the samples first",
    )
    options.add_argument(
        "--encoder",
        metavar="PATH",
        help="encode the images first, with an AutoencoderKL that diffusers saved in this folder",
    )
    options.add_argument(
        "--image-size",
        type=_at_least(1),
        nargs="+",
        metavar="N",
        help="scale and crop images to N x N pixels, as the trainer does; several sizes give one row each",
    )
    options.add_argument(
        "--grey",
        action="store_true",
        help="read a folder's images as one channel, for a model that does; most trainers read grey images as"
        " RGB, with three equal channels, and then the centre is ln 3 = 1.10 lower",
    )
    options.add_argument(
        "--samples",
        type=_at_least(2),
        metavar="N",
        help="how many samples to measure; default: 1,024, and fewer if they are large",
    )
    options.add_argument("--seed", type=_at_least(0), default=0, help="decides which ones; default: 0")
    options.add_argument("--key", metavar="NAME", help="name of the array, if a file has several")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file too")
    return options


def _measured(arguments: argparse.Namespace) -> list["Measurement"]:
    """One measurement for each image size. Every size gets the same samples."""
    from speedit_plugins.spectrum_report import measure
    from speedit_plugins.spectrum_samples import Choice, read_samples

    source: Path = arguments.source.expanduser()
    encoder = None if arguments.encoder is None else _encoder(arguments.encoder)
    measurements = []
    for size in arguments.image_size or [None]:
        found = read_samples(
            source,
            Choice(arguments.samples, arguments.seed),
            image_size=size,
            encoder=encoder,
            key=arguments.key,
            grey=arguments.grey,
        )
        try:
            measured = measure(found.values, num_found=found.num_found, what=found.what)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        measurements.append(replace(measured, image_size=size))
    return measurements


def _encoder(path: str) -> "Autoencoder":
    """The trainer's encoder, on the first GPU if there is one."""
    import torch

    from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder

    return Autoencoder(path).to("cuda" if torch.cuda.is_available() else "cpu")


class _Parser(argparse.ArgumentParser):
    """A parser that raises a ValueError where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {PROGRAM} --help")


def _at_least(least: int) -> Callable[[str], int]:
    """Reads an argument that is an int from `least` on."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"wanted an int >= {least}, got {text}")
        return value

    return integer


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            f"this needs {error.name}, one of the trainer's packages: pip install 'speedit-plugins[trainer]'"
        )
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
