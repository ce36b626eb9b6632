"""The launcher: it runs an unmodified script of a host with a policy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import TORCHRUN, Job
from warm_python import WarmPython

from speedit_plugins import launch

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"

# A host's module that makes its diffusion object, and the host's script.
FACTORY = """
from host_standins import create
def create_diffusion(timestep_respacing):
    return create(respacing=timestep_respacing)
"""
TRAIN = """
import sys
import torch
from torch import nn
from {module} import create_diffusion{alias}
from conformance.models import SmallModel
print("argv", sys.argv)
print("path", sys.path[0])
print("name", __name__)
if __name__ == "__main__":
    diffusion = create_diffusion(timestep_respacing="")
    sampling = create_diffusion(timestep_respacing="5")
    model = SmallModel(1)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(2):
        t = torch.full((64,), 999)
        diffusion.training_losses(model, torch.randn(64, 4, 2, 2), t)["loss"].mean().backward()
        opt.step()
    print("redrawn", bool((torch.cat(model.seen) != 999).any()))
    sampling.p_sample_loop(model, (1, 4, 2, 2), device="cpu")
"""


def host(folder: Path, module: str = "diffusion", text: str = FACTORY) -> Path:
    """Writes a checkout with this module. Returns the path of its train.py, which is not written yet."""
    path = folder.joinpath(*module.split("."))
    path.mkdir(parents=True)
    for package in [path, *path.parents]:
        if package == folder:
            break
        (package / "__init__.py").touch()
    (path / "__init__.py").write_text(text)
    return folder / "train.py"


FOLDERS = os.pathsep.join(map(str, (ROOT, TESTS, TESTS / "standins", ROOT / "tools")))
PYTHON = WarmPython({**os.environ, "PYTHONPATH": FOLDERS, "OMP_NUM_THREADS": "1"})


def start(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return PYTHON.run("speedit_plugins.launch", *command, cwd=cwd)


def reports(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the launcher wrote, without its name at the start of each line."""
    name = "speedit-launch: "
    return [line.removeprefix(name) for line in done.stderr.splitlines() if line.startswith(name)]


def test_a_script_runs_as_python_runs_it(tmp_path: Path) -> None:
    script = host(tmp_path)
    script.write_text(TRAIN.format(module="diffusion", alias=""))
    done = start("--policy", "speed", "--set", "k=5", str(script), "--epochs", "3", "--policy", "speedit")
    assert done.returncode == 0, done.stderr
    assert f"argv {[str(script), '--epochs', '3', '--policy', 'speedit']}" in done.stdout
    assert f"path {tmp_path}" in done.stdout
    assert "name __main__" in done.stdout
    assert "redrawn True" in done.stdout
    # On the linear schedule `speed` has the mean weight 0.4965 and the boundary 700.
    assert reports(done) == [
        "DiT, fast-DiT, Latte, seam B, policy speed: boundary 700 of 1000 timesteps, mean weight 0.4965"
    ]


def test_a_part_of_a_named_policy(tmp_path: Path) -> None:
    script = host(tmp_path)
    script.write_text(TRAIN.format(module="diffusion", alias=""))
    done = start("--policy", "speed", "--set", "weighting=constant", str(script))
    assert done.returncode == 0, done.stderr
    assert reports(done)[0].endswith(
        "policy speed with weighting constant: boundary 700 of 1000 timesteps, mean weight 1.0000"
    )


@pytest.mark.parametrize(
    ("module", "alias", "function"),
    [
        ("opendit.diffusion", "", "create_diffusion"),
        ("opendit.models.diffusion", "", "create_diffusion"),
        ("opensora.models.diffusion.diffusion", "_T as create_diffusion", "create_diffusion_T"),
    ],
)
def test_each_hosts_factory_is_found(tmp_path: Path, module: str, alias: str, function: str) -> None:
    script = host(tmp_path, module, FACTORY.replace("create_diffusion", function))
    script.write_text(TRAIN.format(module=module, alias=alias))
    done = start(str(script))
    assert done.returncode == 0, done.stderr
    assert "redrawn True" in done.stdout
    assert len(reports(done)) == 1


