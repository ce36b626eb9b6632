"""mmcv 1's configs, registries and optimizers, which PixArt trains with, by mmengine, their successor."""

import sys
from collections import defaultdict
from types import ModuleType
from typing import Any

import torch
from mmengine import Config, Registry, build_from_cfg
from mmengine.dist import get_dist_info
from torch import nn

from whole_trainings.stand_ins import module_with

NAME = "mmcv 1 (mmengine, and the few functions that it dropped)"
OPTIMIZERS, OPTIMIZER_BUILDERS = Registry("optimizer"), Registry("optimizer builder")
OPTIMIZERS.register_module(name="AdamW", module=torch.optim.AdamW)


class LogBuffer:
    """Means of numbers, since they were last cleared."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self.output: dict[str, float] = {}

    def update(self, values: dict[str, float]) -> None:
        """Adds one number for each name."""
        for name, value in values.items():
            self._values[name].append(value)

    def average(self) -> None:
        """Puts the means into `output`."""
        self.output = {name: sum(values) / len(values) for name, values in self._values.items()}

    def clear(self) -> None:
        """Forgets everything."""
        self._values.clear()
        self.output.clear()


class DefaultOptimizerConstructor:
    """Builds an optimizer from a config, with the parameter groups of a subclass's `add_params`."""

    def __init__(self, optimizer_cfg: Any, paramwise_cfg: Any = None) -> None:
        self.optimizer_cfg, self.paramwise_cfg = optimizer_cfg, paramwise_cfg or {}
        self.base_lr, self.base_wd = optimizer_cfg.get("lr"), optimizer_cfg.get("weight_decay")

    def __call__(self, model: nn.Module) -> Any:
        params: list[Any] = []
        self.add_params(params, model)
        return OPTIMIZERS.build({**self.optimizer_cfg, "params": params})

    def add_params(self, params: list[Any], module: nn.Module) -> None:
        """Adds groups of parameters to the list."""
        raise NotImplementedError


def build_optimizer(model: nn.Module, config: Any) -> Any:
    """The optimizer of a config, by the constructor that it names."""
    config = dict(config)
    constructor, paramwise = config.pop("constructor"), config.pop("paramwise_cfg", None)
    built = OPTIMIZER_BUILDERS.get(constructor)(optimizer_cfg=config, paramwise_cfg=paramwise)
    return built(model)


def modules() -> dict[str, ModuleType]:
    """mmcv and its modules, for sys.modules."""
    runner = module_with(
        "mmcv.runner", get_dist_info=get_dist_info, LogBuffer=LogBuffer, OPTIMIZERS=OPTIMIZERS
    )
    vars(runner).update(build_optimizer=build_optimizer, OPTIMIZER_BUILDERS=OPTIMIZER_BUILDERS)
    vars(runner).update(DefaultOptimizerConstructor=DefaultOptimizerConstructor)
    logging = module_with("mmcv.utils.logging", logger_initialized={})
    norms = {"_BatchNorm": nn.modules.batchnorm._BatchNorm}
    norms["_InstanceNorm"] = nn.modules.instancenorm._InstanceNorm
    utils = module_with("mmcv.utils", logging=logging, **norms)
    top = module_with("mmcv", Registry=Registry, build_from_cfg=build_from_cfg, Config=Config)
    vars(top).update(runner=runner, utils=utils)
    return {module.__name__: module for module in (top, runner, utils, logging)}


def install() -> list[str]:
    """Puts mmcv in place. Returns what was replaced."""
    sys.modules.update(modules())
    return [NAME]
