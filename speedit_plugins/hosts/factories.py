"""The functions by which known hosts make what draws their timesteps, and which scripts call them.

The launcher replaces these functions.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from speedit_plugins.hosts.trainers.diffusion_trainer import MODULES as DDT_MODULES
from speedit_plugins.hosts.trainers.inline_draws import SCRIPTS


@dataclass(frozen=True)
class Factory:
    """A function of a host that makes what draws its timesteps, or draws them.

    Args:
        hosts: their names, for messages.
        module: its dotted name, as the host's scripts import it.
        functions: names in that module, of functions or classes; one that is missing is skipped.
        seam: "B" returns a diffusion object or a flow; "C" takes (name, diffusion) and returns a schedule
            sampler; "F" draws times, and another makes the loss; "D" the same with a noise scheduler's index.
        adapter: for "F" and "D", the dotted name of a function of ours. It takes the module of the host and a
            function that makes its `SeparateDraws` or its `ScriptPolicy`, and replaces what draws and what
            makes the loss.
        entries: modules that the host's scripts import, if they reach this one from elsewhere than a folder
            on sys.path.
        methods: if the functions are classes, names of theirs. Other projects have modules with this name, so
            a class without these methods is none of the host.
    """

    hosts: str
    module: str
    functions: tuple[str, ...]
    seam: str = "B"
    adapter: str = ""
    entries: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def is_class(self, made: Any) -> bool:
        """Whether this is a class with the host's methods."""
        return isinstance(made, type) and all(hasattr(made, name) for name in self.methods)


FACTORIES = (
    Factory("DiT, fast-DiT, Latte", "diffusion", ("create_diffusion",)),
    Factory("PixArt-alpha, PixArt-sigma", "diffusion.iddpm", ("IDDPM",)),
    Factory("HunyuanDiT", "hydit.diffusion", ("create_diffusion",)),
    Factory("OpenDiT 1.0", "opendit.diffusion", ("create_diffusion",)),
    Factory("OpenDiT 0.0.1", "opendit.models.diffusion", ("create_diffusion",)),
    Factory(
        "Open-Sora-Plan 1.0",
        "opensora.models.diffusion.diffusion",
        ("create_diffusion", "create_diffusion_T"),
    ),
    Factory("SiT, LightningDiT, Lumina-Image 2.0", "transport", ("create_transport",)),
    Factory("RAE", "stage2.transport", ("create_transport",)),
    Factory("REPA, REG", "loss", ("SILoss",), methods=("interpolant", "__call__")),
    Factory("REPA-E", "models.sit", ("SiT",), methods=("interpolant", "forward")),
    Factory("guided-diffusion", "guided_diffusion.resample", ("create_named_schedule_sampler",), "C"),
    Factory("MDT", "masked_diffusion.resample", ("create_named_schedule_sampler",), "C"),
    Factory(
        "OneTrainer",
        "modules.modelSetup.mixin.ModelSetupNoiseMixin",
        ("ModelSetupNoiseMixin",),
        "F",
        "speedit_plugins.hosts.trainers.one_trainer.adapt",
        # Its scripts put their parent folder on sys.path by this module.
        ("util.import_util",),
    ),
    Factory(
        "SimpleTuner",
        "simpletuner.helpers.models.common",
        ("ModelFoundation",),
        "F",
        "speedit_plugins.hosts.trainers.simple_tuner.adapt",
        ("simpletuner.helpers.training.trainer",),
    ),
    Factory(
        "DiffSynth-Studio",
        "diffsynth.diffusion.loss",
        ("FlowMatchSFTLoss",),
        "F",
        "speedit_plugins.hosts.trainers.diffsynth.adapt",
        ("diffsynth.diffusion",),
    ),
    Factory(
        "ai-toolkit",
        "extensions_built_in.sd_trainer.SDTrainer",
        ("SDTrainer",),
        "F",
        "speedit_plugins.hosts.trainers.ai_toolkit.adapt",
        ("toolkit.job",),
    ),
    Factory(
        "torchtitan Flux",
        "torchtitan.models.flux.trainer",
        ("FluxTrainer",),
        "F",
        "speedit_plugins.hosts.trainers.inline_draws.adapt_torchtitan",
    ),
    Factory(
        "LTX-2",
        "ltx_trainer.training_strategies",
        ("FlexibleStrategy",),
        "F",
        "speedit_plugins.hosts.trainers.modality_draws.adapt",
    ),
    Factory(
        "diffusion-pipe",
        "models.base",
        ("CommonPipeline",),
        "F",
        "speedit_plugins.hosts.trainers.prepared_inputs.adapt",
    ),
    Factory(
        "NeMo Automodel",
        "nemo_automodel.components.flow_matching.pipeline",
        ("FlowMatchingPipeline",),
        "F",
        "speedit_plugins.hosts.trainers.flow_pipeline.adapt",
    ),
    *(
        Factory(
            f"DDT ({module})",
            f"src.diffusion.{module}",
            names,
            "F",
            "speedit_plugins.hosts.trainers.diffusion_trainer.adapt",
            ("src.lightning_model",),
            methods=("_impl_trainstep",),
        )
        for module, names in DDT_MODULES.items()
    ),
    Factory(
        "CogVideoX",
        "finetune.models.utils",
        ("get_model_cls",),
        "D",
        "speedit_plugins.hosts.trainers.scheduler_draws.adapt",
    ),
    # sd-scripts. All of its trainers import train_util; the flows draw in a module of their own.
    Factory(
        "sd-scripts (SD, SDXL)",
        "library.train_util",
        ("get_noise_noisy_latents_and_timesteps",),
        "D",
        "speedit_plugins.hosts.trainers.indexed_batch.adapt",
    ),
    *(
        Factory(
            f"sd-scripts ({models})",
            f"library.{module}",
            ("get_noisy_model_input_and_timesteps",),
            "F",
            "speedit_plugins.hosts.trainers.noisy_batch.adapt",
        )
        for models, module in (
            ("Flux, HunyuanImage, Anima", "flux_train_utils"),
            ("SD3", "sd3_train_utils"),
            ("Lumina", "lumina_train_util"),
        )
    ),
    Factory(
        "musubi-tuner",
        "musubi_tuner.training.trainer_base",
        ("NetworkTrainer",),
        "F",
        "speedit_plugins.hosts.trainers.noisy_trainer.adapt",
    ),
    Factory(
        "sd-scripts (Anima's weights)",
        "library.anima_train_utils",
        ("compute_loss_weighting_for_anima",),
        "F",
        "speedit_plugins.hosts.trainers.noisy_batch.adapt_weighting",
    ),
)
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
# The functions of seam E, which scripts of many projects import or have copies of.
SHARED_FUNCTIONS = "flow trainers with compute_density_for_timestep_sampling"
# How many imports lie between a script and a module that draws for it.
_IMPORT_DEPTH = 3
# DiT-3D defines its class in the training script itself.
SCRIPT_METHOD = "p_losses"