def test_a_factory_that_a_package_passes_on(tmp_path: Path) -> None:
    """PixArt-alpha's is in diffusion.iddpm, and its scripts import it from diffusion."""
    script = host(tmp_path, text="from diffusion.iddpm import IDDPM\n")
    (tmp_path / "diffusion" / "iddpm.py").write_text(FACTORY.replace("create_diffusion", "IDDPM"))
    script.write_text(
        TRAIN.format(module="diffusion", alias="").replace("import create_", "import IDDPM as create_")
    )
    done = start(str(script))
    assert done.returncode == 0, done.stderr
    assert reports(done)[0].startswith("PixArt-alpha, PixArt-sigma, seam B, policy speedit: boundary 642")


SAMPLER = """
from host_standins import LossAwareSampler, ScheduleSampler
def create_named_schedule_sampler(name, diffusion):
    raise AssertionError("the host's own sampler")
"""
SAMPLED = """
import torch
from guided_diffusion.resample import ScheduleSampler, create_named_schedule_sampler
from conformance.models import SmallModel
from host_standins import create
diffusion = create()
sampler = create_named_schedule_sampler({name!r}, diffusion)
assert isinstance(sampler, ScheduleSampler)
t, weights = sampler.sample(4, "cpu")
model = SmallModel(1)
(diffusion.training_losses(model, torch.randn(4, 4, 2, 2), t)["loss"] * weights).mean().backward()
assert torch.equal(model.seen[0], t)
"""


@pytest.mark.parametrize("policy", ["speedit", "loss_second_moment"])
def test_a_schedule_sampler(tmp_path: Path, policy: str) -> None:
    script = host(tmp_path, "guided_diffusion.resample", SAMPLER)
    script.write_text(SAMPLED.format(name="uniform"))
    done = start("--policy", policy, str(script))
    assert done.returncode == 0, done.stderr
    assert reports(done)[0].startswith(f"guided-diffusion, seam C, policy {policy}: ")


def test_the_hosts_own_sampler_beside_a_policy_is_refused(tmp_path: Path) -> None:
    script = host(tmp_path, "guided_diffusion.resample", SAMPLER)
    script.write_text(SAMPLED.format(name="loss-second-moment"))
    done = start(str(script))
    assert done.returncode == 2
    assert reports(done) == [
        "error: --schedule_sampler needs uniform beside a policy, got 'loss-second-moment': leave it out"
    ]


POINTS = """
import torch
from conformance.models import SmallModel
from host_standins import PointDiffusion as Base, create_points
class GaussianDiffusion(Base):
    def p_losses(self, denoise_fn, data_start, t, noise=None, y=None):
        return super().p_losses(denoise_fn, data_start, t, noise, y)
if __name__ == "__main__":
    whole = create_points()
    diffusion = GaussianDiffusion(whole.betas.double().numpy(), "mse", "eps", "fixedsmall")
    assert isinstance(diffusion, GaussianDiffusion)
    {body}
"""


def test_a_class_of_the_script_itself(tmp_path: Path) -> None:
    body = (
        "model = SmallModel(None); diffusion.p_losses(model, torch.randn(64, 3, 8), torch.zeros(64).long())"
    )
    script = tmp_path / "train.py"
    script.write_text(POINTS.format(body=body))
    done = start(str(script))
    assert done.returncode == 0, done.stderr
    assert reports(done)[0].startswith(
        "a class with p_losses in the script (DiT-3D), seam B, policy speedit: boundary 642 of 1000"
    )


def test_processes_that_would_leave_the_policy_behind_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(POINTS.format(body="torch.multiprocessing.spawn(print, nprocs=1)"))
    done = start(str(script))
    assert done.returncode == 2
    assert (
        "starts processes by torch.multiprocessing.spawn, and these do not get the policy" in reports(done)[0]
    )


