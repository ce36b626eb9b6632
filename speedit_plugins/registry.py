"""Every name a config may use, and how a config becomes an object.

A plugin registers its own by a call, `DENSITIES.register_module(name="mine", module=mine)`.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from mmengine.registry import Registry
from torch import Tensor

from speedit_plugins import recipes, spectrum
from speedit_plugins.core import densities, draws, weightings
from speedit_plugins.core.policy import TimestepPolicy
from speedit_plugins.core.schedule import NoiseSchedule
from speedit_plugins.loss_normalized import LossNormalizedPolicy

DENSITIES = Registry("density", scope="speedit_plugins")
WEIGHTINGS = Registry("weighting", scope="speedit_plugins")
DRAWS = Registry("draw", scope="speedit_plugins")
POLICIES = Registry("policy", scope="speedit_plugins")

# Of the trainer; their modules register themselves, and are imported when a name is first looked up.
PROCESSES = Registry(
    "diffusion process",
    scope="speedit_plugins",
    locations=["speedit_plugins.diffusion.process", "speedit_plugins.diffusion.flow"],
)
MODELS = Registry(
    "model",
    scope="speedit_plugins",
    locations=[
        "speedit_plugins.models.dit",
        "speedit_plugins.models.latte",
        "speedit_plugins.models.backbones",
    ],
)
ENCODERS = Registry("encoder", scope="speedit_plugins", locations=["speedit_plugins.models.pretrained"])
TEXT_ENCODERS = Registry("text encoder", scope="speedit_plugins", locations=["speedit_plugins.models.text"])
DATASETS = Registry(
    "dataset",
    scope="speedit_plugins",
    locations=[
        "speedit_plugins.data.digits",
        "speedit_plugins.data.images",
        "speedit_plugins.data.latents",
        "speedit_plugins.data.emoji",
        "speedit_plugins.data.moving_digits",
        "speedit_plugins.data.captions",
        "speedit_plugins.data.video_table",
        "speedit_plugins.data.video_folder",
    ],
)
MASKS = Registry("mask", scope="speedit_plugins", locations=["speedit_plugins.data.masks"])
FEATURES = Registry(
    "feature extractor",
    scope="speedit_plugins",
    locations=["speedit_plugins.evaluation.features", "speedit_plugins.evaluation.networks"],
)

Config = Mapping[str, Any]

# The keys of a composed policy; everything else in a policy config is a parameter of a named one.
_COMMON_KEYS = ("stratified", "normalize", "equivalent_to")
_PART_KEYS = ("density", "weighting", "draw", "scope")


def build_policy(
    config: str | Config,
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    *,
    data_spectrum: Callable[[], spectrum.DataSpectrum] | None = None,
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
    options = _options(config)
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


def build(registry: Registry, config: str | Config, *, also: Iterable[str] = (), **given: Any) -> Any:
    """Calls what `config["type"]` names with the config's other keys; see `check` for the rest."""
    builder, options = _resolved(registry, config, also, given)
    return builder(**options)


def check(registry: Registry, config: str | Config, *, also: Iterable[str] = (), **given: Any) -> None:
    """Raises what `build` would raise for names, parameters and their types, without building.

    Args:
        registry: where the name is looked up.
        config: a name, or a mapping with `type` and parameters.
        also: names that the error for an unknown parameter lists beside the builder's own.
        given: arguments from the caller, passed where the builder has a parameter of that name.

    Raises:
        ValueError: no `type`, an unknown name, an unknown or a missing parameter, a value of the wrong type.
    """
    _resolved(registry, config, also, given)


def _resolved(
    registry: Registry, config: str | Config, also: Iterable[str], given: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    builder, name, options = _found(registry, config)
    what = f"{registry.name} {name!r}"
    parameters = inspect.signature(builder).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = [key for key, p in parameters.items() if key not in given and p.kind is not p.VAR_KEYWORD]
    for key, value in options.items():
        if key in own:
            check_type(f"{what} {key}", value, parameters[key].annotation)
        elif not open_ended:
            names = sorted([*own, *also])
            raise ValueError(
                f"{what} has no parameter {key!r}{nearest(key, names)}; known: {', '.join(names)}"
            )
    missing = [
        key for key in own if parameters[key].default is inspect.Parameter.empty and key not in options
    ]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}, got {sorted(options)}")
    return builder, {**{key: value for key, value in given.items() if key in parameters}, **options}


def _found(registry: Registry, config: str | Config) -> tuple[Callable[..., Any], str, dict[str, Any]]:
    """What a config's `type` names, that name, and the config's other keys."""
    if not isinstance(config, str | Mapping):
        raise ValueError(f"a {registry.name} config needs a name or a mapping with type, got {config!r}")
    options = _options(config)
    if "type" not in options:
        raise ValueError(
            f"a {registry.name} config needs a type, got keys {sorted(options)}; {_known(registry)}"
        )
    name = str(options.pop("type"))
    registry.import_from_location()
    builder = registry.module_dict.get(name)
    if builder is None:
        close = nearest(name, registry.module_dict)
        raise ValueError(f"unknown {registry.name} {name!r}{close}; {_known(registry)}")
    return builder, name, options


def _options(config: str | Config) -> dict[str, Any]:
    """The keys of a config, of a name `type` alone."""
    if isinstance(config, str):
        return {"type": config}
    if wrong := [key for key in config if not isinstance(key, str)]:
        raise ValueError(f"the keys of a config need to be names, got {wrong[0]!r} in {dict(config)}")
    return dict(config)


def check_type(what: str, value: Any, annotation: Any) -> None:
    """Raises a ValueError unless a plain value has its annotation's type; other annotations pass.

    Args:
        what: begins the message.
        annotation: bool, int, float (which takes an int), str, or one of these or None.
    """
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    if not set(kinds) <= {bool, int, float, str, type(None)}:
        return
    # bool is an int to Python: k=true is a mistake all the same.
    fits = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, fits) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{what} needs {wanted}, got {value!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known name, '' where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


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
        "log_snr_normal": spectrum.log_snr_normal,
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
        "spectral": recipes.spectral,
        "spectral_fast": recipes.spectral_fast,
        "spectral_flow": recipes.spectral_flow,
        "p2": recipes.p2,
        "min_snr": recipes.min_snr,
        "logit_normal": recipes.logit_normal,
        "clts": recipes.clts,
        "loss_second_moment": recipes.loss_second_moment,
    },
)
