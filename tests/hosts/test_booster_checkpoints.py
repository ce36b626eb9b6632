"""A policy's state in the checkpoints of ColossalAI's own Booster, as Open-Sora and OpenDiT write them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from test_launch import FOLDERS

pytest.importorskip("colossalai", reason="needs ColossalAI")

# A training that saves after three steps and goes on; then, in processes of their own, what comes after it.
SCRIPT = """
import os
import sys
import warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from colossalai.booster import Booster
from conformance.models import SmallModel
from speedit_plugins import with_policy
torch.manual_seed(5)
folder, booster = Path(sys.argv[1]), Booster()
optimizer = torch.optim.SGD(SmallModel(1).parameters(), lr=1e-3)

class Diffusion:
    alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
    model_mean_type = "epsilon"
    def training_losses(self, model, x_start, t):
        mse = model(x_start, t).flatten(1).square().mean(1)
        return {"mse": mse, "loss": mse}

def made(policy):
    model, diffusion = SmallModel(1), with_policy(Diffusion(), policy)
    def step():
        diffusion.training_losses(model, torch.zeros(4, 4, 2, 2), torch.zeros(4, dtype=torch.int64))
        return model.seen[-1].tolist()
    return step

def save(name):
    (folder / name).mkdir()
    booster.save_optimizer(optimizer, str(folder / name / "optimizer"), shard=True)

def load(name):
    booster.load_optimizer(optimizer, str(folder / name / "optimizer"))

def train():
    step = made("clts")
    save("untrained")
    before = [step() for _ in range(3)]
    save("three")
    after = [step() for _ in range(3)]
    # Back to the third step, in the same process.
    load("three")
    print([before, after, [step() for _ in range(3)]])

def resume(policy, name):
    step = made(policy)
    load(name)
    try:
        print([step() for _ in range(3)])
    except ValueError as error:
        print(str(error).replace(str(folder), "FOLDER"))

for part in (train, lambda: resume("clts", "three"), lambda: resume("speedit", "three"),
             lambda: resume("clts", "untrained")):
    if (process := os.fork()) == 0:
        part()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(process, 0)
"""


def test_a_resumed_training_goes_on_with_its_draws(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": FOLDERS, "PATH": ""}, check=False
    )
    assert done.returncode == 0, done.stderr
    trained, resumed, refused, anew = done.stdout.splitlines()[-4:]
    before, after, again = ast.literal_eval(trained)
    assert before != after
    assert again == after
    assert ast.literal_eval(resumed) == after
    assert refused.startswith("FOLDER/three/speedit_policy.pt: policy state needs policy 'speedit'")
    assert ast.literal_eval(anew) == before
    assert [path.parent.name for path in tmp_path.rglob("speedit_policy.pt")] == ["three"]
