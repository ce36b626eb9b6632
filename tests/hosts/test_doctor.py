"""`--doctor`: what is found in scripts without running them, and that the lines it writes work in them."""

import ast
import doctest
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from project_files import written

from speedit_plugins import NoiseSchedule, build_policy, launch
from speedit_plugins.doctor import host_law
from speedit_plugins.doctor.edits import edits
from speedit_plugins.doctor.host_law import law_of_host
from speedit_plugins.doctor.known_hosts import HOSTS as ROWS
from speedit_plugins.doctor.places import draws, losses
from speedit_plugins.doctor.report import examined
from speedit_plugins.doctor.sources import read_project
from speedit_plugins.hosts.edits.sigma_edits import DENSITY, WEIGHTING
from speedit_plugins.hosts.laws.laws import HOSTS, host_config

ROOT = Path(__file__).parents[2]
# A law that draws nowhere else: whoever draws by it shows by each t.
NARROW = {"type": "logit_normal", "window": [0.4, 0.6]}


# Scripts without a seam, the part of this package that fits each, and t of a step, in our direction.
HEAD = "import torch\nimport torch.nn.functional as F\nmodel = torch.nn.Linear(3, 3)\nseen = []\n"
LOOP = """
for _ in range(3):
    x = torch.arange(24.0).view(8, 3) / 24
    noise = torch.randn_like(x)
    {draw}
    noisy = {mix}
    seen.append({seen})
    {loss}
    loss.backward()
"""
MSE = "loss = F.mse_loss(model(noisy), noise - x)"
DDPM = "from diffusers import DDPMScheduler\nscheduler = DDPMScheduler()\n"
FLOW = (
    "from diffusers import FlowMatchEulerDiscreteScheduler\nscheduler = FlowMatchEulerDiscreteScheduler()\n"
)
OBJECT = """
class Diffusion:
    alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
    model_mean_type = "epsilon"
    def training_losses(self, model, x_start, t):
        seen.append(t / 999)
        mse = ((model(x_start) - x_start) ** 2).mean(1)
        return {"mse": mse, "loss": mse}
diffusion = Diffusion()
for _ in range(3):
    x = torch.randn(8, 3)
    t = torch.randint(0, 1000, (8,))
    loss = diffusion.training_losses(model, x, t)["loss"].mean()
    loss.backward()
"""
UNKNOWN: dict[str, tuple[str, str]] = {
    "toward noise": (
        "SeparateDraws",
        LOOP.format(
            draw="t = torch.rand(x.shape[0], device='cpu')",
            mix="(1 - t[:, None]) * x + t[:, None] * noise",
            seen="t",
            loss=MSE,
        ),
    ),
    "toward data": (
        "SeparateDraws",
        LOOP.format(
            draw="t = torch.sigmoid(torch.randn((8, 1)))",
            mix="t * x + (1 - t) * noise",
            seen="1 - t",
            loss="loss = ((model(noisy) - (x - noise)) ** 2).mean(1)\n    loss = loss.mean()",
        ),
    ),
    "without gradients": (
        "build_policy",
        LOOP.format(
            draw="with torch.no_grad():\n        sigma = torch.rand((8,), device='cpu')",
            mix="(1 - sigma[:, None]) * x + sigma[:, None] * noise",
            seen="sigma",
            loss=MSE,
        ),
    ),
    "scheduler by an attribute": (
        "build_policy",
        "class Parts:\n    scheduler = scheduler\n"
        + LOOP.format(
            draw="timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (8,), device='cpu')",
            mix="scheduler.add_noise(x, noise, timesteps)",
            seen="timesteps / 999",
            loss="loss = ((model(noisy) - noise) ** 2).mean(1)\n    loss = loss.mean()",
        ),
    ),
    "noise scheduler": (
        "ScriptPolicy",
        LOOP.format(
            draw="timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (8,), device='cpu')",
            mix="scheduler.add_noise(x, noise, timesteps)",
            seen="timesteps / 999",
            # The launcher does not know this form of a mean.
            loss="loss = ((model(noisy) - noise) ** 2).mean()",
        ),
    ),
    "rows of a flow": (
        "FlowScript",
        LOOP.format(
            draw="indices = torch.randint(0, 1000, (8,))\n    timesteps = scheduler.timesteps[indices]",
            mix="scheduler.scale_noise(x, timesteps, noise)",
            seen="scheduler.sigmas[indices]",
            loss="loss = ((model(noisy) - (noise - x)) ** 2).mean()",
        ),
    ),
    "diffusion object": ("with_policy", OBJECT),
}


