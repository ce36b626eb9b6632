"""Every name a config may use, and how a config becomes an object.

A plugin registers its own by a call, `DENSITIES.register_module(name="mine", module=mine)`.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmengine.registry import Registry
from torch import Tensor

from speedit_plugins import recipes
from speedit_plugins.core import densities, draws, weightings
from speedit_plugins.core.policy import TimestepPolicy
from speedit_plugins.core.schedule import NoiseSchedule

DENSITIES = Registry("density", scope="speedit_plugins")
WEIGHTINGS = Registry("weighting", scope="speedit_plugins")
DRAWS = Registry("draw", scope="speedit_plugins")
POLICIES = Registry("policy", scope="speedit_plugins")

# Of the trainer; their modules register themselves, and are imported when a name is first looked up.
PROCESSES = Registry(
    "diffusion process", scope="speedit_plugins", locations=["speedit_plugins.diffusion.process"]
)
MODELS = Registry("model", scope="speedit_plugins", locations=["speedit_plugins.models.dit"])
ENCODERS = Registry("encoder", scope="speedit_plugins", locations=["speedit_plugins.models.pretrained"])
DATASETS = Registry(
    "dataset",
    scope="speedit_plugins",
    locations=["speedit_plugins.data.digits", "speedit_plugins.data.images"],
)
FEATURES = Registry(
    "feature extractor", scope="speedit_plugins", locations=["speedit_plugins.evaluation.features"]
)

Config = Mapping[str, Any]

# The keys of a composed policy; everything else in a policy config is a parameter of a named one.
_COMMON_KEYS = ("stratified", "normalize", "equivalent_to")
_PART_KEYS = ("density", "weighting", "draw", "scope")


def build_policy(
    config: str | Config, schedule: NoiseSchedule, prediction_type: str = "epsilon"
) -> TimestepPolicy:
    """The timestep policy of a config, for this schedule.

    Args:
        config: a registered name; `dict(type=name, ...)` with its parameters; or the parts
            `dict(density=..., weighting=..., draw=..., scope=...)`, each a name or dict(type=...). All three
            take `stratified`, `normalize` (see `TimestepPolicy`) and `equivalent_to`: "host" (the default)
            multiplies the host's own loss, "epsilon" converts the weights so that the objective is that of a
            noise-predicting model. Min-SNR always converts.
        schedule: what the host or process trains on.
        prediction_type: what the model predicts: epsilon, x0, v or flow.

    Raises:
        ValueError: an unknown name or parameter (the known ones and the nearest are listed), or a bad value.
    """
    weightings.check_prediction_type(prediction_type)
    options: dict[str, Any] = {"type": config} if isinstance(config, str) else dict(config)
    common: dict[str, Any] = {key: options.pop(key) for key in _COMMON_KEYS if key in options}
    name = options.get("type", "custom")
    parts: dict[str, Any] = (
        build(POLICIES, options, schedule=schedule, also=_COMMON_KEYS) if "type" in options else options
    )
    unknown = [key for key in parts if key not in _PART_KEYS]
    if unknown or "density" not in parts or "weighting" not in parts:
        raise ValueError(
            "a policy needs type=NAME, or density=... and weighting=..., and may have draw and scope;"
            f" got keys {sorted(parts)}{nearest(unknown[0], _PART_KEYS) if unknown else ''}"
        )
    return TimestepPolicy(
        schedule,
        build(DENSITIES, parts["density"], schedule=schedule),
        _Weighting(parts["weighting"], schedule, prediction_type, common.pop("equivalent_to", None)),
        draw=build(DRAWS, parts.get("draw", "iid"), schedule=schedule),
        name=name,
        scope=parts.get("scope", "mse"),
        **common,
    )


def build(registry: Registry, config: str | Config, *, also: Iterable[str] = (), **given: Any) -> Any:
    """Calls what `config["type"]` names with the config's other keys.

    Args:
        registry: where the name is looked up.
        config: a name, or a mapping with `type` and parameters.
        also: names that the error for an unknown parameter lists beside the builder's own.
        given: arguments from the caller, passed where the builder has a parameter of that name.

    Raises:
        ValueError: no `type`, an unknown name, an unknown or a missing parameter.
    """
    options = {"type": config} if isinstance(config, str) else dict(config)
    if "type" not in options:
        raise ValueError(
            f"a {registry.name} config needs a type, got keys {sorted(options)}; {_known(registry)}"
        )
    name = options.pop("type")
    registry.import_from_location()
    builder = registry.module_dict.get(name)
    if builder is None:
        raise ValueError(
            f"unknown {registry.name} {name!r}{nearest(str(name), registry.module_dict)}; {_known(registry)}"
        )
    parameters = inspect.signature(builder).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = [key for key, p in parameters.items() if key not in given and p.kind is not p.VAR_KEYWORD]
    for key in options:
        if key not in own and not open_ended:
            names = sorted([*own, *also])
            raise ValueError(
                f"{registry.name} {name!r} has no parameter {key!r}{nearest(key, names)};"
                f" known: {', '.join(names)}"
            )
    missing = [
        key for key in own if parameters[key].default is inspect.Parameter.empty and key not in options
    ]
    if missing:
        raise ValueError(f"{registry.name} {name!r} needs {', '.join(missing)}, got {sorted(options)}")
    return builder(**{key: value for key, value in given.items() if key in parameters}, **options)


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known name, '' where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Weighting:
    """A weighting config bound to its schedule: density table (T,) -> weights (T,)."""

    def __init__(
        self, config: str | Config, schedule: NoiseSchedule, prediction_type: str, equivalent_to: str | None
    ) -> None:
        name = config if isinstance(config, str) else config.get("type")
        if equivalent_to not in (None, "host", "epsilon"):
            raise ValueError(f"equivalent_to needs 'host' or 'epsilon', got {equivalent_to!r}")
        if name == "min_snr" and equivalent_to == "host":
            raise ValueError(
                "min_snr is defined by the prediction type and always converts: drop equivalent_to='host'"
            )
        self._config = config
        self._schedule = schedule
        self._prediction_type = prediction_type
        self._converts = name == "min_snr" or equivalent_to == "epsilon"

    def __call__(self, density: Tensor) -> Tensor:
        weight: Tensor = build(WEIGHTINGS, self._config, schedule=self._schedule, density=density)
        if self._converts:
            return weightings.epsilon_equivalent(weight, self._schedule, self._prediction_type)
        return weight


def _known(registry: Registry) -> str:
    return f"known: {', '.join(sorted(registry.module_dict))}"


def _register(registry: Registry, members: Mapping[str, Callable[..., Any]]) -> None:
    for name, member in members.items():
        registry.register_module(name=name, module=member)


_register(
    DENSITIES,
    {
        "uniform": densities.uniform,
        "thinned": densities.thinned,
        "asymmetric": densities.asymmetric,
        "logit_normal": densities.logit_normal,
        "clts": densities.Curriculum,
        "loss_second_moment": densities.LossSecondMoment,
    },
)
_register(
    WEIGHTINGS,
    {
        "constant": weightings.constant,
        "change_aware": weightings.change_aware,
        "p2": weightings.p2,
        "min_snr": weightings.min_snr,
        "inverse_density": weightings.inverse_density,
    },
)
_register(DRAWS, {"iid": draws.Iid, "paired": draws.Paired})
_register(
    POLICIES,
    {
        "uniform": recipes.uniform,
        "speedit": recipes.speedit,
        "speedit_reference": recipes.speedit_reference,
        "speed": recipes.speed,
        "speed_reference": recipes.speed_reference,
        "open_sora_speed": recipes.open_sora_speed,
        "p2": recipes.p2,
        "min_snr": recipes.min_snr,
        "logit_normal": recipes.logit_normal,
        "clts": recipes.clts,
        "loss_second_moment": recipes.loss_second_moment,
    },
)
