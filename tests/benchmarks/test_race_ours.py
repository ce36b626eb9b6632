"""Our contestants in the race: their rows, their configs, and how they go on."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Load = Callable[[str], ModuleType]


@pytest.mark.parametrize("file", ["ours.yaml", "parts.yaml"])
def test_every_row_is_a_config_of_ours(load: Load, tmp_path: Path, file: str) -> None:
    ours, training = load("race.ours"), load("race.training")
    terms = training.Terms(steps=100)
    for name, row in ours.read_rows(ours.ROWS.with_name(file)).items():
        content = load("overrides").merged(ours.own_config(training.Net(32, 1, 10), terms, tmp_path), row)
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(content))
        assert ours.load_config(path, "train").experiment_dir == str(tmp_path), name


def test_ours_goes_on_from_its_state_to_the_bit(load: Load, tmp_path: Path) -> None:
    data = load("image_sets").load_image_set("digits", 8)
    net = load("race.training").Net(8, 1, 10, width=16, depth=2, num_heads=2, patch_size=4)
    terms = load("race.training").Terms(batch_size=4, steps=10, ema_halflife=2.0)
    row = {
        "diffusion": {"type": "RectifiedFlow", "policy": {"type": "uniform"}},
        "optimizer": {"type": "Muon"},
        "alignment": {"type": "SRA", "layer": 1},
    }
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([100.0, 900.0]), torch.tensor([1, 2])

    def shown(training: Any) -> torch.Tensor:
        with torch.no_grad():
            return training.denoiser()(x, t, y)

    whole = load("race.ours").OurTraining(row, net, data, terms, tmp_path / "whole")
    half = load("race.ours").OurTraining(row, net, data, terms, tmp_path / "half")
    for training, steps in ((whole, 3), (half, 2)):
        for _ in range(steps):
            training.step()
    half.save(tmp_path)
    # What only the training uses is told apart from the common model.
    plain = load("race.__main__")._num_parameters(net)
    assert half.num_parameters < plain
    assert half.num_training_only > 0
    rest = load("race.ours").OurTraining(row, net, data, terms, tmp_path / "half")
    rest.load(tmp_path)
    # In between it is evaluated; that changes nothing.
    assert not torch.equal(shown(rest), shown(whole))
    rest.step()
    assert torch.equal(shown(rest), shown(whole))
