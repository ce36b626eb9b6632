"""What `--doctor` reads, and which lines of it draw timesteps or make a loss."""

from pathlib import Path

import pytest
from project_files import written

from speedit_plugins import launch
from speedit_plugins.doctor.places import draws, losses
from speedit_plugins.doctor.sources import read_project
from speedit_plugins.launch_options import LaunchError


def found_in(folder: Path, text: str) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(line, kind) of each draw, and (line, what is left of the batch) of each loss."""
    source = read_project(written(folder, {"train.py": text})).script
    return [(d.line, d.kind) for d in draws(source)], [(loss.line, loss.left) for loss in losses(source)]


class TestSources:
    def test_modules_of_the_project_are_read_and_none_is_run(self, tmp_path: Path) -> None:
        files = {
            "scripts/train.py": "import torch, pkg.loss\nfrom pkg.sub import f\nraise SystemExit('it ran')\n",
            "pkg/__init__.py": "from importlib import import_module\nimport_module('pkg.found')\n",
            "pkg/loss.py": "from . import beside\nraise SystemExit('it ran')\n",
            "pkg/beside.py": "",
            "pkg/found/by_text.py": "",
            "pkg/sub.py": "import pkg.broken, in_src\n",
            "pkg/broken.py": "def (\n",
            "pkg/never.py": "",
            "src/in_src.py": "",
        }
        script = written(tmp_path, files)
        project = read_project(script)
        names = [source.name for source in project.sources]
        assert names[0] == "train.py"
        assert set(names[1:]) == set(files) - {"scripts/train.py", "pkg/broken.py", "pkg/never.py"}
        assert project.unread == ("pkg/broken.py",)
        assert project.root == tmp_path

    def test_what_is_above_the_project_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "outside.py").write_text("")
        (tmp_path / "host").mkdir()
        script = written(tmp_path / "host", {"train.py": "import outside\n"})
        assert len(read_project(script).sources) == 1

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [("none.py", None, "no script"), ("a.sh", "torchrun train.py --x\n", "is not Python")],
    )
    def test_what_is_no_script_is_said(
        self, name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(LaunchError, match=message):
            read_project(str(tmp_path / name))
        assert launch.main(["--doctor", str(tmp_path / name)]) == launch.USER_ERROR
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("t = torch.randint(0, 1000, (4,)).long()", ["index"]),
        ("batch.timesteps = th.rand(4)", ["uniform"]),
        ("sigmas = torch.sigmoid(torch.randn(4))", ["logit_normal"]),
        ("normal = torch.randn(4)\nsigma = (normal * 1.2 - 1.2).exp()", ["log_normal"]),
        ("indices = torch.randint(0, 1000, (4,))\ntimesteps = s.timesteps[indices]", ["index"]),
        ("t, weights = self.schedule_sampler.sample(4, device)", ["sampler"]),
        ("u = compute_density_for_timestep_sampling('none', 4)", ["call"]),
        ("def sample_timesteps(n):\n    return torch.rand(n)", ["uniform"]),
        # None of these is a timestep.
        ("indices = torch.randint(0, len(images), (4,))", []),
        ("labels = torch.randint(0, 10, (4,))", []),
        ("sigmas = table[index]", []),
        ("noise = torch.randn(4)\ntimes = torch.zeros(4)", []),
        ("def flips(n):\n    return torch.rand(n)", []),
        ("image, target = data.sample(4)", []),
    ],
)
def test_draws_are_told_by_name_and_code(text: str, kinds: list[str], tmp_path: Path) -> None:
    assert [kind for _, kind in found_in(tmp_path, text)[0]] == kinds


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("loss = F.mse_loss(pred, target)", ["batch"]),
        ("loss = F.mse_loss(pred, target, reduction='none')", ["value"]),
        ("loss = F.mse_loss(pred, target, reduction='none').mean([1, 2, 3])", ["sample"]),
        ("loss = ((pred - target) ** 2).mean()", ["batch"]),
        ("loss = torch.mean(((pred - target) ** 2).reshape(4, -1), 1)", ["sample"]),
        ("terms['mse'] = mean_flat((target - output) ** 2)", ["sample"]),
        ("loss = (pred - target).pow(2)", ["value"]),
        ("loss = diffusion.training_losses(model, x, t)['loss'].mean()", ["batch"]),
        ("losses = diffusion.training_losses(model, x, t)", ["sample"]),
        # None of these is a loss.
        ("variance = ((x - middle) ** 2).mean()", []),
        ("area = side ** 2", []),
    ],
)
def test_losses_are_told_with_what_is_left_of_the_batch(text: str, left: list[str], tmp_path: Path) -> None:
    assert [each for _, each in found_in(tmp_path, text)[1]] == left
