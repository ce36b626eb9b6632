"""The centre of a policy that follows the data is measured once, before training."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.images.digits import Digits
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.inputs import BatchEncoder
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training import data_centre
from speedit_plugins.trainer.training.data_centre import centred, is_centred_by_data
from speedit_plugins.trainer.training.dry_run import describe
from speedit_plugins.trainer.training.train import train

LONE = Runtime(device=torch.device("cpu"))


def digits(*options: str) -> ExperimentConfig:
    return load_config("configs/image/digits/base.yaml", "train", ["model.depth=1", *options])


def test_the_centre_is_that_of_the_data() -> None:
    config = centred(digits("diffusion.policy=spectral"), LONE)
    whole = DataSpectrum.of(Digits(image_size=config.image_size).images).log_snr_at()
    # The trainer measures 1,024 of the 1,797 digits, in its train split.
    assert config.diffusion.policy["mean"] == pytest.approx(whole, abs=0.1)
    assert not is_centred_by_data(config)


def test_a_density_of_its_own_is_centred_too() -> None:
    parts = ["diffusion.policy.density=log_snr_normal", "diffusion.policy.weighting=constant"]
    policy = centred(digits(*parts), LONE).diffusion.policy
    named = centred(digits("diffusion.policy=spectral_fast"), LONE).diffusion.policy
    assert policy["density"] == {"type": "log_snr_normal", "mean": named["mean"]}


@pytest.mark.parametrize("policy", ["speedit", "uniform"])
def test_other_policies_measure_nothing(policy: str) -> None:
    config = digits(f"diffusion.policy={policy}")
    assert centred(config, LONE) is config


def test_a_given_centre_is_kept() -> None:
    config = digits("diffusion.policy=spectral", "diffusion.policy.mean=-1.5")
    assert centred(config, LONE) is config


def test_the_rest_of_the_policy_is_checked_before_the_data_are_read() -> None:
    policy = "diffusion.policy={type: spectral, weighting: p3}"
    with pytest.raises(ValueError, match="unknown weighting 'p3'"):
        centred(digits(policy, "data.dataset={type: ImageFolder, root: /nowhere}"), LONE)


def test_of_several_shapes_the_commonest_is_measured(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(48):
        # A third of the images are wide and black or white. The others are tall and hardly vary.
        is_wide, shade = number % 3 == 0, int(torch.randint(256, (), generator=generator))
        size, grey = ((16, 8), 255 * (shade // 128)) if is_wide else ((8, 16), 120 + shade // 16)
        Image.new("RGB", size, (grey,) * 3).save(tmp_path / f"{number:02d}.png")
    folder = "type: ImageFolder, class_cond: false, buckets: [[16, 8], [8, 16]]"

    def mean(root: Path) -> float:
        data = [f"data.dataset={{{folder}, root: {root}}}", "data.batch_size=4", "data.num_workers=0"]
        shape = [
            "encoder={type: Pixels, channels: 3}",
            "num_classes=0",
            "image_size=16",
            "model.in_channels=3",
        ]
        config = digits("diffusion.policy=spectral", "image_size=16", *shape, *data)
        return float(centred(config, LONE).diffusion.policy["mean"])

    both = mean(tmp_path)
    for number in range(0, 48, 3):
        (tmp_path / f"{number:02d}.png").unlink()
    assert both == pytest.approx(mean(tmp_path), abs=0.5)


def test_the_loading_processes_end_with_a_broken_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(ResumableLoader, "close", lambda loader: closed.append(loader))
    monkeypatch.setattr(BatchEncoder, "encode", lambda *_: next(iter(())))
    with pytest.raises(StopIteration):
        centred(digits("diffusion.policy=spectral"), LONE)
    assert len(closed) == 1


def test_a_resumed_run_keeps_its_centre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [f"experiment_dir={tmp_path}", "optimizer.warmup_steps=0", "data.batch_size=8"]
    policy = "diffusion.policy=spectral"
    train(digits(policy, "max_training_steps=1", *options))
    path = tmp_path / "config_train.yaml"
    measured = load_config(path, "train").diffusion.policy["mean"]
    monkeypatch.setattr(data_centre, "_measured", lambda config, runtime: 9.0)
    train(digits(policy, "max_training_steps=2", *options))
    assert load_config(path, "train").diffusion.policy["mean"] == measured
    # Another policy has no centre.
    with pytest.raises(CheckpointError, match=r"diffusion.policy was .*'spectral'.*got .*'uniform'"):
        train(digits("diffusion.policy=uniform", *options, "max_training_steps=3"))


def test_training_writes_the_centre_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["max_training_steps=1", f"experiment_dir={tmp_path}", "optimizer.warmup_steps=0"]
    config = digits("diffusion.policy=spectral", *options)
    assert "policy             spectral, centred by the data when training starts\n" in describe(config).text
    train(config)
    assert "the policy is centred at log-SNR " in capsys.readouterr().out
    written = load_config(str(tmp_path / "config_train.yaml"), "train", [])
    assert written.diffusion.policy == centred(config, LONE).diffusion.policy
