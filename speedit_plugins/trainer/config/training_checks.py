"""Checks of `optimizer`, `sharding` and `ema`. Uses the standard library only, like `checks.py`."""

from dataclasses import fields

from speedit_plugins.trainer.config.key_names import key_hint, value_hint
from speedit_plugins.trainer.config.optimizers import OPTIMIZER_FACTS
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import REST, EmaConfig, OptimizerConfig, ShardingConfig, label
from speedit_plugins.trainer.config.validation import ConfigError, key_paths

# Which schedule a key belongs to, and whether that schedule needs it.
_SCHEDULE_KEYS = {
    "power": ("polynomial", True),
    "decay_steps": ("warmup_stable_decay", True),
    "decay_shape": ("warmup_stable_decay", False),
}
_AVERAGE_KEYS = {
    "halflife_steps": "halflife",
    "ramp": "halflife",
    "sigma_rel": "power",
    "snapshot_every": "power",
}


def check_optimizer_keys(options: OptimizerConfig) -> None:
    """Refuses a parameter that an optimizer of this package does not have.

    Parameters of other optimizers are checked when they are built.

    Raises:
        ConfigError: the key, with the nearest known one.
    """
    facts = OPTIMIZER_FACTS.get(options.type)
    if facts is None:
        return
    own = [entry.name for entry in fields(OptimizerConfig) if not entry.metadata.get(REST)]
    known = [key for key in (*own, *facts.parameters) if key not in ("betas", "weight_decay")]
    known += [key for key in ("betas", "weight_decay") if key in facts.parameters]
    for name in options.parameters:
        if name not in facts.parameters:
            close = key_hint(name, "optimizer", known, list(key_paths()))
            raise ConfigError(
                f"optimizer.{name}", f"unknown key{close}; known for {options.type}: {', '.join(known)}"
            )
    for name in ("betas", "weight_decay"):
        if getattr(options, name) is not None and name not in facts.parameters:
            raise ConfigError(f"optimizer.{name}", f"has no effect with type {options.type}; wanted null")


def check_optimizer(config: ExperimentConfig) -> None:
    """Checks that optimizer, plugin and schedule of a training agree.

    Raises:
        ConfigError: the plugin does not work with the optimizer, a key has no effect or is missing, or the
            schedule does not fit into the training.
    """
    options = config.optimizer
    facts = OPTIMIZER_FACTS.get(options.type)
    if facts is not None:
        check_plugin(options.type, facts.plugins, config.plugin)
        if not facts.schedules and options.schedule != "constant":
            reason = f"{options.type} needs none; wanted constant, got {options.schedule}"
            raise ConfigError("optimizer.schedule", reason)
    elif options.lr is None:
        own = "; one of your own needs optimizer.lr"
        close = value_hint(options.type, tuple(OPTIMIZER_FACTS))
        known = ", ".join(OPTIMIZER_FACTS)
        raise ConfigError("optimizer.type", f"wanted one of {known}, got {options.type!r}{close}{own}")
    if options.min_lr and options.schedule == "constant":
        raise ConfigError("optimizer.min_lr", "has no effect with schedule constant; wanted 0")
    if options.lr is not None and options.min_lr > options.lr:
        raise ConfigError("optimizer.min_lr", f"wanted at most lr = {options.lr:g}, got {options.min_lr:g}")
    _check_schedule_keys(options)
    _check_lengths(options, config.max_training_steps)


def check_plugin(name: str, plugins: tuple[str, ...], plugin: str) -> None:
    """Refuses a plugin that an optimizer does not work with.

    Raises:
        ConfigError: names the plugins that it works with.
    """
    if plugin not in plugins:
        raise ConfigError(
            "optimizer.type",
            f"{name} does not work with plugin {plugin}; wanted plugin {' or '.join(plugins)}, or the"
            " optimizer AdamW",
        )


def check_sharding(config: ExperimentConfig) -> None:
    """Refuses keys of `sharding` where nothing is sharded so.

    Raises:
        ConfigError: names the key.
    """
    if config.plugin == "fsdp2":
        return
    for entry in fields(ShardingConfig):
        if getattr(config.sharding, entry.name) != entry.default:
            problem = f"has no effect with plugin {config.plugin}; wanted it left out, or plugin fsdp2"
            raise ConfigError(f"sharding.{entry.name}", problem)


def check_sequence(config: ExperimentConfig) -> None:
    """Refuses what does not go with split tokens. The model is asked when it is built.

    Raises:
        ConfigError: names the key.
    """
    if config.sequence_parallel == 1:
        return
    size = f"sequence_parallel {config.sequence_parallel}"
    if config.plugin == "gemini":
        raise ConfigError("plugin", f"gemini is not tried with {size}; wanted ddp, zero1, zero2 or fsdp2")
    if config.compile:
        raise ConfigError("compile", f"the exchange of tokens under {size} is not compiled; wanted false")
    if config.masking.type != "none":
        raise ConfigError("masking.type", f"leaves out tokens that {size} splits; wanted none")
    if config.routing.keep < 1:
        raise ConfigError(
            "routing.keep", f"each process would choose among its own tokens under {size}; wanted 1"
        )


def check_average(config: ExperimentConfig) -> None:
    """Refuses keys of one kind of average in another kind, where they have no effect.

    Raises:
        ConfigError: names the key.
    """
    options, defaults = config.ema, EmaConfig()
    for key, kind in _AVERAGE_KEYS.items():
        if options.type != kind and getattr(options, key) != getattr(defaults, key):
            wanted = f"wanted it left out, or type {kind}"
            raise ConfigError(f"ema.{key}", f"has no effect with type {options.type}; {wanted}")
    if not options.sigma_rel or len(set(options.sigma_rel)) < len(options.sigma_rel):
        raise ConfigError("ema.sigma_rel", f"wanted different lengths, at least one, got {options.sigma_rel}")
    if len({label(length) for length in options.sigma_rel}) < len(options.sigma_rel):
        raise ConfigError(
            "ema.sigma_rel", f"wanted lengths that differ in their first six digits, got {options.sigma_rel}"
        )
    if options.snapshot_every > config.max_training_steps:
        raise ConfigError(
            "ema.snapshot_every",
            f"wanted at most max_training_steps = {config.max_training_steps}, got {options.snapshot_every}",
        )


def _check_schedule_keys(options: OptimizerConfig) -> None:
    for key, (schedule, is_needed) in _SCHEDULE_KEYS.items():
        value = getattr(options, key)
        if value is not None and options.schedule != schedule:
            raise ConfigError(
                f"optimizer.{key}", f"has no effect with schedule {options.schedule}; wanted null"
            )
        if value is None and options.schedule == schedule and is_needed:
            raise ConfigError(f"optimizer.{key}", f"missing; schedule {schedule} needs it")


def _check_lengths(options: OptimizerConfig, num_steps: int) -> None:
    if options.schedule == "constant":
        return
    limit = f"wanted less than max_training_steps = {num_steps} with schedule {options.schedule}"
    if options.warmup_steps >= num_steps:
        raise ConfigError("optimizer.warmup_steps", f"{limit}, got {options.warmup_steps}")
    if options.decay_steps is not None and options.warmup_steps + options.decay_steps > num_steps:
        raise ConfigError(
            "optimizer.decay_steps",
            f"wanted at most max_training_steps - warmup_steps = {num_steps - options.warmup_steps}, got"
            f" {options.decay_steps}",
        )
