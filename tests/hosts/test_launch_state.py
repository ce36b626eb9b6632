"""The launcher keeps the state of policies: in a file of its own, or in accelerate's checkpoints."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from processes import Job
from test_launch import FOLDERS, host, reports, start

from speedit_plugins import policy_state
from speedit_plugins.hosts.edits.script_edits import CALLS, ScriptCalls, edited
from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.hosts.states.state_file import CHECKPOINT_FILE, StateFile, read_state

TRAIN = """
import sys
import torch
from diffusion import create_diffusion
from conformance.models import SmallModel
torch.manual_seed(5)
diffusion, model = create_diffusion(timestep_respacing=""), SmallModel(1)
opt = torch.optim.SGD(model.parameters(), lr=1e-3)
for step in range(int(sys.argv[1])):
    t = torch.full((4,), 999)
    diffusion.training_losses(model, torch.zeros(4, 4, 2, 2), t)["loss"].mean().backward()
    opt.step()
    with torch.no_grad():
        diffusion.training_losses(model, torch.zeros(4, 4, 2, 2), t)
print("seen", [t.tolist() for t in model.seen[::2]])
"""
CURRICULUM = ("--policy", "clts", "--set", "curriculum_steps=6")


def train_script(folder: Path) -> str:
    script = host(folder)
    script.write_text(TRAIN)
    return str(script)


def seen(done: subprocess.CompletedProcess[str]) -> list[list[int]]:
    assert done.returncode == 0, done.stderr
    drawn: list[list[int]] = ast.literal_eval(done.stdout.split("seen ")[1].splitlines()[0])
    return drawn


def steps_in(path: Path) -> int:
    """The training steps in a state file of one policy."""
    (state,) = read_state(path)["states"]
    return int(state["num_steps"])


class TestStateFile:
    def test_a_training_goes_on_with_its_draws(self, tmp_path: Path) -> None:
        script, state = train_script(tmp_path), ("--state", str(tmp_path / "policy.pt"))
        whole = seen(start(*CURRICULUM, script, "8"))
        parts = [seen(start(*CURRICULUM, *state, script, num_steps)) for num_steps in ("3", "5")]
        assert parts[0] + parts[1] == whole
        (kept,) = read_state(tmp_path / "policy.pt")["states"]
        assert (kept["num_steps"], kept["density"]) == (8, {"step": 7})

    def test_a_file_of_another_policy_is_refused(self, tmp_path: Path) -> None:
        script, state = train_script(tmp_path), ("--state", str(tmp_path / "policy.pt"))
        seen(start(*CURRICULUM, *state, script, "1"))
        before = (tmp_path / "policy.pt").read_bytes()
        done = start("--policy", "speed", *state, script, "1")
        assert done.returncode == 2
        assert 'has the state of policy {"curriculum_steps": 6, "type": "clts"}' in reports(done)[0]
        assert (tmp_path / "policy.pt").read_bytes() == before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--state-every", "5"), "--state-every has no effect without --state FILE"),
            (("--state", "absent/policy.pt"), "no folder absent for --state absent/policy.pt"),
            (("--state", "policy.pt", "--state-every", "0"), "--state-every needs at least 1 step, got 0"),
            (("--state", "train.py"), "train.py is no state of a policy, or damaged"),
            (("--num-strata", "1"), "num_strata needs a whole number >= 2, got 1"),
        ],
    )
    def test_bad_options(self, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
        script = train_script(tmp_path)
        done = start(*options, script, "1", cwd=tmp_path)
        assert (done.returncode, len(reports(done))) == (2, 1), done.stderr
        assert message in reports(done)[0]

    def test_a_killed_training_leaves_a_whole_file(self, tmp_path: Path) -> None:
        script, path = train_script(tmp_path), tmp_path / "policy.pt"
        options = ["--state", str(path), "--state-every", "2", *CURRICULUM, script, "1000000"]
        command = [sys.executable, "-m", "speedit_plugins.launch", *options]
        with Job(command, {"PYTHONPATH": FOLDERS}) as job:
            job.until(lambda: path.is_file() and steps_in(path) >= 4)
        # Leaving the block has killed it by SIGKILL.
        assert steps_in(path) % 2 == 0
        assert len(seen(start("--state", str(path), *CURRICULUM, script, "1"))) == 1

    def test_only_the_first_rank_writes(self, tmp_path: Path) -> None:
        seam, path = ScriptPolicy("clts"), tmp_path / "policy.pt"
        seam.timesteps(diffusers.DDPMScheduler(), 4)
        for writes in (False, True):
            file = StateFile(path, 1, "clts", writes=lambda writes=writes: writes)
            file.add(seam)
            file.step_done()
            assert path.is_file() == writes

    def test_a_state_without_its_policy_so_far_stays(self, tmp_path: Path) -> None:
        path, options = tmp_path / "policy.pt", {"writes": lambda: True}
        seams = [ScriptPolicy("clts") for _ in range(2)]
        file = StateFile(path, 1, "clts", **options)
        for number, seam in enumerate(seams):
            seam.timesteps(diffusers.DDPMScheduler(), 4 + number)
            file.add(seam)
        file.write()
        # The next run ends before its second policy trains.
        again = StateFile(path, 1, "clts", **options)
        again.add(ScriptPolicy("clts"))
        again.write()
        assert [state["num_steps"] for state in read_state(path)["states"]] == [1, 1]


def test_a_refused_state_is_not_lost(tmp_path: Path) -> None:
    path, options = tmp_path / "policy.pt", {"writes": lambda: True}
    seams = [ScriptPolicy("clts"), ScriptPolicy("clts")]
    file = StateFile(path, 1, "clts", **options)
    for seam in seams:
        seam.timesteps(diffusers.DDPMScheduler(), 4)
        file.add(seam)
    file.write()
    before = read_state(path)["states"]
    again, other = StateFile(path, 1, "clts", **options), ScriptPolicy("speedit")
    again.add(ScriptPolicy("clts"))
    other.timesteps(diffusers.DDPMScheduler(), 4)
    with pytest.raises(ValueError, match=r"policy\.pt: policy state needs policy 'speedit'"):
        again.add(other)
    again.write()
    assert [state["num_steps"] for state in read_state(path)["states"]] == [1, 1]
    assert [state["name"] for state in read_state(path)["states"]] == [state["name"] for state in before]


SCRIPT = """
accelerator = Accelerator(cpu=True)
timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (4,))
noisy = scheduler.add_noise(x, x, timesteps)
loss = F.mse_loss(noisy, x)
"""


def test_accelerates_checkpoints_keep_the_policy(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    tree, _ = edited(ast.parse(SCRIPT))
    names: dict[str, Any] = {"Accelerator": accelerate.Accelerator, "torch": torch, "x": torch.zeros(4, 1)}

    def run(state: StateFile | None = None) -> tuple[Any, ScriptPolicy]:
        seam, scheduler = ScriptPolicy("clts"), diffusers.DDPMScheduler()
        names.update({CALLS: ScriptCalls(seam, state), "scheduler": scheduler})
        exec(compile(tree, "script", "exec"), names)
        return names["accelerator"], seam

    accelerator, seam = run()
    accelerator.save_state(str(tmp_path / "first"))
    assert read_state(tmp_path / "first" / CHECKPOINT_FILE) == seam.state_dict()
    accelerator, other = run()
    other.policy.advance()
    accelerator.load_state(str(tmp_path / "first"))
    assert policy_state(other) == policy_state(seam)
    # A checkpoint of a training without a policy has no such file.
    (tmp_path / "first" / CHECKPOINT_FILE).unlink()
    accelerator.load_state(str(tmp_path / "first"))
    # With --state the file keeps it.
    accelerator, _ = run(StateFile(tmp_path / "policy.pt", 1, "clts", writes=lambda: True))
    accelerator.save_state(str(tmp_path / "second"))
    assert not (tmp_path / "second" / CHECKPOINT_FILE).exists()


def test_a_policy_of_parts_has_a_state(tmp_path: Path) -> None:
    script, config = train_script(tmp_path), {"density": "clts", "weighting": "constant"}
    for num_steps in (1, 2):
        done = start("--policy", json.dumps(config), "--state", str(tmp_path / "policy.pt"), script, "1")
        assert done.returncode == 0, done.stderr
        assert steps_in(tmp_path / "policy.pt") == num_steps
    assert os.listdir(tmp_path).count("policy.pt") == 1