FLOW = "from flow_standins import Transport as create_transport\n"
FLOW_TRAIN = """
import torch
from transport import create_transport
from conformance.models import SmallModel
transport = create_transport()
model = SmallModel(None)
opt = torch.optim.SGD(model.parameters(), lr=1e-3)
transport.training_losses(model, torch.zeros(5000, 4, 2, 2))["loss"].mean().backward()
opt.step()
print("late", float((model.seen[0] < 0.077).float().mean()))
"""


def test_a_transport(tmp_path: Path) -> None:
    script = host(tmp_path, "transport", FLOW)
    script.write_text(FLOW_TRAIN)
    done = start("--policy", "speed", str(script))
    assert done.returncode == 0, done.stderr
    assert reports(done)[0].startswith(
        "SiT, LightningDiT, Lumina-Image 2.0, seam B, policy speed: boundary 923 of 1000 timesteps"
    )
    # A transport has noise at t = 0: 0.077 / 5 of 0.938, within 4 binomial sigma.
    assert abs(float(done.stdout.split()[-1]) - 0.0164) < 4 * (0.0164 / 5000) ** 0.5

    done = start("--policy", "edm", "--prediction-type", "epsilon", str(script))
    assert done.returncode == 2
    assert "has a model that predicts flow, got prediction_type='epsilon'" in reports(done)[0]


DIFFUSERS = """
import sys
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from conformance.models import SmallModel
noise_scheduler, unet, snr_gamma = DDPMScheduler(), SmallModel(None), {snr_gamma}
optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)
latents = torch.randn(64, 4, 2, 2)
for step in range(2):
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, noise_scheduler.config.{high}, (64,), device=latents.device)
    model_pred = unet(noise_scheduler.add_noise(latents, noise, timesteps), timesteps)
    if snr_gamma is None:
        loss = F.mse_loss(model_pred.float(), noise.float(), reduction="mean")
    else:
        snr = compute_snr(noise_scheduler, timesteps)
        loss = F.mse_loss(model_pred.float(), noise.float(), reduction="none").mean(dim=[1, 2, 3]) * 5 / snr
        loss = loss.mean()
    loss.backward()
    optimizer.step()
print("late", int((torch.cat(unet.seen) >= 642).sum()), "of", len(torch.cat(unet.seen)), __name__, sys.argv)
raise RuntimeError("line 27 of the script") if {fails} else SystemExit(0)
"""


