"""The samples that `speedit-spectrum` reads from a folder, in colour and in grey."""

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.spectrum_command import main
from speedit_plugins.spectrum_samples import Choice, read_samples
from speedit_plugins.trainer.data.images.digits import Digits


def test_equal_channels_are_noted_and_grey_reads_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    images = Digits(image_size=8).images[:400, 0]
    for number, image in enumerate(((images + 1) * 127.5).round().to(torch.uint8).numpy()):
        Image.fromarray(image).save(folder / f"{number:03d}.png")

    def measured(*options: str) -> tuple[dict[str, Any], str]:
        assert main([str(folder), *options, "--json", str(tmp_path / "found.json")]) == 0
        found = json.loads((tmp_path / "found.json").read_text())["measurements"]
        return found[0], capsys.readouterr().out

    (as_rgb, told), (as_grey, untold) = measured(), measured("--grey")
    assert (as_rgb["shape"], as_grey["shape"]) == ([3, 8, 8], [1, 8, 8])
    assert as_grey["centre"] == pytest.approx(DataSpectrum.of(images).log_snr_at(), abs=0.02)  # 8-bit pixels
    # Three equal channels show each value three times, with noise of its own: three times the SNR.
    for share in ("centre", "quarter", "three_quarters"):
        assert as_grey[share] - as_rgb[share] == pytest.approx(math.log(3), abs=1e-9)
    assert "each log-SNR is ln 3 = 1.10 higher: --grey" in told
    assert "note:" not in untold
    assert "the 3 channels are equal" in measured("--image-size", "4", "8")[1]
    # A coloured image becomes its luminance.
    colours = tmp_path / "colours"
    colours.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(colours / "a.png")
    (row,) = read_samples(colours, Choice(), grey=True).values
    # ITU-R BT.601, rounded to 8 bits.
    luminance = torch.from_numpy(pixels @ np.array([0.299, 0.587, 0.114]))
    assert_close((row[0].double() + 1) * 127.5, luminance, atol=0.51, rtol=0)
    with pytest.raises(ValueError, match="--encoder takes RGB images: leave out --grey"):
        read_samples(colours, Choice(), grey=True, encoder=cast(Any, object()))