def reaches_a_factory(tree: ast.Module, folders: Sequence[str]) -> bool:
    """Whether a script names a known module, or one is in the folders that it would import from.

    A module whose name other projects have too has to be both, and to define the host's class.
    """
    named = set(_imported(tree))

    def is_reached(factory: Factory) -> bool:
        is_named = not named.isdisjoint((factory.module, *factory.entries))
        place = _origin(folders, factory.module)
        if factory.methods:
            return is_named and place is not None and _has_class(place, factory)
        return is_named or place is not None

    return any(map(is_reached, FACTORIES))


def reaches_text(tree: ast.Module, folders: Sequence[str], text: str) -> bool:
    """Whether a script, or a module of its own project that it imports, has a text.

    Args:
        tree: of the script.
        folders: that it would import from. Those of installed packages are not searched.
        text: to look for.
    """
    own = [each for each in folders if not is_installed(each)]
    seen: set[str] = set()
    trees = [tree]
    for _ in range(_IMPORT_DEPTH):
        names = {name for each in trees for name in _imported(each)} - seen
        seen |= names
        origins = {origin for name in names if (origin := _origin(own, name)) is not None}
        modules = [_source(origin) for origin in origins]
        if any(text in source for source, _ in modules):
            return True
        trees = [parsed for _, parsed in modules]
    return False


def is_installed(path: str) -> bool:
    """Whether a file or folder belongs to an installed package or to Python itself."""
    parts = Path(path).parts
    return not {"site-packages", "dist-packages"}.isdisjoint(parts) or path.startswith(_STANDARD_LIBRARY)


def defines(tree: ast.Module, function: str) -> bool:
    """Whether a script has a function or method of this name."""
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.walk(tree))


def known_hosts() -> dict[str, str]:
    """What the launcher looks for in a script, for each group of hosts."""
    return {
        **{f.hosts: f"{f.module}.{' or '.join(f.functions)}" for f in FACTORIES},
        **{host.hosts: f"{' and '.join(host.places)} in the script itself" for host in SCRIPTS},
        "DiT-3D": f"a class with {SCRIPT_METHOD} in the script itself",
        SHARED_FUNCTIONS: "a call of it whose u looks up rows of a scheduler, in the script or in modules of"
        " its project",
        "diffusers": "F.mse_loss in the script itself, and torch.randint(0, noise_scheduler.config.num_train_"
        "timesteps, ...) or another torch.randint whose timesteps one noise scheduler's add_noise gets",
    }


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _has_class(place: str, factory: Factory) -> bool:
    """Whether a file of Python defines a class of a factory, with its methods."""
    _, tree = _source(place)
    classes = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in factory.functions
    ]
    return any(set(factory.methods) <= {getattr(each, "name", "") for each in node.body} for node in classes)


def _origin(folders: Sequence[str], module: str) -> str | None:
    """The file of a module in these folders; packages are looked into, not imported."""
    search: Sequence[str] | None = folders
    code = None
    for number, part in enumerate(module.split(".")):
        spec = PathFinder.find_spec(part, search) or (None if number else _hooked(part))
        if spec is None:
            return None
        search, code = spec.submodule_search_locations, spec.origin
    # A folder of this name without an __init__.py has no code that could make anything.
    return code


def _hooked(package: str) -> ModuleSpec | None:
    """The spec of a package that an import hook knows, as after `pip install -e` of a flat project."""
    own = (BuiltinImporter, FrozenImporter, PathFinder)
    # An old hook may know find_module alone.
    hooks = (hook for hook in sys.meta_path if hook not in own and hasattr(hook, "find_spec"))
    return next((spec for hook in hooks if (spec := hook.find_spec(package, None)) is not None), None)


def _source(origin: str) -> tuple[str, ast.Module]:
    """The text of a Python file and its tree; both empty if it is none that can be read."""
    try:
        text = Path(origin).read_text(encoding="utf-8") if origin.endswith(".py") else ""
        return text, ast.parse(text)
    except (OSError, UnicodeDecodeError, SyntaxError):
        return "", ast.Module([], [])
