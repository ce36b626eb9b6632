"""Hosts that are known by a file of theirs, and the seams that a script has.

A new host is a row of `HOSTS`. A host that the launcher serves is a row of `hosts.factories.FACTORIES`. It
needs one here only if its law is known, or if the script does not name the file in which it draws.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from speedit_plugins.doctor.places import draws
from speedit_plugins.doctor.sources import (
    Project,
    Source,
    folders_of,
    imported_names,
    module_file,
    read_file,
    root_of,
)
from speedit_plugins.hosts.edits.script_edits import edited
from speedit_plugins.hosts.edits.sigma_edits import DENSITY, SigmaSites, edited_sigmas
from speedit_plugins.hosts.factories import FACTORIES, SCRIPT_METHOD, SHARED_FUNCTIONS, Factory, defines
from speedit_plugins.hosts.trainers.inline_draws import INLINE_CALLS, SCRIPTS, edited_script


@dataclass(frozen=True)
class KnownHost:
    """A host, by a file that only it has.

    Args:
        name: of the host, for the report.
        file: from the script's folder or one around it; "" is the script itself. It is read with the script.
        word: a name that this file uses or defines.
        scripts: pattern of the script's file name.
        law: its name in `hosts.laws`; "" if that has none.
        page: in integrations/, if the launcher does not serve the host; else "".
        by_hand: what that page says in short.
    """

    name: str
    file: str
    word: str
    scripts: str = "*.py"
    law: str = ""
    page: str = ""
    by_hand: str = ""


# The first row that fits is the host, so a special case comes before the usual one.
HOSTS = (
    KnownHost("sd-scripts, FLUX", "library/flux_train_utils.py", DENSITY, "flux_*.py", "sd-scripts"),
    KnownHost("sd-scripts, SD3", "library/sd3_train_utils.py", DENSITY, "sd3_*.py", "sd-scripts-sd3"),
    KnownHost("sd-scripts", "library/train_util.py", "get_noise_noisy_latents_and_timesteps"),
    KnownHost("musubi-tuner", "training/trainer_base.py", DENSITY, "*_train*.py", "musubi-tuner"),
    KnownHost("SimpleTuner", "helpers/models/common.py", "sample_flow_sigmas", law="simpletuner"),
    KnownHost("ai-toolkit", "jobs/process/BaseSDTrainProcess.py", "BaseSDTrainProcess", law="ai-toolkit"),
    KnownHost(
        "OneTrainer",
        "modules/modelSetup/mixin/ModelSetupNoiseMixin.py",
        "ModelSetupNoiseMixin",
        law="onetrainer",
    ),
    KnownHost("DiffSynth-Studio", "diffsynth/diffusion/loss.py", "FlowMatchSFTLoss", law="diffsynth"),
    KnownHost("LTX-2 trainer", "src/ltx_trainer/timestep_samplers.py", "SAMPLERS", law="ltx-2"),
    KnownHost("HunyuanVideo-1.5", "", "TimestepSampler", "train.py", "hunyuanvideo-1.5"),
    KnownHost("REPA, REG", "loss.py", "SILoss", law="repa"),
    KnownHost("REPA-E", "models/sit.py", "loss_kwargs", "train_repae.py", "repa"),
    KnownHost("DDT", "src/diffusion/flow_matching/training_repa.py", "REPATrainer", "main.py"),
    KnownHost("torchtitan Flux", "torchtitan/models/flux/trainer.py", "FluxTrainer", law="torchtitan"),
    KnownHost("LightningDiT", "transport/transport.py", "use_lognorm", law="lightningdit"),
    KnownHost("RAE", "stage2/transport/transport.py", "Transport", law="rae"),
    KnownHost("SiT", "train_utils.py", "parse_transport_args", law="sit"),
    KnownHost(
        "Open-Sora 1.2 or 1.3",
        "opensora/schedulers/rf/rectified_flow.py",
        "RFlowScheduler",
        law="open-sora-1.2",
        page="open_sora",
        by_hand='two lines of the config, scheduler = dict(type="SpeeDFlow", ...)',
    ),
    KnownHost(
        "Open-Sora 1.0 or 1.1",
        "opensora/schedulers/iddpm/__init__.py",
        "IDDPM",
        page="open_sora",
        by_hand='two lines of the config, scheduler = dict(type="SpeeDiffusion", ...)',
    ),
    KnownHost(
        "Open-Sora 2.0",
        "opensora/utils/sampling.py",
        "time_shift",
        law="open-sora-2",
        page="open_sora",
        by_hand="`git apply open_sora_2.patch`",
    ),
    KnownHost(
        "latent-diffusion",
        "ldm/models/diffusion/ddpm.py",
        "LatentDiffusion",
        "main.py",
        page="latent_diffusion",
        by_hand="`target:` in the YAML config",
    ),
    KnownHost(
        "VideoSys",
        "videosys/schedulers/scheduling_rflow_open_sora.py",
        "RFLOW",
        page="video_sys",
        by_hand="one line, scheduler = with_policy(RFLOW(...), policy)",
    ),
    KnownHost(
        "flow_matching",
        "training/train_loop.py",
        "skewed_timestep_sample",
        page="flow_matching",
        by_hand="two lines of train_loop.py",
    ),
    KnownHost("diffusers, SD3", "", DENSITY, "train_*sd3*.py", "diffusers-sd3"),
    KnownHost("diffusers flow script", "", DENSITY, "train_*.py", "diffusers"),
)


@dataclass(frozen=True)
class Seam:
    """A way for a policy into a script.

    Args:
        hosts: whose way it is.
        what: the letter of the seam, and what is replaced or edited.
        page: in integrations/, if the user has something to do; else "".
        but: what it leaves out; "" if nothing is known.
    """

    hosts: str
    what: str
    page: str = ""
    but: str = ""


def known_host(script: str) -> KnownHost | None:
    """The host whose script this is, None if it is not known. Reads the file of a row, and the script."""
    path = Path(script).resolve()
    if not path.is_file():
        return None
    folders = folders_of(path, root_of(path))
    return next((row for row in HOSTS if fnmatch(path.name, row.scripts) and _has(row, path, folders)), None)


def seams(project: Project, host: KnownHost | None) -> list[Seam]:
    """The seams of a script: those of the launcher first, then what is done by hand."""
    found = list(_launched(project))
    if not found and host is not None and host.page:
        found.append(Seam(host.name, host.by_hand, host.page))
    return found


def _launched(project: Project) -> Iterator[Seam]:
    """What the launcher would replace or edit."""
    tree = project.script.tree
    inline = edited_script(tree)
    if inline is not None:
        text = ast.unparse(inline)
        host = next(each for each in SCRIPTS if f"{INLINE_CALLS}[{each.hosts!r}]" in text)
        yield Seam(host.hosts, f"F: the launcher edits {', '.join(host.places)} of the script as it is read")
        return
    if edited(tree)[1].are_a_seam:
        yield Seam("diffusers", "D: the launcher edits draw and loss when it reads the script")
    if defines(tree, SCRIPT_METHOD):
        yield Seam("DiT-3D", f"B: the launcher wraps the class with {SCRIPT_METHOD}")
    named = set(imported_names(tree))
    for factory in FACTORIES:
        given = {f"{factory.module}.{name}" for name in factory.functions}
        if _is_reached(factory, project, named) or (given & named and not _file_of(factory, project)):
            what = f"{' or '.join(factory.functions)} of {factory.module}"
            yield Seam(factory.hosts, f"{factory.seam}: the launcher replaces {what}")
    for source in project.sources:
        sites = edited_sigmas(source.tree)[1] if source.has_word(DENSITY) else SigmaSites()
        if sites.draws:
            weights = _listed([*sites.weights, *sites.errors]) or "none"
            what = f"{source.name} as it is read: draw {_listed(sites.draws)}, weights {weights}"
            yield Seam(SHARED_FUNCTIONS, f"E: the launcher edits {what}", but=_left_alone(source, sites))


def _file_of(factory: Factory, project: Project) -> Source | None:
    file = module_file(project.folders, factory.module)
    return None if file is None else read_file(file, project.folders)


def _is_reached(factory: Factory, project: Project, named: set[str]) -> bool:
    """Whether the script comes to a host's module that makes what the launcher replaces."""
    source = _file_of(factory, project)
    if source is None:
        return bool(named & set(factory.entries))
    is_read = source.path in {each.path for each in project.sources} or named & set(factory.entries)
    has_methods = all(source.has_word(name) for name in factory.methods)
    return bool(is_read) and source.binds(factory.functions) and has_methods


def _left_alone(source: Source, sites: SigmaSites) -> str:
    """The draws of the same functions that are not edited: a script's options may choose them."""
    found = draws(source)
    scopes = {draw.scope for draw in found if draw.line in sites.draws}
    others = [draw.line for draw in found if draw.scope in scopes and draw.line not in sites.draws]
    return f"not edited: {_listed(others)}; a run that draws there has no policy" if others else ""


def _listed(lines: list[int]) -> str:
    return f":{', '.join(map(str, sorted(lines)))}" if lines else ""


def _has(row: KnownHost, script: Path, folders: Sequence[Path]) -> bool:
    paths = [folder / row.file for folder in folders] if row.file else [script]
    path = next((path for path in paths if path.is_file()), None)
    source = None if path is None else read_file(path, folders)
    return source is not None and source.has_word(row.word)
