"""The lines of integrations/ that put a policy into a host's object, run from the READMEs' own text."""

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import check_hosts
import diffusers
import flow_standins
import host_standins
import host_training
import interpolant_standins
import mmagic_standin
import open_sora_standin
import pytest
import torch
from conformance import documented, imagen, points
from conformance import latent_diffusion as latent
from conformance.documented import INTEGRATIONS
from conformance.mmagic import MmagicSeam
from conformance.open_sora import OpenSoraSeam
from conformance.seam import Seam, new_process
from mmengine.config import Config
from torch.testing import assert_close

from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule

ROOT = INTEGRATIONS.parent
INTERPOLANTS = {"repa": "REPA", "reg": "REG", "repa_e": "REPA-E"}
STAND_INS: dict[str, Seam] = {
    **dict.fromkeys(("dit", "fast_dit", "opendit"), host_standins.SEAMS["dit"]),
    **{name: host_standins.SEAMS[name] for name in ("latte", "open_sora_plan", "pixart_alpha", "dit_3d")},
    **{name: host_standins.SEAMS[name] for name in ("guided_diffusion", "mdt", "hunyuan_dit")},
    "pixart_sigma": host_standins.SEAMS["pixart_alpha"],
    **dict.fromkeys(("sit", "lightning_dit"), flow_standins.SEAMS["transport"]),
    "lumina_image": flow_standins.SEAMS["transport of lists"],
    "rae": flow_standins.SEAMS["transport, noise at 1"],
    **{name: interpolant_standins.SEAMS[host] for name, host in INTERPOLANTS.items()},
    "video_sys": flow_standins.SEAMS["rectified flow"],
}


@pytest.mark.filterwarnings("ignore:host_standins weighs its mse already")
@pytest.mark.parametrize("page", STAND_INS)
def test_the_block_draws_and_weighs(page: str) -> None:
    torch.manual_seed(0)
    assert documented.check(STAND_INS[page], page) == [1, 2]


def test_the_block_of_imagen_draws_and_weighs() -> None:
    with imagen.installed() as (seam, _):
        assert documented.check(seam, "imagen_pytorch") == [1, 2]


def test_every_page_of_an_object_is_here() -> None:
    assert {*STAND_INS, "imagen_pytorch"} == set(documented.PAGES.values())


class FromOpenSoraPage(OpenSoraSeam):
    """Open-Sora's scheduler, from the two lines of the page in a config."""

    def attached(self, policy: Any = "speedit", generator: torch.Generator | None = None) -> Any:
        config = merged("open_sora", 'scheduler = dict(type="iddpm", timestep_respacing="")')
        scheduler = import_module("opensora.registry").build_module(config.scheduler, self.registry)
        attachment_of(scheduler).stream = DrawStream(generator)
        return scheduler


class FromMmagicPage(MmagicSeam):
    """mmagic's scheduler, from the two lines of the page in a config."""

    def attached(self, policy: Any = "speedit", generator: torch.Generator | None = None) -> Any:
        scheduler = dict(type="EditDDIMScheduler", variance_type="learned_range")
        config = merged("mmagic", f"model = dict(diffusion_scheduler={scheduler})")
        registry = import_module("mmagic.registry").DIFFUSION_SCHEDULERS
        scheduler = registry.build(config.model.diffusion_scheduler)
        attachment_of(scheduler).stream = DrawStream(generator)
        return scheduler


