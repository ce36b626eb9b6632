"""The Python blocks of the pages run, and their command lines parse, from the pages' own text.

The blocks of a page share one namespace, in order. Where a block says "your model", STAND_INS has it. A block
that needs somebody's whole code base has `<!-- not run: REASON -->` before it, and is counted.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import conformance.imagen as imagen
import diffusers
import one_trainer_standin
import pytest
import torch
from exported_runs import DIGITS, stages_in
from flow_standins import RectifiedFlow, ReversedTransport, Transport
from host_standins import HunyuanDiffusion, PixArtDiffusion, create, create_points
from interpolant_standins import SILoss, TokenSILoss, self_training
from markdown_blocks import ROOT, Block, blocks, page_id, pages
from saved_models import save_text_encoder, save_tokenizer

from speedit_plugins import cli, launch_options, spectrum_command
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import DENSITIES, POLICIES, WEIGHTINGS
from speedit_plugins.trainer.config.loading import load_config

LINEAR = NoiseSchedule.linear()
# Two of README.md. The number may fall.
MAX_NOT_RUN = 2
PAGES = [page for page in pages() if any(block.language == "python" for block in blocks(page))]


def create_diffusion(timestep_respacing: str = "") -> Any:
    """DiT's factory, and that of its kin."""
    return create(respacing=timestep_respacing)


