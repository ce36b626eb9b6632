"""The launcher draws in a host like sd-scripts, and goes on with its draws."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import library_standin
import pytest
import torch
from test_launch import reports, start
from test_noisy_batch import FLAGS

SCRIPT = """
import argparse, json, sys
import torch
from library import flux_train_utils, train_util
from diffusers import FlowMatchEulerDiscreteScheduler
args = argparse.Namespace(**json.loads(sys.argv[1]))
torch.manual_seed(5)
scheduler, parameter, seen = FlowMatchEulerDiscreteScheduler(), torch.nn.Parameter(torch.ones(1)), []
opt = torch.optim.SGD([parameter], lr=0.0)
for step in range(int(sys.argv[2])):
    latents, noise = torch.randn(2, 4, 1, 2, 2)
    noisy, timesteps, _ = flux_train_utils.get_noisy_model_input_and_timesteps(
        args, scheduler, latents, noise, "cpu", torch.float32
    )
    train_util.conditional_loss(parameter * noisy, noise - latents, "l2", "none").mean().backward()
    opt.step()
    seen.append([round(float(t), 2) for t in timesteps])
print("seen", json.dumps(seen))
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., list[list[float]]]:
    shutil.copytree(Path(library_standin.__file__).parent, tmp_path / "library")
    (tmp_path / "train.py").write_text(SCRIPT)

    def run(num_steps: int, *options: str) -> list[list[float]]:
        flags = json.dumps({**FLAGS, "timestep_sampling": "shift"})
        done = start(*options, str(tmp_path / "train.py"), flags, str(num_steps))
        assert done.returncode == 0, done.stderr
        assert reports(done)[0].startswith("sd-scripts (Flux, HunyuanImage, Anima), seam F, policy auto: ")
        seen: list[list[float]] = json.loads(done.stdout.split("seen ")[1])
        return seen

    return run


def test_the_launcher_draws_and_resumes(tmp_path: Path, script: Callable[..., list[list[float]]]) -> None:
    """Two launches with a state draw what one launch draws; the data of a step are the same in each."""
    state = ("--state", str(tmp_path / "policy.pt"))
    first, second = script(2, "--policy", "auto", *state), script(3, "--policy", "auto", *state)
    assert first == script(5, "--policy", "auto")[:2]
    # The draws go on: with the same seed those of the first launch do not come again.
    assert second[0] != first[0]
    assert torch.load(tmp_path / "policy.pt", weights_only=True)["states"][0]["num_steps"] == 5