def script_of(case: str) -> str:
    kind, text = UNKNOWN[case]
    scheduler = FLOW if kind == "FlowScript" else DDPM if "scheduler." in text else ""
    return HEAD + scheduler + text


def edited_by(text: str, lines: tuple[tuple[str, str], ...]) -> str:
    """A script of one-line statements with the lines written where they are said to go."""
    rows = text.splitlines()
    once: list[str] = []
    added: dict[int, list[str]] = {}
    place = ""
    for where, code in lines:
        place = where or place
        numbered = re.fullmatch(r"train\.py:(\d+), (in its place|after it)", place)
        if numbered is None:
            assert place == "train.py, once"
            once.append(code)
            continue
        row = rows[int(numbered[1]) - 1]
        if where and numbered[2] == "in its place":
            rows[int(numbered[1]) - 1] = row.replace(row.strip(), "pass")
        added.setdefault(int(numbered[1]), []).append(" " * (len(row) - len(row.lstrip())) + code)
    result = [code for code in once if code.startswith("from ")]
    for number, row in enumerate(rows, 1):
        result += [code for code in once if row.startswith("for ") and code not in result]
        result += [row, *added.get(number, [])]
    return "\n".join(result)


@pytest.mark.parametrize("case", UNKNOWN)
def test_the_lines_for_an_unknown_script_put_the_policy_into_it(case: str, tmp_path: Path) -> None:
    text = script_of(case)
    project = read_project(written(tmp_path, {"train.py": text}))
    drawn, lost = draws(project.script), losses(project.script)
    found = edits(project, drawn, lost, repr(NARROW))
    assert found is not None
    assert found.what.split(":")[0] == UNKNOWN[case][0]
    names: dict[str, Any] = {"__name__": "edited"}
    exec(compile(edited_by(text, found.lines), "edited", "exec"), names)
    seen = torch.cat([each.flatten() for each in names["seen"]])
    assert len(seen) == 24
    # A row of a table is half a bin from its place.
    assert bool(((seen > 0.398) & (seen < 0.602)).all()), seen
    assert names["model"].weight.grad is not None


def test_the_report_in_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    (number,) = [number for number, block in enumerate(blocks) if block.startswith("import torch\n")]
    _, report = examined(written(tmp_path, {"train.py": blocks[number]}), [], {"type": "recommended"})
    assert report.partition("\n")[2] == blocks[number + 1].rstrip("\n")


def test_a_table_of_alpha_bars_is_no_flow(tmp_path: Path) -> None:
    text = (
        HEAD
        + "bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)\n"
        + LOOP.format(
            draw="t = torch.randint(0, 1000, (8,))",
            mix="bars[t, None].sqrt() * x + (1 - bars[t, None]).sqrt() * noise",
            seen="t / 999",
            loss="loss = ((model(noisy) - noise) ** 2).mean()",
        )
    )
    _, report = examined(written(tmp_path, {"train.py": text}), [], {"type": "recommended"})
    assert 'build_policy("recommended", NoiseSchedule.from_alphas_cumprod(bars), "epsilon")' in report
    assert "t = draw.index" in report
    assert "policy.advance()" in report