class TestAScriptThatDrawsForItself:
    def script(
        self, folder: Path, snr_gamma: object = None, high: str = "num_train_timesteps", fails: int = 0
    ) -> Path:
        path = folder / "train.py"
        path.write_text(DIFFUSERS.format(snr_gamma=snr_gamma, high=high, fails=fails))
        return path

    def test_it_draws_and_weighs_by_the_policy(self, tmp_path: Path) -> None:
        script = self.script(tmp_path)
        done = start(str(script), "--x")
        assert done.returncode == 0, done.stderr
        assert reports(done) == [
            "diffusers script, seam D, policy speedit: boundary 642 of 1000 timesteps, mean weight 0.5815"
        ]
        # 6.5 of 128 are expected, and 4 binomial sigma are 10; of uniform draws there would be 45.8.
        assert int(done.stdout.split()[1]) <= 16
        assert f"of 128 __main__ {[str(script), '--x']}" in done.stdout

    def test_min_snr_beside_weights_is_refused(self, tmp_path: Path) -> None:
        done = start(str(self.script(tmp_path, snr_gamma=5.0)))
        assert done.returncode == 2
        assert "the script weighs its loss by Min-SNR already" in reports(done)[0]
        assert "drop --snr_gamma" in reports(done)[0]

    def test_lines_in_a_traceback_are_the_scripts(self, tmp_path: Path) -> None:
        script = self.script(tmp_path, fails=1)
        done = start(str(script))
        assert done.returncode == 1
        line = (
            script.read_text()
            .splitlines()
            .index('raise RuntimeError("line 27 of the script") if 1 else SystemExit(0)')
        )
        assert f'File "{script}", line {line + 1}, in <module>' in done.stderr

    def test_a_draw_without_a_loss_to_weigh(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        script = tmp_path / "train.py"
        script.write_text(
            "t = torch.randint(0, s.config.num_train_timesteps, (1,))\nraise SystemExit('ran')\n"
        )
        assert launch.main([str(script)]) == 2
        printed = capsys.readouterr().err
        assert "draws timesteps (line 1) and makes no F.mse_loss to weigh" in printed
        assert "integrations/diffusers" in printed

    def test_a_number_of_timesteps_and_a_generator(self, tmp_path: Path) -> None:
        script = self.script(tmp_path)
        own = "noise_scheduler.config.num_train_timesteps, (64,)"
        script.write_text(script.read_text().replace(own, "1000, (64,), generator=torch.Generator()"))
        done = start(str(script))
        assert done.returncode == 0, done.stderr
        assert reports(done)[0].startswith("diffusers script, seam D, policy speedit: boundary 642")
        # As above: both draws have the same 64 timesteps, so 4 sigma are 14.
        assert int(done.stdout.split()[1]) <= 20

    def test_a_draw_for_an_unknown_scheduler_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        script = tmp_path / "train.py"
        script.write_text("\nt = torch.randint(0, 1000, (1,))\nloss = F.mse_loss(a, b)\n")
        assert launch.main([str(script)]) == 2
        assert "its torch.randint (line 2) is not edited" in capsys.readouterr().err


class TestNothingTrained:
    """Exit code 2, before a step without the policy."""

    def test_a_script_that_never_trains(self, tmp_path: Path) -> None:
        script = host(tmp_path)
        script.write_text("from diffusion import create_diffusion\ncreate_diffusion('5')\nexit()\n")
        done = start(str(script))
        assert done.returncode == 2
        assert reports(done)[0].startswith("error: found DiT, fast-DiT, Latte, but no training loss")
        assert "    draw = policy.draw(" in done.stderr

    def test_training_past_the_seam_stops_before_the_first_step(self, tmp_path: Path) -> None:
        script = host(tmp_path)
        script.write_text(
            "import diffusion, torch\n"
            "weight = torch.nn.Parameter(torch.ones(1))\n"
            "weight.sum().backward()\n"
            "torch.optim.SGD([weight], lr=1.0).step()\n"
            "print('stepped')\n"
        )
        done = start(str(script))
        assert done.returncode == 2
        assert "stepped" not in done.stdout
        assert "no training loss went through the policy" in reports(done)[0]

    def test_what_the_script_raises_passes_through(self, tmp_path: Path) -> None:
        script = host(tmp_path)
        script.write_text("import diffusion\nraise ValueError('of the host')\n")
        done = start(str(script))
        assert done.returncode == 1
        assert "ValueError: of the host" in done.stderr
        script.write_text("import diffusion\nraise SystemExit(7)\n")
        assert start(str(script)).returncode == 7


def test_this_process_is_left_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (sys.argv, list(sys.path), list(sys.meta_path), __build_class__)
    script = tmp_path / "train.py"
    script.write_text("def p_losses(): ...\n")
    assert launch.main([str(script)]) == 2
    assert (sys.argv, sys.path, sys.meta_path, __build_class__) == before
    assert "no training loss" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_report_once(tmp_path: Path) -> None:
    script = host(tmp_path)
    script.write_text(TRAIN.format(module="diffusion", alias=""))
    with Job([*TORCHRUN, "-m", "speedit_plugins.launch", script], {"PYTHONPATH": FOLDERS}) as job:
        output = job.end()
    assert job.process.returncode == 0, output
    assert output.count("redrawn True") == 2
    assert output.count("speedit-launch: DiT") == 1
