"""Faults of weights: files that are none, other people's names, values that are not finite."""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults.bench import Bench, Fault, Outcome

_HTML = b"<!DOCTYPE html><html><head><title>Access denied</title></head></html>\n"
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
_OFFLINE = {"HF_HUB_DISABLE_TELEMETRY": "1"}


def starting_from(name: str, write: Callable[[Path, Path], None]) -> Callable[[Bench], Outcome]:
    """Trains from the weights in a file that `write` makes, from a good checkpoint's."""

    def act(bench: Bench) -> Outcome:
        path = bench.folder / name
        write(path, bench.base / f"checkpoints/step_{4:07d}/ema.safetensors")
        return bench.speedit(f"pretrained={path}")

    return act


def _content(content: bytes) -> Callable[[Path, Path], None]:
    return lambda path, good: (path.write_bytes(content), None)[1]


def _cut(path: Path, good: Path) -> None:
    content = good.read_bytes()
    path.write_bytes(content[: len(content) // 2])


class _Foreign:
    """Someone's own class, as whole models in a pickle are."""


def _foreign(path: Path, good: Path) -> None:
    path.write_bytes(pickle.dumps({"model": _Foreign()}))


def _foreign_torch(path: Path, good: Path) -> None:
    torch.save({"model": _Foreign()}, path)


def _named(prefix: str = "", *, inside: str = "") -> Callable[[Path, Path], None]:
    def write(path: Path, good: Path) -> None:
        weights = OrderedDict((prefix + name, value) for name, value in load_file(good).items())
        torch.save({inside: weights, "epoch": 3} if inside else weights, path)

    return write


def _wider(path: Path, good: Path) -> None:
    weights = load_file(good)
    name = next(name for name in weights if name.startswith("blocks."))
    save_file({**weights, name: torch.zeros(3, 3)}, path)


def _not_finite(path: Path, good: Path) -> None:
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(good).items()}, path)


def _of_models(section: str, *more: str) -> Callable[[Bench], Outcome]:
    """Trains with an encoder or a model by its name, which nothing here has."""
    return lambda bench: bench.speedit(section, "image_size=64", *more)


def sampling_nans(phase: str) -> Callable[[Bench], Outcome]:
    """Samples from weights that are not finite."""

    def act(bench: Bench) -> Outcome:
        path = bench.folder / "nan.safetensors"
        _not_finite(path, bench.base / f"checkpoints/step_{4:07d}/ema.safetensors")
        return bench.speedit(f"ckpt_path={path}", phase=phase)

    return act


def _exported_nans(bench: Bench) -> Outcome:
    path = bench.folder / "nan.safetensors"
    _not_finite(path, bench.base / f"checkpoints/step_{4:07d}/ema.safetensors")
    config, out = str(bench.trained() / "config_train.yaml"), str(bench.folder / "exported")
    return bench.tool("export", "-c", config, "--out", out, "--model-only", f"ckpt_path={path}")


FILES: Sequence[Fault] = (
    Fault("a web page saved as `.pt`", starting_from("w.pt", _content(_HTML)), (r"w\.pt", "HTML|web page")),
    Fault(
        "a web page saved as `.safetensors`",
        starting_from("w.safetensors", _content(_HTML)),
        (r"w\.safetensors", "HTML|web page"),
    ),
    Fault("a Git LFS pointer", starting_from("w.safetensors", _content(_POINTER)), ("LFS",)),
    Fault("an empty file", starting_from("w.pt", _content(b"")), (r"w\.pt", "empty")),
    Fault("a cut `.safetensors`", starting_from("w.safetensors", _cut), (r"w\.safetensors",)),
    Fault("a pickle of someone's class", starting_from("w.pkl", _foreign), (r"w\.pkl",)),
    Fault(
        "a `.pt` with someone's class", starting_from("w.pt", _foreign_torch), (r"w\.pt", "_Foreign|class")
    ),
    Fault("a file that is not there", starting_from("w.pt", lambda path, good: None), (r"w\.pt",)),
    Fault("names with `module.`", starting_from("w.pt", _named("module.")), ("trained to step 4",), "well"),
    Fault(
        "names with `_orig_mod.`", starting_from("w.pt", _named("_orig_mod.")), ("trained to step",), "well"
    ),
    Fault(
        "weights under `model`", starting_from("w.pt", _named(inside="model")), ("trained to step",), "well"
    ),
    Fault(
        "weights under `state_dict` with `module.`",
        starting_from("w.pt", _named("module.", inside="state_dict")),
        ("trained to step",),
        "well",
    ),
    Fault("names of another model", starting_from("w.pt", _named("encoder.layers.")), (r"w\.pt",)),
    Fault("a tensor of another shape", starting_from("w.safetensors", _wider), ("blocks.", "shape")),
    Fault(
        "weights that are not finite", starting_from("w.safetensors", _not_finite), ("not finite|diverged",)
    ),
    Fault(
        "a hub's autoencoder without `allow_download`",
        _of_models("encoder={type: AutoencoderKL, path: stabilityai/sd-vae-ft-mse}"),
        ("sd-vae-ft-mse", "allow_download"),
    ),
    Fault(
        "a folder of weights without any",
        lambda bench: bench.speedit(
            f"encoder={{type: AutoencoderKL, path: {bench.folder}}}", "image_size=64"
        ),
        ("config.json|AutoencoderKL",),
    ),
)

VALUES: Sequence[Fault] = (
    Fault("`inference` from weights of NaN", sampling_nans("inference"), ("finite", r"nan\.safetensors")),
    Fault("`sample` from weights of NaN", sampling_nans("sample"), ("finite", r"nan\.safetensors")),
    Fault("`export` of weights of NaN", _exported_nans, ("finite|damaged",)),
    Fault(
        "guidance so strong that samples overflow",
        lambda bench: (
            bench.trained(),
            bench.speedit("guidance_scale=1e38", "sampler.clip_sample=false", phase="inference"),
        )[1],
        ("finite", "guidance_scale"),
    ),
)
