"""The functions by which known hosts make what draws their timesteps, and which scripts call them.

The launcher replaces these functions.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder

from speedit_plugins.hosts.inline_draws import SCRIPTS


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
    """

    hosts: str
    module: str
    functions: tuple[str, ...]
    seam: str = "B"
    adapter: str = ""


FACTORIES = (
    Factory("DiT, fast-DiT, Latte", "diffusion", ("create_diffusion",)),
    Factory("PixArt-alpha", "diffusion.iddpm", ("IDDPM",)),
    Factory("OpenDiT 1.0", "opendit.diffusion", ("create_diffusion",)),
    Factory("OpenDiT 0.0.1", "opendit.models.diffusion", ("create_diffusion",)),
    Factory(
        "Open-Sora-Plan 1.0",
        "opensora.models.diffusion.diffusion",
        ("create_diffusion", "create_diffusion_T"),
    ),
    Factory("SiT, LightningDiT", "transport", ("create_transport",)),
    Factory("guided-diffusion", "guided_diffusion.resample", ("create_named_schedule_sampler",), "C"),
    Factory("MDT", "masked_diffusion.resample", ("create_named_schedule_sampler",), "C"),
    Factory(
        "torchtitan Flux",
        "torchtitan.models.flux.trainer",
        ("FluxTrainer",),
        "F",
        "speedit_plugins.hosts.inline_draws.adapt_torchtitan",
    ),
    Factory(
        "LTX-2",
        "ltx_trainer.training_strategies",
        ("FlexibleStrategy",),
        "F",
        "speedit_plugins.hosts.modality_draws.adapt",
    ),
    Factory(
        "diffusion-pipe",
        "models.base",
        ("CommonPipeline",),
        "F",
        "speedit_plugins.hosts.prepared_inputs.adapt",
    ),
    Factory(
        "NeMo Automodel",
        "nemo_automodel.components.flow_matching.pipeline",
        ("FlowMatchingPipeline",),
        "F",
        "speedit_plugins.hosts.flow_pipeline.adapt",
    ),
    Factory(
        "CogVideoX",
        "finetune.models.utils",
        ("get_model_cls",),
        "D",
        "speedit_plugins.hosts.scheduler_draws.adapt",
    ),
)
# DiT-3D defines its class in the training script itself.
SCRIPT_METHOD = "p_losses"


def reaches_a_factory(tree: ast.Module, folders: Sequence[str]) -> bool:
    """Whether a script names a known module, or one is in the folders that it would import from."""
    named = set(_imported(tree))
    return any(factory.module in named or _is_in(folders, factory.module) for factory in FACTORIES)


def defines(tree: ast.Module, function: str) -> bool:
    """Whether a script has a function or method of this name."""
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.walk(tree))


def known_hosts() -> dict[str, str]:
    """What the launcher looks for in a script, for each group of hosts."""
    return {
        **{f.hosts: f"{f.module}.{' or '.join(f.functions)}" for f in FACTORIES},
        **{host.hosts: f"{' and '.join(host.places)} in the script itself" for host in SCRIPTS},
        "DiT-3D": f"a class with {SCRIPT_METHOD} in the script itself",
        "diffusers": "F.mse_loss in the script itself, and torch.randint(0, noise_scheduler.config.num_train_"
        "timesteps, ...) or another torch.randint whose timesteps one noise scheduler's add_noise gets",
    }


def looked_for() -> str:
    """What the launcher looks for in a script, for messages."""
    return "; ".join(f"{place} ({hosts})" for hosts, place in known_hosts().items())


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_in(folders: Sequence[str], module: str) -> bool:
    """Whether one of these folders has a module; packages are looked into, not imported."""
    search: Sequence[str] | None = folders
    code = None
    for part in module.split("."):
        spec = PathFinder.find_spec(part, search)
        if spec is None:
            return False
        search, code = spec.submodule_search_locations, spec.origin
    # A folder of this name without an __init__.py has no code that could make anything.
    return code is not None
