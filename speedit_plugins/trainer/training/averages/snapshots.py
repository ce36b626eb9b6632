"""Snapshots of power averages: small files that stay, from which averages of other lengths are made.

`snapshots/step_0001000.safetensors` holds the trained parameters of each length as `<length>/<parameter>`, in
float16 as in EDM2's training. A tensor that float16 cannot hold stays float32.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from speedit_plugins.files import replacing
from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.config.sections import label
from speedit_plugins.trainer.parallel import master_weights
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.averages.ema import Average
from speedit_plugins.trainer.training.averages.power_averages import PowerAverages, Profile, coefficients

SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class AverageSnapshot:
    """A file of power averages at one step."""

    path: Path
    step: int
    updates: int
    sigma_rels: tuple[float, ...]


def check_no_snapshots(folder: Path) -> None:
    """Raises ValueError if the folder of a run whose average begins has snapshots of an earlier average.

    Averages of other lengths would be made of both.
    """
    if found := sorted((folder / SNAPSHOTS).glob("step_*.safetensors")):
        raise ValueError(
            f"an average that begins would mix its snapshots with {found[0]}; move or delete"
            f" {found[0].parent}"
        )


def write_snapshot(
    folder: Path, step: int, average: Average, shapes: Mapping[str, Sequence[int]], runtime: Runtime
) -> None:
    """Writes the snapshot of a step, complete or not at all. Collective. Nothing before the first update.

    Raises:
        CheckpointError: rank 0 cannot write. All ranks raise it.
    """
    assert isinstance(average, PowerAverages)
    if not average.num_updates:
        return
    kept = {name: master_weights.gather(part, shapes, runtime) for name, part in average.by_label().items()}
    failure = None
    if runtime.is_main:
        path = folder / SNAPSHOTS / f"step_{step:07d}.safetensors"
        tensors = {
            f"{name}/{parameter}": _small(value)
            for name, weights in kept.items()
            for parameter, value in weights.items()
        }
        facts = {"step": step, "updates": average.num_updates, "sigma_rel": average.sigma_rels}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                save_file(tensors, partial, metadata={"snapshot": json.dumps(facts)})
        # Every kind of error, because the other ranks wait to hear of it.
        except Exception as error:
            failure = f"cannot write snapshot {path}: {error}"
    said = runtime.gather_objects(failure)[0]
    if said is not None:
        raise CheckpointError(said)


def read_snapshots(folder: Path) -> list[AverageSnapshot]:
    """The snapshots of a run, by step.

    Raises:
        ValueError: one of them cannot be read.
    """
    found = []
    for path in sorted((folder / SNAPSHOTS).glob("step_*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["snapshot"])
            found.append(AverageSnapshot(path, facts["step"], facts["updates"], tuple(facts["sigma_rel"])))
        # A cut file can fail in any layer.
        except Exception as error:
            raise ValueError(f"snapshot {path} is damaged: {type(error).__name__}: {error}") from error
    return sorted(found, key=lambda snapshot: snapshot.step)


def posthoc_average(
    snapshots: Sequence[AverageSnapshot], sigma_rel: float, *, step: int
) -> tuple[dict[str, Tensor], float]:
    """The power average of any length at a step, made of the snapshots up to it.

    Args:
        step: the step of one of the snapshots.

    Returns:
        The averaged parameters in float32, and the distance of their profile, see `coefficients`.

    Raises:
        ValueError: there is no snapshot of that step.
    """
    ends = [snapshot for snapshot in snapshots if snapshot.step == step]
    if not ends:
        known = ", ".join(str(snapshot.step) for snapshot in snapshots) or "none"
        raise ValueError(f"no snapshot of step {step}; known: {known}")
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    places = [(snapshot, length) for snapshot in used for length in snapshot.sigma_rels]
    profiles = [Profile(length, snapshot.updates) for snapshot, length in places]
    shares, distance = coefficients(profiles, Profile(sigma_rel, ends[0].updates))
    sums: dict[str, Tensor] = {}
    for (snapshot, length), share in zip(places, shares, strict=True):
        with safe_open(snapshot.path, framework="pt") as file:
            prefix = f"{label(length)}/"
            for key in (key for key in file.keys() if key.startswith(prefix)):  # noqa: SIM118 - not a mapping
                value = share * file.get_tensor(key).double()
                name = key.removeprefix(prefix)
                sums[name] = value if name not in sums else sums[name].add_(value)
    return {name: value.float() for name, value in sums.items()}, distance


def _small(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    small = value.half()
    return small if bool(small.isfinite().all()) else value