def names_for_diffusers(_: ExitStack) -> dict[str, Any]:
    """What a diffusers script has around the lines."""
    training = import_module("diffusers.training_utils")
    halves = {f"{name}_prior": torch.ones(2, 1) for name in ("model_pred", "target")}
    return {
        **{"bsz": 2, "latents": torch.zeros(2, 1), "indices": torch.zeros(4, dtype=torch.int64)},
        "model_input": torch.zeros(4, 1),
        **{"model_pred": torch.ones(2, 1), "target": torch.zeros(2, 1), **halves},
        "args": SimpleNamespace(weighting_scheme="none", with_prior_preservation=True),
        "compute_loss_weighting_for_sd3": training.compute_loss_weighting_for_sd3,
        "noise_scheduler": diffusers.DDPMScheduler(),
        "noise_scheduler_copy": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def names_for_flow_matching(_: ExitStack) -> dict[str, Any]:
    """What its training loop has around the two lines."""
    return {
        **{"samples": torch.zeros(4, 2), "device": torch.device("cpu")},
        **{"torch": torch, "x_t": torch.zeros(4, 2), "u_t": torch.zeros(4, 2), "conditioning": {}},
        "skewed_timestep_sample": lambda n, device: torch.rand(n, device=device),
        "model": lambda x, t, extra: x,
    }


class Anything:
    """A config, or `self`: any attribute of it is one more."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


def names_for_imagen(stack: ExitStack) -> dict[str, Any]:
    """imagen-pytorch's own class, over stand-ins of the packages that it imports."""
    host, _ = stack.enter_context(imagen.installed())
    return {"Imagen": lambda **_: host.make(), "unets": [], "options": {}}


def of_dit(_: ExitStack) -> dict[str, Any]:
    """The factory of DiT and its kin, and the object that it makes."""
    return {"create_diffusion": create_diffusion, "diffusion": create_diffusion()}


def of_sit(_: ExitStack) -> dict[str, Any]:
    """SiT's factory, and the object that it makes."""
    return {"create_transport": lambda *_: Transport(), "transport": Transport(), "args": Anything()}


def of_pixart(_: ExitStack) -> dict[str, Any]:
    """PixArt's factory."""
    return {"IDDPM": lambda *_: create(PixArtDiffusion), "config": Anything()}


def of_one_trainer(stack: ExitStack) -> dict[str, Any]:
    """Its mixins, under the names by which the lines import them."""
    one_trainer_standin.install(stack.enter_context(pytest.MonkeyPatch.context()))
    return {}


def of_trainer(name: str, stand_in: str) -> Callable[[ExitStack], dict[str, Any]]:
    """A fresh copy of a stand-in, as the module of the host that the lines import."""

    def names(stack: ExitStack) -> dict[str, Any]:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        parts = name.split(".")
        for end in range(1, len(parts)):
            package = ".".join(parts[:end])
            patch.setitem(sys.modules, package, ModuleType(package))
        spec = find_spec(stand_in)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setitem(sys.modules, name, module)
        home, _, last = name.rpartition(".")
        setattr(sys.modules[home], last, module)
        return {}

    return names


def of_sd_scripts(stack: ExitStack) -> dict[str, Any]:
    """A stand-in of its flow trainers. The module of their losses, which changes too, is put back."""
    losses = import_module("library_standin.train_util")
    stack.callback(vars(losses).update, dict(vars(losses)))
    return of_trainer("library.flux_train_utils", "library_standin.flux_train_utils")(stack)


def of_an_export(
    config: str, *options: str, before: str | None = None
) -> Callable[[ExitStack], dict[str, Any]]:
    """A folder `exported` of a tiny random model, where the blocks run."""

    def names(stack: ExitStack) -> dict[str, Any]:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        save_tokenizer(folder)
        save_text_encoder(folder, "bert")
        given = [
            option.replace("TEXT", f"{{type: TextEncoder, path: {folder}, max_length: 8}}")
            for option in options
        ]
        stages_in(folder, config, *given, before=before)
        stack.enter_context(chdir(folder))
        return {}

    return names


# Page -> names that its blocks take from the reader's own code.
STAND_INS: dict[str, Callable[[ExitStack], dict[str, Any]]] = {
    "integrations/ai_toolkit/README.md": of_trainer(
        "extensions_built_in.sd_trainer.SDTrainer", "ai_toolkit_standin"
    ),
    "integrations/diffusion_pipe/README.md": of_trainer("models.base", "prepared_input_standin"),
    "integrations/ltx_2/README.md": of_trainer("ltx_trainer.training_strategies", "modality_draw_standin"),
    "integrations/musubi_tuner/README.md": of_trainer(
        "musubi_tuner.training.trainer_base", "library_standin.trainer_base"
    ),
    "integrations/nemo_automodel/README.md": of_trainer(
        "nemo_automodel.components.flow_matching.pipeline", "flow_pipeline_standin"
    ),
    "integrations/sd_scripts/README.md": of_sd_scripts,
    "integrations/torchtitan/README.md": of_trainer("torchtitan.models.flux.trainer", "inline_draw_standin"),
    "integrations/diffsynth/README.md": of_trainer("diffsynth.diffusion.loss", "diffsynth_standin"),
    "integrations/simple_tuner/README.md": of_trainer(
        "simpletuner.helpers.models.common", "simple_tuner_standin"
    ),
    "docs/cascades.md": of_an_export(
        "configs/text_to_image/cascade_emoji_32.yaml",
        *(
            "text_encoder=TEXT",
            "model.text_width=16",
            "model.hidden_size=16",
            "model.depth=1",
            "sampler.num_steps=2",
        ),
        before="image_size=16 data.dataset.image_size=16 model.input_size=16 sampler.augmentation=0",
    ),
    "docs/index.md": of_dit,
    "docs/shapes.md": of_an_export(
        "configs/shapes/digits_points.yaml",
        "data.validation=null",
        "model.depth=1",
        *("model.window_blocks=[0]", "sampler.num_steps=2", "validate_every=0"),
    ),
    "docs/training.md": of_an_export(DIGITS, "model.depth=1", "sampler.num_steps=2"),
    "docs/questions.md": of_sit,
    "integrations/ddt/README.md": of_trainer(
        "src.diffusion.stateful_flow_matching.training_repa", "diffusion_trainer_standin"
    ),
    "integrations/diffusers/README.md": names_for_diffusers,
    "integrations/diffusers_flow/README.md": names_for_diffusers,
    "integrations/dit/README.md": of_dit,
    "integrations/dit_3d/README.md": lambda _: {
        **{"GaussianDiffusion": lambda *_: create_points(), "self": Anything()}
    },
    "integrations/fast_dit/README.md": of_dit,
    "integrations/flow_matching/README.md": names_for_flow_matching,
    "integrations/guided_diffusion/README.md": of_dit,
    "integrations/hunyuan_dit/README.md": lambda _: {
        **{"create_diffusion": lambda *_, **__: create(HunyuanDiffusion), "args": Anything()}
    },
    "integrations/imagen_pytorch/README.md": names_for_imagen,
    "integrations/latte/README.md": of_dit,
    "integrations/lightning_dit/README.md": of_sit,
    "integrations/lumina_image/README.md": of_sit,
    "integrations/mdt/README.md": of_dit,
    "integrations/one_trainer/README.md": of_one_trainer,
    "integrations/open_sora_plan/README.md": of_dit,
    "integrations/opendit/README.md": of_dit,
    "integrations/pixart_alpha/README.md": of_pixart,
    "integrations/pixart_sigma/README.md": of_pixart,
    "integrations/rae/README.md": lambda _: {
        **{
            "create_transport": lambda **_: ReversedTransport(),
            "transport_params": {},
            "time_dist_shift": 1.0,
        }
    },
    "integrations/reg/README.md": lambda _: {"SILoss": lambda *_: TokenSILoss()},
    "integrations/repa/README.md": lambda _: {"SILoss": lambda *_: SILoss()},
    "integrations/repa_e/README.md": lambda _: {
        **{"SiT_models": {"SiT-XL/2": lambda *_: self_training()}, "args": SimpleNamespace(model="SiT-XL/2")}
    },
    "integrations/sit/README.md": of_sit,
    "integrations/video_sys/README.md": lambda _: {"RFLOW": lambda **_: RectifiedFlow(), "options": {}},
}


@pytest.fixture(autouse=True, scope="module")
def _registries_end_as_they_begin() -> Iterator[None]:
    """A page registers a density, and further lines of it name that."""
    known = [(each.module_dict, dict(each.module_dict)) for each in (DENSITIES, POLICIES, WEIGHTINGS)]
    yield
    for registered, before in known:
        registered.clear()
        registered.update(before)


@pytest.mark.filterwarnings("ignore:log_snr_normal is centred:UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_blocks_of_a_page_run(page: Path) -> None:
    with ExitStack() as stack:
        names = STAND_INS.get(page_id(page), lambda _: {})(stack)
        for block in blocks(page):
            if block.language == "python" and not block.is_not_run:
                # Lines before it are blank, so that a traceback has the page's own line numbers.
                code = "\n" * (block.line - 1) + block.text
                exec(compile(code, page_id(page), "exec"), names)


def test_few_blocks_do_not_run() -> None:
    marked = [f"{page_id(page)}:{block.line}" for page in PAGES for block in blocks(page) if block.is_not_run]
    assert len(marked) <= MAX_NOT_RUN, marked


def test_every_stand_in_is_for_a_page_with_blocks() -> None:
    assert set(STAND_INS) <= {page_id(page) for page in PAGES}


# Reports are of their day: a program that one was made with may be gone.
COMMAND_PAGES = [page for page in pages() if "benchmarks" not in page.parts]
SHELLS = ("", "bash", "sh", "console")


def commands(block: Block) -> Iterator[str]:
    """The command lines of a block, those that end in a backslash joined with the next one."""
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        # A synopsis names what may be there, and is no command.
        if line.strip() and not line.lstrip().startswith("#") and "[key=value" not in line:
            yield line.strip()


COMMANDS = [
    pytest.param(command, id=f"{page_id(page)}:{block.line}: {command}")
    for page in COMMAND_PAGES
    for block in blocks(page)
    if block.language in SHELLS
    for command in commands(block)
]


class _ParsedError(BaseException):
    """The arguments were read: enough, the program itself is not run."""


def check_speedit(arguments: list[str]) -> None:
    """Its arguments, and where the config is there its keys too."""
    given = cli._parser().parse_intermixed_args(arguments)
    if not given.config.startswith(("CONFIG", "my/", "outputs/")):
        load_config(given.config, given.phase, given.overrides)


def check_launcher(arguments: list[str]) -> None:
    """Its arguments, and the policy that they name."""
    given = launch_options.parser().parse_args(arguments)
    config = launch_options.policy_config(given.policy, given.set)
    build_policy({key: 0.0 if value == "CENTRE" else value for key, value in config.items()}, LINEAR)


def check_spectrum(arguments: list[str]) -> None:
    """Its arguments."""
    spectrum_command.parser().parse_args(arguments)


def check_make(arguments: list[str]) -> None:
    """Targets of the Makefile; a variable beside them is none."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (argument for argument in arguments if "=" not in argument):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no target {target}"


def check_pip(arguments: list[str]) -> None:
    """Extras of this project."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extras in re.findall(r"(?:^|\s)(?:\.|speedit-plugins)\[([\w,]+)\]", " ".join(arguments)):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"no extra {extra}"


def check_pytest(arguments: list[str]) -> None:
    """Paths of tests."""
    for path in (argument.partition("::")[0] for argument in arguments if argument.startswith("tests/")):
        assert (ROOT / path).exists(), f"no {path}"


def check_tool(path: str, arguments: list[str]) -> None:
    """A program of tools/ that reads these arguments."""
    assert (ROOT / path).is_file(), f"no program {path}"
    program = import_module(Path(path).stem).main
    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, _only(getattr(argparse.ArgumentParser, method)))
        with pytest.raises(_ParsedError):
            program(arguments)


def _only(parse: Callable[..., Any]) -> Callable[..., NoReturn]:
    """A parser's method that reads the arguments, or ends the program as it does, and goes no further."""

    def parsed(*args: Any, **kwargs: Any) -> NoReturn:
        parse(*args, **kwargs)
        raise _ParsedError

    return parsed


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "speedit": check_speedit,
    "tools/main.py": check_speedit,
    "speedit-launch": check_launcher,
    "speedit_plugins.launch": check_launcher,
    "speedit-spectrum": check_spectrum,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_is_one_that_its_program_reads(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for part in command.split("&&"):
        words = shlex.split(part, comments=True)
        # Variables, torchrun and its options come before what is ours.
        for i, word in enumerate(words):
            if word in CHECKS:
                CHECKS[word](words[i + 1 :])
                break
            if word.startswith("tools/"):
                check_tool(word, words[i + 1 :])
                break
