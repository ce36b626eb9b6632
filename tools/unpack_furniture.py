"""Writes the furniture of Sweet Home 3D as a data set of voxels, with a folder for each kind of room.

    apt install sweethome3d-furniture
    python tools/unpack_furniture.py /usr/share/sweethome3d/furniture data/furniture
    speedit -c shapes/furniture.yaml -p train

Debian's package has 820 models in five catalogues, under CC BY 3.0 or CC0. ATTRIBUTION.md names each
model's author and licence. Needs the extra `shapes`.

Dims: R the side of a grid.
"""

import argparse
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speedit_plugins.trainer.data.shapes.files import read_voxels
from speedit_plugins.trainer.terminal import progress

LIST = "PluginFurnitureCatalog.properties"
ENTRY = re.compile(r"^(\w+)#(\d+)=(.*)$", re.MULTILINE)
LICENSE = re.compile(r"^license=(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Model:
    """A model of a catalogue: `path` within the catalogue's zip file, and what its list says of it."""

    number: int
    name: str
    category: str
    path: str
    creator: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("catalogues", type=Path, help="folder of the .sh3f files")
    parser.add_argument("output", type=Path, help="folder for the data set: new or empty")
    parser.add_argument("--voxel-size", type=int, default=16, help="R (16)")
    arguments = parser.parse_args(argv)
    try:
        number = unpack(arguments.catalogues, arguments.output, voxel_size=arguments.voxel_size)
    except (ValueError, OSError, ImportError) as error:
        print(f"unpack_furniture: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {number} models")
    return 0


def unpack(catalogues: Path, output: Path, *, voxel_size: int) -> int:
    """Writes OUTPUT/CATEGORY/CATALOGUE_NUMBER_NAME.npy, bool (R, R, R), for each model; returns their number.

    Raises:
        ValueError: there is no catalogue, one is damaged, `output` is not empty, or `voxel_size` < 1.
        ImportError: trimesh is missing.
    """
    if voxel_size < 1:
        raise ValueError(f"--voxel-size needs 1 or more, got {voxel_size}")
    found = sorted(catalogues.glob("*.sh3f"))
    if not found:
        raise ValueError(f"no .sh3f files in {catalogues}; wanted those of sweethome3d-furniture")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; wanted a new folder")
    lines = ["# Models of sweethome3d-furniture, turned into voxels"]
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that an interrupted run leaves no half of a data set there.
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        partial = Path(scratch) / output.name
        for catalogue in found:
            lines += _unpacked(catalogue, partial, voxel_size)
        (partial / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(output)
    return sum(line.startswith("- ") for line in lines)


def _unpacked(catalogue: Path, output: Path, voxel_size: int) -> list[str]:
    """Writes one catalogue's models; returns the lines of the attribution."""
    try:
        with zipfile.ZipFile(catalogue) as archive, tempfile.TemporaryDirectory() as scratch:
            # Java's properties files are Latin-1.
            content = archive.read(LIST).decode("latin-1")
            license_of = LICENSE.search(content)
            named = license_of[1].strip() if license_of else "no licence named"
            lines = [f"\n## {catalogue.name}: {named}\n"]
            mesh = Path(scratch) / "model.obj"
            models = list(_models(content))
            with progress(catalogue.name, total=len(models), unit="model") as bar:
                for model in models:
                    mesh.write_bytes(archive.read(model.path))
                    grid = read_voxels(mesh, voxel_size)[0].numpy() > 0
                    plain = re.sub(r"[^a-z0-9]+", "_", model.name.lower())
                    name = f"{catalogue.stem}_{model.number:03d}_{plain}"
                    path = output / model.category.lower().replace(" ", "_") / f"{name}.npy"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.save(path, grid)
                    lines.append(f"- {path.relative_to(output)}: {model.creator or 'no author named'}")
                    bar.update()
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{catalogue} is damaged: {error}") from error
    return lines


def _models(content: str) -> Iterator[Model]:
    """The models of a catalogue's list, in its order."""
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in ENTRY.findall(content):
        entries.setdefault(int(number), {})[key] = value.strip()
    for number, entry in entries.items():
        yield Model(
            number, entry["name"], entry["category"], entry["model"].lstrip("/"), entry.get("creator", "")
        )


if __name__ == "__main__":
    sys.exit(main())
