"""The edits that integrations/ describes, tried on the hosts' own lines; and the form of its READMEs."""

import ast
import os
import re
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from speedit_plugins.hosts.flow import FlowThinning
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule

INTEGRATIONS = Path(__file__).parents[2] / "integrations"
READMES = sorted(INTEGRATIONS.glob("*/README.md"))
N = 40_000
# SNR = ((1 - t) / t)^2 = 1 / 143.
BOUNDARY = FlowThinning().boundary


def checkout(name: str) -> Path:
    folder = Path(os.environ["SPEEDIT_HOSTS"]) / name
    if not folder.is_dir():
        pytest.skip(f"no checkout {name}")
    return folder


def code_blocks(integration: str) -> list[str]:
    """The Python blocks of an integration's README."""
    text = (INTEGRATIONS / integration / "README.md").read_text(encoding="utf-8")
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


def function_of(path: Path, name: str) -> Callable[..., Any]:
    """A function of a host's file, without the file's imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    names: dict[str, Any] = {"torch": torch, "Tensor": Tensor}
    exec(compile(ast.Module([found[0]], []), str(path), "exec"), names)
    function: Callable[..., Any] = names[name]
    return function


def is_thinned(late_before: Tensor, late_after: Tensor, k: float = 5.0) -> bool:
    """Whether the share p of late draws becomes (p / k) / (1 - p + p / k), within 4 binomial sigma."""
    before, after = float(late_before.double().mean()), float(late_after.double().mean())
    wanted = before / k / (1 - before + before / k)
    sigma = (wanted * (1 - wanted) / len(late_after)) ** 0.5 + (before * (1 - before) / N) ** 0.5 / k
    return abs(after - wanted) < 4 * sigma


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
class TestReadmes:
    def test_it_is_short_and_has_every_part(self, readme: Path) -> None:
        text = readme.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40
        assert "## Verified" in text
        assert "## Pitfalls" in text

    def test_the_table_names_it(self, readme: Path) -> None:
        table = (INTEGRATIONS / "README.md").read_text(encoding="utf-8")
        assert f"({readme.parent.name}/README.md)" in table


def test_sd3_keeps_its_law_thinned_by_sigma() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    own = import_module("diffusers.training_utils").compute_density_for_timestep_sampling
    text = (INTEGRATIONS / "diffusers_flow" / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(u = FlowThinning.+)`", text)

    def draw(*_: Any) -> Tensor:
        u: Tensor = own("logit_normal", N, logit_mean=0.0, logit_std=1.0)
        return u

    torch.manual_seed(0)
    names: dict[str, Any] = {"FlowThinning": FlowThinning, "noise_scheduler_copy": scheduler}
    exec(line, names | {"compute_density_for_timestep_sampling": draw}, names)
    before, after = (scheduler.sigmas[(u * 1000).long()] for u in (draw(), names["u"]))
    assert is_thinned(before > BOUNDARY, after > BOUNDARY)


@pytest.mark.hosts
def test_the_patch_of_open_sora_2(tmp_path: Path) -> None:
    host = checkout("hpcaitech+Open-Sora")
    patch = (INTEGRATIONS / "open_sora" / "open_sora_2.patch").read_text()
    path = "scripts/diffusion/train.py"
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes((host / path).read_bytes())
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    text = (tmp_path / path).read_text()
    added = [line[1:].strip() for line in patch.splitlines() if line.startswith("+") and line[1:2] != "+"]
    assert all(text.count(line) == 1 for line in added)
    # The host's own draw stays before ours, and its shift is gone.
    assert "t = torch.sigmoid(torch.randn((bs), device=device))\n        t = draws" in text
    names: dict[str, Any] = {"t": torch.rand(N), "x_0": torch.zeros(N, 1), "dtype": torch.float32}
    exec("\n".join(added), names)
    policy = names["draws"].policy
    assert policy.num_steps == 1
    weighing = "\n".join(added).replace('policy = "auto"', 'policy = "speedit"')
    with pytest.raises(ValueError, match=r"'speedit' weighs .*Open-Sora 2\.0 takes the mean of the batch"):
        exec(weighing, names)
    # Draws are stratified over the batch: a share is exact to a draw or two.
    assert abs(float((names["t"] > 0.6).double().mean()) - float(policy.density[600:].sum())) < 1e-4
    assert bool((policy.weight == 1).all())


@pytest.mark.hosts
def test_the_line_of_flow_matching() -> None:
    path = checkout("facebookresearch+flow_matching") / "examples/image/training/train_loop.py"
    draw, loss, other = code_blocks("flow_matching")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    text = (INTEGRATIONS / "flow_matching" / "README.md").read_text(encoding="utf-8")
    first, last, loss_line = (
        int(n) - 1 for n in re.findall(r"`:(\d+)(?:-(\d+))?`.*?`:(\d+)`", text, re.DOTALL)[0]
    )
    assert lines[first] == "if args.skewed_timesteps:"
    assert lines[last].startswith("t = torch.torch.rand(")
    assert lines[loss_line].startswith("loss = torch.pow(model(")
    laws = (function_of(path, "skewed_timestep_sample"), lambda n, device: torch.rand(n, device=device))
    torch.manual_seed(0)
    for law in laws:
        names: dict[str, Any] = {"torch": torch, "skewed_timestep_sample": law}
        names.update(FlowThinning=FlowThinning, samples=torch.zeros(N, 1), device=torch.device("cpu"))
        exec(draw, names)
        t = names["t"]
        assert is_thinned(1 - law(N, device=torch.device("cpu")) > BOUNDARY, 1 - t > BOUNDARY)
    # The loss is each sample's error times the weight at its noise level.
    names.update(model=lambda x, t, extra: x, x_t=torch.ones(N, 2), u_t=torch.zeros(N, 2), conditioning={})
    names["flow"] = FlowThinning(k=5, lam=0.6)
    exec(loss, names)
    assert torch.allclose(names["loss"], names["flow"].weight(1 - t).mean())
    # A policy with a law of its own draws for itself, seen from the other end of the time.
    exec(other, names)
    assert torch.equal(names["t"], 1 - names["draw"].time)
    policy = build_policy("logit_normal", NoiseSchedule.rectified_flow(1000), "flow")
    late = float(policy.density[700:].sum())
    share = float((names["t"] < 0.3).double().mean())
    assert abs(share - late) < 4 * (late * (1 - late) / N) ** 0.5
