"""From a config to a timestep policy."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from speedit_plugins.policies import weightings
from speedit_plugins.policies.loss_normalized import LossNormalizedPolicy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.registry import (
    DENSITIES,
    DRAWS,
    POLICIES,
    WEIGHTINGS,
    Config,
    build,
    check_type,
    nearest,
    options_of,
)

# The keys of a composed policy; everything else in a policy config is a parameter of a named one.
_COMMON_KEYS = ("stratified", "normalize", "equivalent_to")
_PART_KEYS = ("density", "weighting", "draw", "scope")


def build_policy(
    config: str | Config,
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    *,
    data_spectrum: Callable[[], DataSpectrum] | None = None,
) -> TimestepPolicy:
    """The timestep policy of a config, for this schedule.

    Args:
        config: a registered name; `dict(type=name, ...)` with its parameters; or the parts
            `dict(density=..., weighting=..., draw=..., scope=...)`, each a name or dict(type=...). All three
            take `stratified`, `normalize` (see `TimestepPolicy`; "loss" makes a `LossNormalizedPolicy`) and
            `equivalent_to`: "host" (the default) multiplies the host's own loss, "epsilon" converts the
            weights so that the objective is that of a noise-predicting model. Min-SNR always converts.
        schedule: what the host or process trains on.
        prediction_type: what the model predicts: epsilon, x0, v or flow.
        data_spectrum: called where a density is centred by the data and the config does not say where.

    Raises:
        ValueError: an unknown name or parameter (the known ones and the nearest are listed), or a bad value.
    """
    weightings.check_prediction_type(prediction_type)
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"a policy needs a NoiseSchedule, such as NoiseSchedule.from_betas(betas), got {type(schedule)}"
        )
    if not isinstance(config, str | Mapping):
        raise ValueError(f"a policy needs a name or a mapping, got {config!r}")
    if not (data_spectrum is None or callable(data_spectrum)):
        raise ValueError(f"data_spectrum needs a function that returns a spectrum, got {type(data_spectrum)}")
    options = options_of(config)
    common: dict[str, Any] = {key: options.pop(key) for key in _COMMON_KEYS if key in options}
    name = options.get("type", "custom")
    parts: dict[str, Any] = (
        build(POLICIES, options, schedule=schedule, also=_COMMON_KEYS) if "type" in options else options
    )
    # A recipe's own, unless the config says otherwise.
    common = {**{key: parts.pop(key) for key in _COMMON_KEYS if key in parts}, **common}
    check_type("policy stratified", common.get("stratified", False), bool)
    kind, common["normalize"] = _normalized(common.get("normalize", False))
    unknown = [key for key in parts if key not in _PART_KEYS]
    if unknown or "density" not in parts or "weighting" not in parts:
        known = [*_PART_KEYS, *_COMMON_KEYS]
        raise ValueError(
            f"a policy needs type=NAME, or density=... and weighting=...; got keys {sorted(parts)}"
            f"{nearest(unknown[0], known) if unknown else ''}; known: type, {', '.join(known)}"
        )
    return kind(
        schedule,
        build(DENSITIES, parts["density"], schedule=schedule, data_spectrum=data_spectrum),
        _Weighting(parts["weighting"], schedule, prediction_type, common.pop("equivalent_to", None)),
        draw=build(DRAWS, parts.get("draw", "iid"), schedule=schedule),
        name=name,
        scope=parts.get("scope", "mse"),
        **common,
    )


def _normalized(value: Any) -> tuple[type[TimestepPolicy], bool]:
    """The class that a config's `normalize` asks for, and whether its weights are divided by their mean."""
    if value == "loss":
        return LossNormalizedPolicy, True
    if not isinstance(value, bool):
        raise ValueError(f"policy normalize needs true, false or 'loss', got {value!r}")
    return TimestepPolicy, value


class _Weighting:
    """A weighting config bound to its schedule: density table (T,) -> weights (T,)."""

    def __init__(
        self, config: str | Config, schedule: NoiseSchedule, prediction_type: str, equivalent_to: str | None
    ) -> None:
        if equivalent_to not in (None, "host", "epsilon"):
            raise ValueError(f"equivalent_to needs 'host' or 'epsilon', got {equivalent_to!r}")
        function = WEIGHTINGS.module_dict.get(_name_of(config))
        always = getattr(function, "defined_on", "host") == "epsilon"
        if always and equivalent_to == "host":
            raise ValueError(
                f"{_name_of(config)} always converts from the epsilon loss: drop equivalent_to='host'"
            )
        self._config = config
        self._schedule = schedule
        self._prediction_type = prediction_type
        self._converts = always or equivalent_to == "epsilon"

    def __call__(self, density: Tensor) -> Tensor:
        weight: Tensor = build(WEIGHTINGS, self._config, schedule=self._schedule, density=density)
        if self._converts:
            return weightings.epsilon_equivalent(weight, self._schedule, self._prediction_type)
        return weight


def _name_of(config: Any) -> str:
    return str(config.get("type") if isinstance(config, Mapping) else config)
