"""Runs with captions, videos, masks and flows through the command line, as a user starts them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from saved_models import save_pipeline
from torch.testing import assert_close

from speedit_plugins.cli import main
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.videos.files import VideoHeader, read_header
from speedit_plugins.trainer.training.assembly import build_trainer

EMOJI, MOVING = "configs/text_to_image/emoji_pixart.yaml", "configs/text_to_video/moving_digits_latte.yaml"
DIGITS = "configs/image/digits/speedit.yaml"
NARROW = ("model.num_layers=1", "model.num_heads=2", "model.head_dim=8", "data.batch_size=4")
SHORT = ("enable_tensorboard_log=false", "log_every=1", "optimizer.warmup_steps=1")


def run(phase: str, config: str, folder: Path, *options: str) -> int:
    only = ("max_training_steps=2", *SHORT) if phase == "train" else ("sampler.num_steps=2",)
    return main(["-c", config, "-p", phase, f"experiment_dir={folder}", *options, *only])


def error(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err


def test_a_text_to_image_run_trains_samples_and_infers(tmp_path: Path) -> None:
    short = (*NARROW, "text_encoder.max_length=6")
    assert run("train", EMOJI, tmp_path, *short) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Some of the 1,911 names of emoji have more than four words.
    assert rows[-1]["cut_captions"] > 0
    asked = ("sample_prompts=[red heart,a sun]", "samples_per_class=2")
    assert run("sample", EMOJI, tmp_path, *short, *asked) == 0
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.width == 2 * 66 + 2
        assert grid.height > 2 * 66 + 2  # the titles
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\ngreen apple\n")
    files = ("sample_prompts=[]", f"prompts_file={prompts}", "num_samples=3", "per_proc_batch_size=2")
    assert run("inference", EMOJI, tmp_path, *short, *files) == 0
    (folder,) = (path for path in (tmp_path / "inference").iterdir() if path.is_dir())
    captions = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in captions] == ["red heart", "green apple", "red heart"]
    assert sorted(path.name for path in folder.glob("*.png")) == [row["file_name"] for row in captions]
    with np.load(folder.with_suffix(".npz")) as npz:
        assert npz["arr_0"].shape == (3, 32, 32, 3)


def test_a_text_to_video_run_trains_samples_and_infers(tmp_path: Path) -> None:
    assert run("train", MOVING, tmp_path, *NARROW, "sample_every=2", "sampler.num_steps=2") == 0
    with Image.open(tmp_path / "grids" / "step_0000002.gif") as gif:
        assert gif.n_frames == 4
    assert run("sample", MOVING, tmp_path, *NARROW) == 0
    assert {path.suffix for path in tmp_path.glob("samples.*")} == {".png", ".mp4", ".gif"}
    grid = read_header(tmp_path / "samples.mp4")
    with Image.open(tmp_path / "samples.gif") as gif:
        assert (grid.num_frames, gif.size) == (4, (grid.width, grid.height))
    assert run("inference", MOVING, tmp_path, *NARROW, "num_samples=3", "per_proc_batch_size=2") == 0
    (folder,) = (tmp_path / "inference").iterdir()
    headers = [read_header(path) for path in folder.glob("*.mp4")]
    assert headers == [VideoHeader(num_frames=4, height=16, width=16)] * 3


@pytest.mark.parametrize("kind", ["image/emoji", "video/moving_digits"])
def test_a_demo_trains_resumes_and_samples(tmp_path: Path, kind: str) -> None:
    config = f"configs/text_to_{kind}.yaml"
    small = ("model.hidden_size=16", "model.depth=2", "model.num_heads=2", "data.batch_size=4")
    assert run("train", config, tmp_path / "whole", *small, "ckpt_every=1") == 0
    first = tmp_path / "whole/checkpoints/step_0000001"
    assert run("train", config, tmp_path / "resumed", *small, f"resume={first}") == 0
    wanted, found = (
        load_file(tmp_path / name / "checkpoints/step_0000002/model.safetensors")
        for name in ("whole", "resumed")
    )
    assert_close(found, wanted, rtol=0, atol=0)
    assert run("sample", config, tmp_path / "whole", *small) == 0
    assert (tmp_path / "whole/samples.png").is_file()


def settled(folder: Path, phase: str) -> tuple[str, str, str]:
    """The process, the prediction type and the sampler of a phase that ran."""
    content = yaml.safe_load((folder / f"config_{phase}.yaml").read_text())
    diffusion, sampler = content["diffusion"], content["sampler"]
    return diffusion["type"], diffusion["prediction_type"], sampler["type"]


@pytest.mark.parametrize(
    ("config", "options"), [(EMOJI, NARROW), (MOVING, NARROW), (DIGITS, ("model.depth=1",))]
)
def test_one_key_makes_any_run_a_flow(tmp_path: Path, config: str, options: tuple[str, ...]) -> None:
    gaussian = load_config(config, "sample", [*options, "diffusion.type=SpeeDiffusion"])
    process, sampler = gaussian.diffusion, gaussian.sampler
    assert (process.type, process.prediction_type, sampler.type) == ("SpeeDiffusion", "epsilon", "ddpm")
    for phase in ("train", "sample"):
        assert run(phase, config, tmp_path, *options, "diffusion.type=RectifiedFlow") == 0
        assert settled(tmp_path, phase) == ("RectifiedFlow", "flow", "euler")


def test_a_hole_is_filled_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("model.depth=1", "inpainting=RandomMasks", "samples_per_class=3")
    assert run("train", DIGITS, tmp_path, *options) == 0
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    hole = np.zeros((8, 8), np.uint8)
    hole[2:5, 3:7] = 255
    Image.fromarray(picture).save(tmp_path / "image.png")
    Image.fromarray(hole).save(tmp_path / "mask.png")
    files = (f"inpaint_image={tmp_path / 'image.png'}", f"inpaint_mask={tmp_path / 'mask.png'}")
    assert run("sample", DIGITS, tmp_path, *options, "sample_classes=[4]", *files) == 0
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    given, *fills = (grid[2:66, 2 + 66 * column : 66 + 66 * column].astype(int) for column in range(4))
    # Bicubic interpolation enlarges cells eight times. It reaches two pixels, and the corner is further away.
    assert all(np.array_equal(fill[48:, :8], given[48:, :8]) for fill in fills)
    assert all(not np.array_equal(fill[16:40, 24:56], given[16:40, 24:56]) for fill in fills)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "mask.png")
    assert "needs white pixels in the hole" in error(capsys, "sample", DIGITS, tmp_path, *options, *files)
    Image.fromarray(hole[:4]).save(tmp_path / "mask.png")
    message = error(capsys, "sample", DIGITS, tmp_path, *options, *files)
    assert "inpaint_mask needs the size of the image, 8 x 8, got 8 x 4" in message
    files = (f"inpaint_image={tmp_path / 'absent.png'}", files[1])
    assert "absent.png, which is none" in error(capsys, "sample", DIGITS, tmp_path, *options, *files)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (EMOJI, ("model.text_width=512",), "model.text_width needs 384"),
        (
            DIGITS,
            ("num_classes=0", "model.num_classes=0", "text_encoder=MiniLM"),
            "text_encoder does not fit the model DiT: wanted null",
        ),
        (EMOJI, ("num_classes=3",), "text_encoder: wanted num_classes 0 beside it, got 3"),
        (EMOJI, ("num_frames=4",), "num_frames: 4 does not fit the model PixArt, which has 0"),
        (MOVING, ("num_frames=0",), "num_frames: 0 does not fit the model LatteT2V, which has 16"),
        (EMOJI, ("model.in_channels=4",), "model.in_channels needs 3"),
        (
            MOVING,
            ("data.dataset.num_frames=8",),
            "data.dataset.num_frames: wanted the value of num_frames, 4",
        ),
        (MOVING, ("frames_per_second=60",), "frames_per_second: wanted float <= 50, got 60"),
        (
            EMOJI,
            ("image_size=8", "model.in_channels=1", "encoder.channels=1", "data.dataset=Digits"),
            "text_encoder needs data with captions, got batches of image, label",
        ),
        (DIGITS, ("sample_prompts=[a]",), "sample_prompts: has no effect without text_encoder"),
        (
            DIGITS,
            ("inpainting=RandomMasks", "sample_every=5", "samples_per_class=2000", "model.depth=1"),
            "inpainting fills each image of the dataset once: wanted at most its 1797 images, got 2000",
        ),
        (
            EMOJI,
            ("inpainting=RandomMasks",),
            "inpainting does not fit the model PixArt",
        ),
        (
            MOVING,
            ("inpainting=FrameMasks",),
            "inpainting does not fit the model LatteT2V",
        ),
        (DIGITS, ("diffusion.shift=3",), "diffusion.shift: has no effect with diffusion.type SpeeDiffusion"),
        (
            EMOJI,
            ("diffusion.type=RectifiedFlow", "diffusion.noise_schedule=cosine"),
            "diffusion.noise_schedule: has no effect with diffusion.type RectifiedFlow",
        ),
        (EMOJI, ("diffusion.type=RectifiedFlow", "diffusion.learn_sigma=true"), "wanted learn_sigma null"),
        (DIGITS, ("diffusion.prediction_type=flow",), "flow is what diffusion.type RectifiedFlow predicts"),
        (
            DIGITS,
            ("sample_every=1", "sampler.type=euler"),
            "sampler.type: wanted one of ddpm, ddim, ddim_leading, ddim_leading_1, dpm_solver with",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, options: tuple[str, ...], message: str
) -> None:
    assert message in error(capsys, "train", config, tmp_path, *options)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("max_length", [16, 6])
def test_fine_tuning_drops_captions_to_its_own_text_encoders_empty_one(
    tmp_path: Path, max_length: int
) -> None:
    arguments = [f"experiment_dir={tmp_path}", "max_training_steps=2", *NARROW, *SHORT]
    weights = dict(build_trainer(load_config(EMOJI, "train", arguments)).model.state_dict())
    weights["null_tokens"] = weights["null_tokens"] + 1
    save_file(weights, tmp_path / "file.safetensors")
    own = load_config(EMOJI, "train", [*arguments, f"text_encoder.max_length={max_length}"])
    fresh = build_trainer(own).model
    tuned = build_trainer(own, weights=str(tmp_path / "file.safetensors")).model
    assert_close(tuned.null_text, fresh.null_text, rtol=0, atol=0)
    found = {name: value for name, value in tuned.state_dict().items() if "null" not in name}
    assert_close(found, {name: weights[name] for name in found}, rtol=0, atol=0)


def test_another_autoencoder_than_the_models_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = save_pipeline(tmp_path / "parts", "PixArt")
    places = f"path: {parts}, subfolder: text_encoder, tokenizer_subfolder: tokenizer"
    text = f"{places}, max_length: 8, dtype: float32"
    options = (
        "image_size=16",
        "model={type: PixArt, num_layers: 1, in_channels: 16, input_size: 8, text_width: 16, text_length: 8}",
        f"encoder={{type: AutoencoderKL, path: {parts}, subfolder: vae}}",
        f"text_encoder={{type: TextEncoder, {text}}}",
        "data.dataset={type: Emoji, image_size: 16}",
        "data.num_workers=0",
    )
    config = "configs/text_to_image/pixart_256.yaml"
    assert "model.in_channels needs 4" in error(capsys, "train", config, tmp_path / "run", *options)