@pytest.mark.parametrize("case", ["toward noise", "without gradients", "scheduler by an attribute"])
def test_the_lines_weigh_the_loss(case: str, tmp_path: Path) -> None:
    text = script_of(case).replace("loss.backward()", "raise StopIteration")
    project = read_project(written(tmp_path, {"train.py": text}))
    # Each weight is 2.
    config = {**NARROW, "weighting": {"type": "table", "points": [[0, 2.0], [1, 2.0]]}}
    found = edits(project, draws(project.script), losses(project.script), repr(config))
    assert found is not None
    names: dict[str, Any] = {"__name__": "edited"}
    with pytest.raises(StopIteration):
        exec(compile(edited_by(text, found.lines), "edited", "exec"), names)
    target = names["noise"] if "scheduler" in case else names["noise"] - names["x"]
    plain = ((names["model"](names["noisy"]) - target) ** 2).mean()
    torch.testing.assert_close(names["loss"], 2 * plain)


class TestReport:
    def test_a_script_of_a_known_host_is_launched(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = (
            "from diffusion import create_diffusion\ndiffusion = create_diffusion()\n"
            "t = torch.randint(0, 1000, (4,))\nloss = diffusion.training_losses(model, x, t)\n"
        )
        made = "def create_diffusion(): ...\n"
        script = written(tmp_path, {"train.py": text, "diffusion/__init__.py": made})
        words = ["--policy", "speed", "--doctor", "--set", "k=3", script, "--model", "DiT XL"]
        assert launch.main(words) == 0
        report = capsys.readouterr().out
        assert "host    DiT, fast-DiT, Latte\nseam    B: the launcher replaces create_diffusion" in report
        assert "train.py:3  t = torch.randint(0, 1000, (4,))" in report
        assert "train.py:4  (of each sample) loss = diffusion.training_losses(model, x, t)" in report
        assert report.endswith(f"speedit-launch --policy speed --set k=3 {script} --model 'DiT XL'\n")
        # The launcher itself finds the seam there.
        assert isinstance(launch.parsed(script), ast.Module)

    def test_an_unused_module_of_that_name_is_no_seam(self, tmp_path: Path) -> None:
        script = written(tmp_path, {"train.py": "import diffusion\n", "diffusion/__init__.py": "x = 1\n"})
        code, report = examined(script, [], {"type": "speed"})
        assert code == 2
        assert "seam    none that is known" in report

    def test_shared_functions_and_edited_scripts_are_seams(self, tmp_path: Path) -> None:
        steps = (
            f"u = {DENSITY}('none', 4)\nindices = (u * 1000).long()\n"
            f"timesteps = scheduler.timesteps[indices]\nw = {WEIGHTING}('none', sigmas)\n"
            "loss = (w * (a - b) ** 2).mean()\n"
        )
        shared = written(tmp_path, {"train.py": "import steps\n", "steps.py": steps})
        code, report = examined(shared, [], {"type": "speed"})
        assert code == 0
        assert "E: the launcher edits steps.py as it is read: draw :1, weights :4, 5" in report
        # Its options may choose another draw in the same function.
        branch = steps.replace("indices =", "if 1: u = torch.rand(4)\nindices =", 1)
        report = examined(written(tmp_path, {"branch.py": branch}), [], {"type": "speed"})[1]
        assert "not edited: :2; a run that draws there has no policy" in report
        # What only imports the function, or uses u for something else, is no seam.
        for number, line in enumerate((f"from d import {DENSITY}\n", f"t = {DENSITY}('none', 4)\n")):
            other = written(tmp_path, {f"other_{number}.py": line})
            assert examined(other, [], {"type": "speed"})[0] == 2
        own = "t = torch.randint(0, s.config.num_train_timesteps, (4,))\nloss = F.mse_loss(a, b)\n"
        code, report = examined(written(tmp_path, {"own.py": own}), [], {"type": "speed"})
        assert code == 0
        assert "D: the launcher edits draw and loss" in report

    @pytest.mark.parametrize("case", UNKNOWN)
    def test_an_unknown_script_gets_lines_and_exit_code_2(self, case: str, tmp_path: Path) -> None:
        script = written(tmp_path, {"train.py": script_of(case)})
        code, report = examined(script, [], {"type": "speed"})
        assert code == 2
        assert f"do      by hand, with {UNKNOWN[case][0]}: " in report
        assert '"speed"' in report
        assert len(report.splitlines()) <= 40

    def test_a_script_that_is_no_training_gets_the_general_lines(self, tmp_path: Path) -> None:
        code, report = examined(written(tmp_path, {"train.py": "x = 1\n"}), [], {"type": "speed"})
        assert code == 2
        assert "draws   none seen" in report
        assert "policy = build_policy('speed'" in report


class TestLaw:
    def test_the_plot_in_its_docstring(self) -> None:
        assert doctest.testmod(host_law).failed == 0

    def test_the_scripts_flags_and_defaults_make_the_law(self) -> None:
        script = ast.parse(
            "p.add_argument('--discrete_flow_shift', type=float, default=2.0)\n"
            "p.add_argument('--timestep-sampling', default='shift')\n"
        )
        words = ["--network_dim", "8", "--sigmoid_scale=0.5", "--fp8", "--discrete-flow-shift", "5"]
        for given, flags in (
            (words, {"discrete_flow_shift": 5, "sigmoid_scale": 0.5}),
            ([], {"discrete_flow_shift": 2.0}),
        ):
            config = host_config("sd-scripts", {"timestep_sampling": "shift", **flags})
            wanted = build_policy(config, NoiseSchedule.rectified_flow(1000)).density
            found = law_of_host("sd-scripts", script, given)
            assert found.density is not None
            torch.testing.assert_close(found.density, wanted)

    def test_a_flag_that_the_law_refuses_is_said(self) -> None:
        law = law_of_host("sd-scripts", ast.parse(""), ["--timestep_sampling", "shfit"])
        assert law.density is None
        assert "needs one of sigma, uniform" in law.said

    def test_every_law_belongs_to_a_row_and_every_page_is_there(self) -> None:
        assert {row.law for row in ROWS if row.law} == set(HOSTS.module_dict)
        for row in ROWS:
            assert not row.page or (ROOT / "integrations" / row.page / "README.md").is_file(), row.name
            assert bool(row.page) == bool(row.by_hand), row.name


# What is found in the hosts' own scripts: exit code, host, and where the first draw is.
REAL = {
    "facebookresearch+DiT/train.py": (0, "DiT, fast-DiT, Latte", "train.py:204"),
    "openai+guided-diffusion/scripts/image_train.py": (
        0,
        "guided-diffusion",
        "guided_diffusion/train_util.py:189",
    ),
    "huggingface+diffusers/examples/text_to_image/train_text_to_image.py": (
        0,
        "diffusers",
        "train_text_to_image.py:982",
    ),
    "huggingface+diffusers/examples/dreambooth/train_dreambooth_sd3.py": (
        0,
        "diffusers, SD3",
        "train_dreambooth_sd3.py:1580",
    ),
    "hpcaitech+Open-Sora@v1.2.0/scripts/train.py": (
        0,
        "Open-Sora 1.2 or 1.3",
        "opensora/schedulers/rf/rectified_flow.py:74",
    ),
    "willisma+SiT/train.py": (0, "SiT", "transport/transport.py:111"),
    "genmoai+mochi/demos/fine_tuner/train.py": (0, "Mochi", "train.py:290"),
    "zai-org+CogVideo/finetune/train.py": (0, "CogVideoX", "models/cogvideox_i2v/lora_trainer.py:146"),
}


@pytest.mark.hosts
@pytest.mark.parametrize("script", REAL)
def test_real_scripts(script: str) -> None:
    path = Path(os.environ["SPEEDIT_HOSTS"]) / script
    if not path.is_file():
        pytest.skip(f"no checkout {script.split('/')[0]}")
    code, host, place = REAL[script]
    found, report = examined(str(path), [], {"type": "speed"})
    assert found == code
    assert f"\nhost    {host}\n" in report
    assert re.search(rf"^draws   {re.escape(place)} ", report, re.MULTILINE)
    assert len(report.splitlines()) <= 40
