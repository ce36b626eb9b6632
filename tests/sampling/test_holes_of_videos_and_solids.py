"""Holes in videos, in space and in time, and in solids: what is kept, written and refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shapes_of_tests import config_file
from torch import Tensor

from speedit_plugins.cli import main
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.videos.files import write_gif, write_mp4
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.results import newest_samples
from speedit_plugins.trainer.sampling.files.shape_files import read_shapes
from speedit_plugins.trainer.sampling.generator import SampleGenerator, load_generator
from speedit_plugins.trainer.sampling.inpainting.given_files import read_given
from speedit_plugins.trainer.sampling.inpainting.holes import Filled, Holes, fills

FRAMES, SIDE = 4, 16
CLIPS = (
    *(f"num_frames={FRAMES}", f"image_size={SIDE}", "num_classes=10", "data.dataset=MovingDigits"),
    f"model={{type: Latte, patch_size: 4, input_size: {SIDE}, in_channels: 1, hidden_size: 24, depth: 2,"
    " num_heads: 2}",
    "encoder={type: Pixels, channels: 1}",
    *("data.batch_size=2", "data.num_workers=0", "precision=fp32", "optimizer.warmup_steps=0"),
    # The blocks start as the identity, and frames see each other through them alone.
    "optimizer.lr=0.01",
)
SPACE, TIME = "inpainting=RandomMasks", "inpainting={type: FrameMasks, ways: [future], given: [2, 2]}"
FLOW = "diffusion={type: RectifiedFlow}"
FORMS = {"space": (*CLIPS, SPACE), "time": (*CLIPS, TIME), "solid": (SPACE,)}
FEW = (
    *("max_training_steps=5", "samples_per_class=2", "sampler.num_steps=2", "per_proc_batch_size=2"),
    *("num_samples=3", "guidance_scale=1", "enable_tensorboard_log=false"),
)


def source(folder: Path, form: str) -> Path:
    return config_file(folder) if form == "solid" else Path("configs/video/base.yaml")


def options(folder: Path, form: str, *more: str) -> list[str]:
    return [f"experiment_dir={folder / 'run'}", *FORMS[form], *FEW, *more]


def run(folder: Path, phase: str, form: str, *more: str) -> int:
    return main(["-c", str(source(folder, form)), "-p", phase, *options(folder, form, *more)])


def config_of(folder: Path, form: str, *more: str, phase: str = "inference") -> ExperimentConfig:
    return load_config(source(folder, form), phase, options(folder, form, *more))


def filled(generator: SampleGenerator) -> Filled:
    (part, *_) = fills(generator, Holes(generator.config, num_samples=2), None)
    return part


@pytest.mark.parametrize("process", ["gaussian", "flow"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_given_is_kept_to_the_bit_and_decides_the_fill(
    tmp_path: Path, form: str, process: str
) -> None:
    more = (FLOW, "sampler.type=euler") if process == "flow" else ()
    assert run(tmp_path, "train", form, *more) == 0
    generator, _, _ = load_generator(config_of(tmp_path, form, *more))
    found, again = filled(generator), filled(generator)
    assert torch.equal(found.samples, again.samples)
    inside = (found.given.masks > 0).expand_as(found.samples)
    assert torch.equal(found.samples[~inside], found.given.samples[~inside])
    assert (found.samples[inside] != found.given.samples[inside]).any()
    assert 0 < float(found.given.masks.mean()) < 1
    # Other frames or voxels around the same hole: another fill of it.
    holes = Holes(generator.config, num_samples=2)
    given, at = holes.at(holes.items), holes.at
    outside = given.samples * (1 - given.masks)
    holes.at = lambda items: type(given)(  # type: ignore[method-assign]  # of this object
        items, given.samples - 2 * outside, given.masks, given.labels, []
    )
    (other,) = fills(generator, holes, None)
    assert not torch.isclose(other.samples[inside], found.samples[inside]).all()
    assert torch.equal(at(holes.items).samples, given.samples)


@pytest.mark.parametrize("form", FORMS)
def test_fills_and_what_was_given_are_written(
    tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "train", form, "sample_every=3") == 0
    assert run(tmp_path, "sample", form) == 0
    folder = tmp_path / "run"
    suffixes = {".png", ".gif"} | (set() if form == "solid" else {".mp4"})
    for stem in (folder / "samples", folder / "grids" / "step_0000003"):
        assert {path.suffix for path in stem.parent.glob(f"{stem.name}.*")} == suffixes
    if form != "solid":
        # Two samples as given, with their hole and filled: a row of frames for each, beside its title.
        assert Image.open(folder / "samples.png").size == (128 + FRAMES * 66 + 2, 6 * 66 + 2)
    assert run(tmp_path, "inference", form) == 0
    kind = "shapes" if form == "solid" else "videos"
    assert f"drew 3 {kind}" in capfd.readouterr().out
    written = [path for path in (folder / "inference").iterdir() if path.is_dir()]
    (made,) = (path for path in written if not path.name.endswith("_masked"))
    masked = made.with_name(f"{made.name}_masked")
    generator, _, _ = load_generator(config_of(tmp_path, form))
    holes = Holes(generator.config, num_samples=3)
    given = holes.at(holes.items)
    drawn = torch.cat([part.samples for part in fills(generator, holes, None)])
    # What is scored is never what had holes, however new.
    os.utime(masked)
    assert newest_samples(generator.config) == made
    if form == "solid":
        assert torch.equal(read_shapes(made), drawn.clamp(-1, 1))
        # What was in the hole is not there.
        _check_solid(read_shapes(masked), given.samples, given.masks)
        return
    assert sorted(path.name for path in made.iterdir()) == [f"00000{number}.mp4" for number in range(3)]
    shown = np.stack([np.asarray(Image.open(masked / f"00000{number}.png")) for number in range(3)])
    inside = np.concatenate(list((given.masks[:, 0] > 0).numpy().swapaxes(0, 1)), axis=-1)
    frames = np.concatenate(list(images.to_uint8(given.samples)[..., 0].swapaxes(0, 1)), axis=-1)
    assert np.array_equal(shown[..., 1], np.where(inside, 0, 255))
    assert np.array_equal(shown[..., 0], np.where(inside, 128, frames))


def _check_solid(shown: Tensor, given: Tensor, masks: Tensor) -> None:
    assert torch.equal(shown.isnan(), masks > 0)
    assert torch.equal(shown[masks == 0], given[masks == 0])


def _video_files(folder: Path) -> tuple[Tensor, Tensor, Path, Path, Path]:
    """A clip, a mask of frames, and as a PNG a mask of all frames."""
    frames = torch.randint(0, 2, (FRAMES, SIDE, SIDE, 1), generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(FRAMES, SIDE, SIDE, 1, dtype=torch.uint8)
    hole[2:] = 255
    frames = (frames * 255).to(torch.uint8)
    write_gif(folder / "clip.gif", frames, fps=8)
    # A GIF would drop the repeated frames.
    write_mp4(folder / "frames.mp4", hole, fps=8)
    spot = np.zeros((SIDE, SIDE), np.uint8)
    spot[4:8, 2:12] = 255
    Image.fromarray(spot).save(folder / "spot.png")
    return frames, hole, folder / "clip.gif", folder / "frames.mp4", folder / "spot.png"


def test_a_clip_of_the_user_is_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames, hole, clip, in_time, in_space = _video_files(tmp_path)
    assert run(tmp_path, "train", "time") == 0

    def given(mask: Path) -> tuple[Tensor, Tensor]:
        files = (f"inpaint_image={clip}", f"inpaint_mask={mask}", "sample_classes=[3,4]")
        assert run(tmp_path, "sample", "time", *files) == 0
        return read_given(config_of(tmp_path, "time", *files, phase="sample"), channels=1)

    sample, mask = given(in_time)
    # Black and white survive the palette of a GIF.
    assert torch.equal(sample, (frames.float() / 127.5 - 1).movedim(-1, 0)[None])
    assert torch.equal(mask, (hole > 127).float().movedim(-1, 0)[None])
    grid = np.asarray(Image.open(tmp_path / "run" / "samples.png"))
    # A row for the clip and for each of two fills, of two classes. The first frames are the clip's.
    rows = [grid[2 + 66 * row : 66 + 66 * row, 130:].astype(int) for row in range(6)]
    assert all(np.array_equal(row[:, :132], rows[0][:, :132]) for row in rows)
    assert all(not np.array_equal(row[:, 132:], rows[0][:, 132:]) for row in rows[1:3])
    sample, mask = given(in_space)
    assert torch.equal(mask[:, :, 0], mask[:, :, 3])
    assert mask[0, 0, 0].sum() == 4 * 10

    short = tmp_path / "short.gif"
    write_gif(short, frames[:2], fps=8)
    for files, message in (
        ((short, in_time), "inpaint_image needs num_frames 4 frames or more, got 2"),
        ((clip, short), "inpaint_mask needs num_frames 4 frames or more, got 2"),
        ((in_space, in_space), "inpaint_image needs a video file with num_frames 4"),
        ((tmp_path / "absent.mp4", in_time), "inpainting needs a file, got"),
    ):
        capsys.readouterr()
        paths = (f"inpaint_image={files[0]}", f"inpaint_mask={files[1]}")
        assert run(tmp_path, "sample", "time", *paths, "sample_classes=[3]") == 2
        assert message in capsys.readouterr().err


def test_a_solid_of_the_user_is_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solid, hole = np.zeros((8, 8, 8), bool), np.zeros((8, 8, 8), bool)
    solid[2:6, 2:6, 2:6], hole[4:, 4:, 4:] = True, True
    files = tmp_path / "solid.npy", tmp_path / "hole.npy"
    for path, array in zip(files, (solid, hole), strict=True):
        np.save(path, array)
    given = (f"inpaint_image={files[0]}", f"inpaint_mask={files[1]}")
    assert run(tmp_path, "train", "solid") == 0
    sample, mask = read_given(config_of(tmp_path, "solid", *given, phase="sample"), channels=1)
    assert np.array_equal(sample[0, 0].numpy(), np.where(solid, 1, -1))
    assert np.array_equal(mask[0, 0].numpy(), hole)
    assert run(tmp_path, "sample", "solid", *given, "sample_classes=[1]") == 0
    models = sorted(path.name for path in (tmp_path / "run" / "samples").glob("*"))
    # Meshes need scikit-image.
    assert models in ([], ["000000.obj", "000001.obj"])
    np.save(files[1], hole & False)
    wrongs = {files[1]: "hole.npy is empty", tmp_path / "x.obj": "inpaint_mask needs voxels in an .npy, 1 in"}
    for wrong, message in wrongs.items():
        wrong.touch()
        paths = (given[0], f"inpaint_mask={wrong}")
        assert run(tmp_path, "sample", "solid", *paths, "sample_classes=[1]") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        (
            "time",
            [TIME.replace("2, 2", "4, 4")],
            "FrameMasks may give 4 frames, and needs videos of more, got 4",
        ),
        ("time", ["num_frames=0", "image_size=16"], "inpainting: FrameMasks makes no holes in images"),
        (
            "space",
            ["data.dataset={type: LatentCache, path: x}"],
            "data.dataset: inpainting makes holes in pixels",
        ),
        ("solid", ["super_resolution.factor=2"], "super_resolution"),
    ],
)
def test_holes_that_do_not_fit_are_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, changes: list[Any], message: str
) -> None:
    if "num_frames=0" in changes:
        changes = [*changes, "model={type: DiT, patch_size: 4, hidden_size: 24, depth: 1, num_heads: 2}"]
        changes += ["data.dataset=Digits", "image_size=8", "model.input_size=8"]
    assert run(tmp_path, "train", form, *changes) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