def merged(page: str, hosts: str) -> Config:
    """The indented lines of a page, over a line of a host's config."""
    text = (INTEGRATIONS / page / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (\w+ = dict\(.*)$", text, flags=re.MULTILINE)
    assert [line.split(" = ")[0] for line in lines][0] == "custom_imports"
    with TemporaryDirectory() as folder:
        (Path(folder) / "base.py").write_text(hosts)
        ours = Path(folder) / "ours.py"
        ours.write_text("\n".join(['_base_ = ["base.py"]', *lines]))
        return Config.fromfile(ours)


@pytest.mark.parametrize("version", [*open_sora_standin.VERSIONS, "mmagic"])
def test_the_lines_of_a_config_draw_and_weigh(version: str) -> None:
    if version == "mmagic":
        host, seam = mmagic_standin.installed(), FromMmagicPage()
    else:
        host, seam = open_sora_standin.installed(version), FromOpenSoraPage(version)
    with host:
        points.draws_are_seen(seam)
        points.loss_is_weighted(seam)


def test_the_target_of_latent_diffusion_is_the_class_that_the_contract_checks() -> None:
    text = (INTEGRATIONS / "latent_diffusion/README.md").read_text(encoding="utf-8")
    assert re.findall(r"`target:\s(\S+)`", text) == [f"{latent.PLUGIN}.NAME", f"{latent.HOST}.NAME"]


def test_the_lines_of_a_diffusers_script_draw_and_weigh() -> None:
    first = re.findall(r"```python\n(.*?)```", readme("diffusers"), flags=re.DOTALL)[0]
    error = torch.arange(1.0, 9.0)
    names: dict[str, Any] = {"noise_scheduler": diffusers.DDPMScheduler(), "latents": error, "bsz": 8}
    names |= {"model_pred": error.view(8, 1).repeat(1, 3), "target": torch.zeros(8, 3)}
    torch.manual_seed(3)
    new_process()
    exec(first, names)
    # 1,000 steps of beta from 1e-4 to 0.02, the scheduler's defaults.
    policy, index = build_policy("speedit", NoiseSchedule.linear(1000)), names["timesteps"]
    policy.advance()
    new_process()
    assert torch.equal(index, DrawStream().draw(policy, 8).index)
    # float32: the scheduler's table, and a mean of 8 terms.
    assert_close(
        names["loss"].double(), (policy.weight[index] * error.double() ** 2).mean(), rtol=1e-5, atol=0
    )


def readme(page: str) -> str:
    return (INTEGRATIONS / page / "README.md").read_text(encoding="utf-8")


COMMANDS = [
    pytest.param(" ".join(command.split()), id=f"{path.parent.name}: {' '.join(command.split())}")
    for path in sorted(INTEGRATIONS.glob("*/README.md"))
    for command in re.findall(
        r"`(?:SPEEDIT_HOSTS=DIR )?(pytest tests/[^`]+|python tools/(?:check_hosts|\w+_training)[^`]+)`",
        path.read_text(encoding="utf-8"),
    )
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_verified_a_page_is_there(command: str) -> None:
    program, path, *arguments = shlex.split(command)
    if program == "pytest":
        assert (ROOT / path).is_file()
        return
    parse = argparse.ArgumentParser.parse_args
    parsed: list[Any] = []

    def parse_only(parser: argparse.ArgumentParser, argv: Any = None) -> None:
        parsed.append(parse(parser, argv))
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(_ParsedError):
            import_module(Path(path).stem).main(arguments)
    # A host that is named is one that the tool knows.
    for name in getattr(parsed[0], "only", None) or ():
        if "check_hosts" in path:
            assert name == "..." or check_hosts._named(name)
        else:
            assert host_training.chosen(host_training.HOSTS, [name])


class _ParsedError(BaseException):
    """The arguments were read: the program itself is not run."""


def hosts_of(page: str) -> list[Path]:
    """The checkouts of a page that are here."""
    names = [name for name, its_page in documented.PAGES.items() if its_page == page]
    folders = [Path(os.environ["SPEEDIT_HOSTS"]) / check_hosts._named(name).folder for name in names]
    found = [folder for folder in folders if folder.is_dir()]
    if len(found) < len(folders):
        pytest.skip(f"no checkouts {', '.join(folder.name for folder in folders)}")
    return found


# In the host's line, where the block has our own.
SAMPLER = "create_named_schedule_sampler"


@pytest.mark.hosts
@pytest.mark.parametrize("page", sorted({*documented.PAGES.values()} - {"imagen_pytorch"}))
def test_the_line_that_a_page_names_is_the_one_to_edit(page: str) -> None:
    use = readme(page).split("## Verified")[0]
    edited = ast.parse(documented.block_of(page)).body[-1]
    assert isinstance(edited, ast.Assign)
    call = edited.value
    assert isinstance(call, ast.Call)
    target = ast.unparse(edited.targets[0])
    factory = SAMPLER if target == "schedule_sampler" else ast.unparse(call.args[0]).split("(")[0]
    places = re.findall(r"`([\w/]+\.py):(\d+)`", use)
    assert places
    for path, number in places:
        files = [folder / path for folder in hosts_of(page) if (folder / path).is_file()]
        lines = [file.read_text(encoding="utf-8").splitlines()[int(number) - 1].strip() for file in files]
        starts = (f"{target} = {factory}(",) + (f"self.{target} = {factory}(",) * (f"`self.{target}`" in use)
        assert any(line.startswith(starts) for line in lines), (path, number, lines)


@pytest.mark.hosts
def test_the_lines_that_the_diffusers_page_names_are_draws_and_losses() -> None:
    examples = Path(os.environ["SPEEDIT_HOSTS"]) / "huggingface+diffusers/examples"
    if not examples.is_dir():
        pytest.skip("no checkout huggingface+diffusers")
    (sentence,) = re.findall(r"Or edit two lines, .*", readme("diffusers"))
    scripts = [f"text_to_image/train_text_to_image{suffix}.py" for suffix in ("", "_lora", "_sdxl")]
    scripts.append("research_projects/dreambooth_inpaint/train_dreambooth_inpaint.py")
    numbers = [int(number) for number in re.findall(r":(\d+)`", sentence)]
    assert len(numbers) == 2 * len(scripts)
    for script, draw, loss in zip(scripts, numbers[::2], numbers[1::2], strict=True):
        lines = (examples / script).read_text(encoding="utf-8").splitlines()
        assert lines[draw - 1].strip().startswith("timesteps = torch.randint("), script
        assert lines[loss - 1].strip().startswith("loss = F.mse_loss("), script


# In a process of its own, as the hosts' packages have the same names.
ON_CHECKOUT = """
import sys
from pathlib import Path
import check_hosts
import host_training
from conformance import documented
name, hosts = sys.argv[1:]
check_hosts.check = lambda seam: documented.check(seam, documented.PAGES[name])
print(check_hosts.check_one(check_hosts._named(name), Path(hosts)))
"""


@pytest.mark.hosts
@pytest.mark.parametrize("name", documented.PAGES)
def test_the_block_draws_and_weighs_on_the_checkout(name: str) -> None:
    hosts = Path(os.environ["SPEEDIT_HOSTS"])
    host = check_hosts._named(name)
    if not (hosts / host.folder).is_dir():
        pytest.skip(f"no checkout {host.folder}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT)])}
    command = [sys.executable, "-c", ON_CHECKOUT, name, str(hosts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'points': [1, 2], 'error': ''" in done.stdout, done.stdout
