"""Which accelerations a config has, in a few words each."""

from speedit_plugins.trainer.config.schema import ExperimentConfig


def in_use(config: ExperimentConfig) -> list[str]:
    """The accelerations that are on, in the order of docs/accelerations, each with its main values."""
    masking, routing, found = config.masking, config.routing, []
    if masking.type != "none":
        found.append(f"masking {masking.type} of {masking.ratio:g} of the tokens")
    if routing.keep < 1:
        share, blocks = f"{1 - routing.keep:.2g}", f"{routing.from_} to {routing.to}"
        found.append(f"routing of {share} of the tokens past blocks {blocks}")
    if config.alignment.type != "none":
        found.append(_alignment(config))
    if config.contrastive.weight:
        found.append(f"contrastive {config.contrastive.weight:g}")
    if config.noise_assignment is not None:
        found.append(f"noise_assignment {config.noise_assignment}")
    if config.uncertainty:
        found.append("uncertainty")
    return found


def _alignment(config: ExperimentConfig) -> str:
    options, last = config.alignment, config.max_training_steps
    text = f"alignment {options.type} {options.weight:g} at block {options.layer}"
    if options.until is None:
        return text
    if options.until < last:
        return f"{text} until step {options.until}"
    return f"{text} to the end (until is {options.until}, the training has {last} steps)"
