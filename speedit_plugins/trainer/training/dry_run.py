"""What --dry-run prints: parameters, tokens, memory and data of a config."""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import cast

from torch import nn

from speedit_plugins.registry import DATASETS, ENCODERS, FEATURES, TEXT_ENCODERS, check
from speedit_plugins.trainer import build
from speedit_plugins.trainer.accelerations.alignment import PROJECTOR
from speedit_plugins.trainer.accelerations.summary import in_use
from speedit_plugins.trainer.accelerations.teachers import EMBEDDED
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.yaml_text import one_line
from speedit_plugins.trainer.data.summary import data_lines
from speedit_plugins.trainer.models.training_only import CHILD, layers_of
from speedit_plugins.trainer.parallel.optimizers import check_optimizer
from speedit_plugins.trainer.training.data_centre import is_centred_by_data
from speedit_plugins.trainer.training.planning import RankPlan, on_meta, plan_lines
from speedit_plugins.trainer.training.sequence import tokens_line
from speedit_plugins.trainer.training.validation import of_validation, training_part


@dataclass(frozen=True)
class Description:
    """What there is to say of a config, and why its data cannot be used, None if they can."""

    text: str
    fault: str | None = None


def describe(
    config: ExperimentConfig, *, processes: int | None = None, gpu_memory: int | None = None
) -> Description:
    """Parameters, tokens per sample, memory of a rank and data of a config, without allocating the model.

    Args:
        processes: of the training; None is the fewest that the config can do with.
        gpu_memory: bytes of a GPU, for a table of what fits.

    Raises:
        ValueError: a name is unknown, the model cannot do what the config asks for, or the processes cannot
            share its batch.
    """
    check(ENCODERS, config.encoder, allow_download=False)
    check(FEATURES, config.features, images=None, labels=None)
    if config.text_encoder is not None:
        check(TEXT_ENCODERS, config.text_encoder, allow_download=False)
    build.build_masks(config)
    section, given = build.dataset_options(config, augmented=True)
    check(DATASETS, section, **given)
    if config.data.validation is not None:
        section, given = build.dataset_options(of_validation(config), augmented=False)
        check(DATASETS, section, **given)
    model, _ = on_meta(config)
    num_parameters, own = _sizes(model)
    check_optimizer(config)
    plan = RankPlan(config, processes)
    lines = [
        ("parameters", f"{num_parameters:,}"),
        *([("training only", _training_only(model, config, own))] if own else []),
        ("tokens per sample", f"{model.num_tokens:,}"),
        *([("on each process", shared)] if (shared := tokens_line(model, config)) else []),
        *plan_lines(plan, gpu_memory),
        ("policy", _policy(config)),
        *([("accelerations", ", ".join(used))] if (used := in_use(config)) else []),
    ]
    data, fault = _data(config)
    return Description("\n".join(f"{name:<19}{text}" for name, text in [*lines, *data]), fault)


def _policy(config: ExperimentConfig) -> str:
    if is_centred_by_data(config):
        return f"{one_line(config.diffusion.policy)}, centred by the data when training starts"
    return str(build.build_timestep_policy(config, build.build_process(config, respaced=True)))


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Number of parameters that samples use, and of those that only the training has."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    own = sum(size for name, size in sizes.items() if name.startswith(f"{CHILD}."))
    return sum(sizes.values()) - own, own


def _training_only(model: nn.Module, config: ExperimentConfig, count: int) -> str:
    if config.alignment.type != "REPA" or config.alignment.teacher == EMBEDDED:
        return f"{count:,} parameters"
    # The width of the features is in the teacher's files: it was taken for 1.
    last = cast(nn.Linear, cast(nn.Sequential, layers_of(model)[PROJECTOR])[-1])
    row = last.in_features + 1
    return f"{count - row:,} parameters, and {row:,} for each feature of the teacher, which is not read"


def _data(config: ExperimentConfig) -> tuple[list[tuple[str, str]], str | None]:
    """What the dataset holds, and why it cannot be used."""
    section = config.data.dataset
    if "verify" in inspect.signature(DATASETS.module_dict[section["type"]]).parameters:
        # Only a training reads all of a cache to verify it.
        data = dataclasses.replace(config.data, dataset={**section, "verify": False})
        config = dataclasses.replace(config, data=data)
    try:
        dataset = training_part(config, build.build_dataset(config))
    except (ValueError, OSError, ImportError) as error:
        fault = " ".join(str(error).split())
        return [("data", f"cannot be used: {fault}")], fault
    return data_lines(dataset, **build.summary_options(config)), None
