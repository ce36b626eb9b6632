"""The engine of a config."""

import importlib.util
from typing import cast

from torch import nn

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.booster import BoostedReplica, GeminiEngine, ZeroEngine
from speedit_plugins.trainer.parallel.colossal_setup import import_quietly, set_accelerator_of
from speedit_plugins.trainer.parallel.gemini import check_gemini
from speedit_plugins.trainer.parallel.heap import keep_freed_pages
from speedit_plugins.trainer.parallel.optimizers import check_optimizer
from speedit_plugins.trainer.parallel.replica import Engine, Replica
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say

INSTALLATION = "pip install 'speedit-plugins[colossal]' && pip install --no-deps colossalai==0.5.0"


def build_engine(model: nn.Module, config: ExperimentConfig, runtime: Runtime) -> Engine:
    """The engine that the config's `plugin` names. `ddp` and `fsdp2` work without ColossalAI.

    Raises:
        ValueError: ColossalAI is missing, or the plugin does not go with device, precision or optimizer.
    """
    check_optimizer(config)
    if runtime.device.type == "cpu":
        keep_freed_pages()
    if config.plugin == "ddp" and runtime.world_size == 1:
        return Replica(model, config, runtime)
    if config.plugin == "fsdp2":
        # Here, so that it is imported where it is chosen.
        from speedit_plugins.trainer.parallel.fully_sharded import FullyShardedEngine

        return FullyShardedEngine(model, config, runtime)
    if importlib.util.find_spec("colossalai") is None:
        if config.plugin != "ddp":
            raise ValueError(
                f"plugin: {config.plugin} needs ColossalAI; wanted ddp or fsdp2, or {INSTALLATION}"
            )
        if runtime.is_main:
            say(f"no ColossalAI: ddp is torch's own; zero1, zero2 and gemini need {INSTALLATION}")
        return Replica(model, config, runtime)
    if config.plugin == "gemini":
        check_gemini(config, runtime)
    import_quietly()
    set_accelerator_of(runtime.device)
    engines = {"ddp": BoostedReplica, "zero1": ZeroEngine, "zero2": ZeroEngine, "gemini": GeminiEngine}
    return cast(Engine, engines[config.plugin](model, config, runtime))
