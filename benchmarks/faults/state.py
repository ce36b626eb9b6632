"""Faults of what a run has left: damaged checkpoints, metrics, configs, sample files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faults.bench import NUM_STEPS, Bench, Fault, Outcome

_FELL_BACK = ("step_0000004", "damaged", "going on from .*step_0000002")


def resuming(change: Callable[[Path], object], *overrides: str) -> Callable[[Bench], Outcome]:
    """Goes on with a run after a change to its newest checkpoint."""

    def act(bench: Bench) -> Outcome:
        bench.trained()
        change(bench.checkpoint())
        return bench.speedit("max_training_steps=6", *overrides)

    return act


def _state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change to state.pt, with a manifest that agrees."""

    def act(folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "state.pt")
        _agree(folder, "state.pt")

    return act


def _agree(folder: Path, name: str) -> None:
    import hashlib

    content = (folder / name).read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["files"][name]
    for key, value in facts.items():
        facts[key] = len(content) if isinstance(value, int) else hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return act


def _halved(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return act


def _flipped(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def metrics(tail: bytes) -> Callable[[Bench], Outcome]:
    """Goes on with a run whose metrics end in these bytes."""

    def act(bench: Bench) -> Outcome:
        run = bench.trained()
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(tail)
        return bench.speedit("max_training_steps=6")

    return act


def _nothing_to_train(bench: Bench) -> Outcome:
    bench.trained()
    return bench.speedit("max_training_steps=3")


def _config_is_kept(bench: Bench) -> str | None:
    text = (bench.run_folder / "config_train.yaml").read_text()
    is_kept = f"max_training_steps: {NUM_STEPS}" in text
    return None if is_kept else "config_train.yaml was written anew"


def testing(write: Callable[[Path], object]) -> Callable[[Bench], Outcome]:
    """Tests samples in a file that `write` makes."""

    def act(bench: Bench) -> Outcome:
        bench.trained()
        path = bench.folder / "samples.npz"
        write(path)
        return bench.speedit(f"samples={path}", phase="test")

    return act


def _npz_with_header(shape: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import zipfile

        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00v\x00" + header.encode() + bytes(64))

    return write


def _images(*shape: int, dtype: str = "uint8") -> Callable[[Path], None]:
    return lambda path: np.savez(path, arr_0=np.zeros(shape, dtype))


def _cut_npz(path: Path) -> None:
    np.savez(path, arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    path.write_bytes(path.read_bytes()[:150])


def _twice(phase: str) -> Callable[[Bench], Outcome]:
    """Runs a phase twice. The second must not write over what the first left."""

    def act(bench: Bench) -> Outcome:
        bench.trained()
        first = bench.speedit(phase=phase)
        if first.returncode:
            return first
        (bench.folder / "before").write_bytes((bench.run_folder / "samples.png").read_bytes())
        return bench.speedit("seed=5", phase=phase)

    return act


def _picture_is_kept(bench: Bench) -> str | None:
    kept = (bench.folder / "before").read_bytes()
    found = [path.read_bytes() for path in bench.run_folder.glob("samples*.png")]
    return None if kept in found else "the first samples.png is lost"


CHECKPOINTS: Sequence[Fault] = (
    Fault("a cut model file", resuming(_halved("model.safetensors")), _FELL_BACK, "well"),
    Fault(
        "a cut optimizer file", resuming(_halved("optimizer_00000_of_00001.safetensors")), _FELL_BACK, "well"
    ),
    Fault("a cut state file", resuming(_halved("state.pt")), _FELL_BACK, "well"),
    Fault("one bit of the weights flipped", resuming(_flipped), _FELL_BACK, "well"),
    Fault("no EMA file", resuming(lambda path: (path / "ema.safetensors").unlink()), _FELL_BACK, "well"),
    Fault("no manifest", resuming(lambda path: (path / "manifest.json").unlink()), _FELL_BACK, "well"),
    Fault("a manifest that is no JSON", resuming(_halved("manifest.json")), _FELL_BACK, "well"),
    Fault(
        "a manifest without files",
        resuming(_manifest(lambda content: content["files"].clear())),
        _FELL_BACK,
        "well",
    ),
    Fault(
        "a manifest of another step",
        resuming(_manifest(lambda content: content.update(step=9))),
        _FELL_BACK,
        "well",
    ),
    Fault(
        "a manifest with a path outside",
        resuming(_manifest(lambda content: content["files"].update({"../../metrics.jsonl": {}}))),
        _FELL_BACK,
        "well",
    ),
    Fault(
        "a state without the step",
        resuming(_state(lambda state: state.pop("step"))),
        ("step_0000004", "step"),
    ),
    Fault(
        "a step that is text",
        resuming(_state(lambda state: state.update(step="four"))),
        ("step_0000004", "four"),
    ),
    Fault(
        "a step that is NaN",
        resuming(_state(lambda state: state.update(step=float("nan")))),
        ("step_0000004", "nan"),
    ),
    Fault(
        "a data position below 0",
        resuming(_state(lambda state: state["loader"].update(offset=-8))),
        ("step_0000004", "offset"),
    ),
    Fault("another model", resuming(lambda path: None, "model.depth=2"), ("step_0000004", "blocks")),
    Fault(
        "another process", resuming(lambda path: None, "diffusion.noise_schedule=cosine"), ("noise_schedule",)
    ),
    Fault("another seed", resuming(lambda path: None, "seed=7"), ("seed",)),
)

LEFTOVERS: Sequence[Fault] = (
    Fault("a cut last line of metrics", metrics(b'{"step": 4, "lo'), ("trained to step 6",), "well"),
    Fault("a line of metrics that is garbage", metrics(b"%%%\n"), ("trained to step 6",), "well"),
    Fault("a hole of zeros in the metrics", metrics(bytes(300) + b"\n"), ("trained to step 6",), "well"),
    Fault("a line of metrics that is a list", metrics(b"[1]\n"), ("trained to step 6",), "well"),
    Fault("nothing to train", _nothing_to_train, ("nothing to train",), "well", _config_is_kept),
    Fault("an npz with a negative shape", testing(_npz_with_header("(-1, 8, 8, 1)")), (r"samples\.npz",)),
    Fault(
        "an npz of 10^15 images",
        testing(_npz_with_header("(10**15, 8, 8, 1)".replace("10**15", str(10**15)))),
        (r"samples\.npz",),
    ),
    Fault("an npz that is cut", testing(_cut_npz), (r"samples\.npz",)),
    Fault(
        "an npz of float images", testing(_images(4, 8, 8, 1, dtype="float32")), (r"samples\.npz", "uint8")
    ),
    Fault("an npz of other channels", testing(_images(4, 8, 8, 3)), ("channels?|grey|\\(",)),
    Fault("an npz that is a web page", testing(lambda path: path.write_text("<html>")), (r"samples\.npz",)),
    Fault("`sample` twice", _twice("sample"), (), "well", _picture_is_kept),
)
