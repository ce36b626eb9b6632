"""Builds a timestep policy from a config."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from speedit_plugins.policies.densities import transforms
from speedit_plugins.policies.densities.composed import Law
from speedit_plugins.policies.draws import Paired
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.recommended import RECOMMENDED, recommended
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.policies.weightings import conversion
from speedit_plugins.policies.weightings.learned import AdaptiveWeighting
from speedit_plugins.policies.weightings.loss_normalized import LossNormalizedPolicy
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

# Keys of every policy config, and keys of a policy made of parts. Others are parameters of a named policy.
_COMMON_KEYS = ("stratified", "normalize", "equivalent_to", *transforms.KEYS)
_PART_KEYS = ("density", "weighting", "draw", "scope")


def build_policy(
    config: str | Config | None,
    schedule: NoiseSchedule,
    prediction_type: str | None = None,
    *,
    data_spectrum: Callable[[], DataSpectrum] | None = None,
) -> TimestepPolicy:
    """The timestep policy that a config describes, for this noise schedule.

    Args:
        config: a registered name, `"speed"`; a name with parameters, `dict(type="speed", k=3.0)`; or parts,
            `dict(density=..., weighting=..., draw=..., scope=...)`. Density, weighting and draw are again
            names or mappings with `type`. Beside a name a part replaces the name's own part,
            `dict(type="speed", weighting="constant")`; without `type` it changes parameters of it. Parameters
            of the named policy come before parts and options of the same name. None and the name
            "recommended" mean what `recommended` says. The options:

            - stratified: see `TimestepPolicy`.
            - normalize: true, see `TimestepPolicy`, or "loss", see `LossNormalizedPolicy`.
            - shift: moves the draws towards noise, see `transforms.shifted`. A number, or a mapping with the
              type flux, linear, pixels or dimension, which takes it from the size of the data.
            - window: two bounds of u, or a mapping, see `transforms.Window`.
            - equivalent_to: "host" (default) multiplies the model's own loss by the weights. "epsilon" first
              converts them, for the objective of a noise-predicting model. Weightings that are meant for one
              type's loss, such as `min_snr` and `edm`, are always converted.
        schedule: the noise schedule that the model is trained on.
        prediction_type: what the model predicts: epsilon, x0, v or flow. None is epsilon on a
            variance-preserving schedule and flow on a rectified flow. Converted weights depend on it, and
            densities that learn the error of epsilon.
        data_spectrum: returns the spectrum of the data. Called only if a density needs it and the config does
            not give its `mean`.

    Raises:
        ValueError: an unknown name or parameter (the message lists the known ones), a bad value, or one that
            a part leaves without effect; or no `prediction_type` where it matters, on a schedule that is
            neither of these two.

    Example:
        >>> schedule = NoiseSchedule.linear(1000)
        >>> policy = build_policy({"type": "speed", "k": 3.0}, schedule)
        >>> round(float(policy.density[0] / policy.density[-1]), 6)
        3.0
        >>> parts = {"density": "logit_normal", "weighting": {"type": "p2", "gamma": 0.5}}
        >>> build_policy(parts, schedule).draw(4).index.shape
        torch.Size([4])
        >>> print(build_policy({"type": "speed", "weighting": "constant"}, schedule))
        speed with weighting constant: boundary 700 of 1000 timesteps, mean weight 1.0000
    """
    if prediction_type is not None:
        conversion.check_prediction_type(prediction_type)
    _check_arguments(config, schedule, data_spectrum)
    options = options_of(config if config is not None else RECOMMENDED)
    if options.get("type") == RECOMMENDED:
        options["type"] = recommended(prediction_type or conversion.usual_prediction_type(schedule))
    name, parts, common = _name_parts_and_options(options, schedule, prediction_type)
    given = {"data_spectrum": data_spectrum, "prediction_type": prediction_type}
    return _composed(name, parts, common, schedule, given)


def _composed(
    name: str,
    parts: Mapping[str, Any],
    common: dict[str, Any],
    schedule: NoiseSchedule,
    given: Mapping[str, Any],
) -> TimestepPolicy:
    """A policy of these parts, with the options of every policy. `given` are arguments for the density."""
    check_type("policy stratified", common.get("stratified", False), bool)
    kind, common["normalize"] = _normalized(common.get("normalize", False))
    _check_parts(parts)
    changes = {key: common.pop(key) for key in transforms.KEYS if key in common}
    if changes:
        shown = (f"{key} {_name_of(value)}" for key, value in changes.items())
        name = f"{name} with {' and '.join(shown)}"
    law = _build_law(parts["density"], schedule, given)
    draw = build(DRAWS, parts.get("draw", "iid"), schedule=schedule)
    moved = [key for key in transforms.KEYS if key in changes or _has_key(parts["density"], key)]
    if moved and isinstance(draw, Paired):
        raise ValueError(f"{' and '.join(moved)} needs a policy with independent draws, got pairs")
    weighting = _weighting(
        parts["weighting"], schedule, given["prediction_type"], common.pop("equivalent_to", None)
    )
    return kind(
        schedule,
        transforms.transformed(law, changes, schedule),
        weighting,
        draw=draw,
        name=name,
        scope=parts.get("scope", "mse"),
        **common,
    )


def _has_key(law: Any, key: str) -> bool:
    """Whether the config of a density, or of one that it is made of, has this key."""
    options = law if isinstance(law, Mapping) else {}
    return key in options or any(_has_key(part, key) for part in options.get("laws", ()))


def _build_law(config: str | Config, schedule: NoiseSchedule, given: Mapping[str, Any]) -> Law:
    """The density that a config describes, with its transforms. It may be made of other densities."""
    options = options_of(config) if isinstance(config, str | Mapping) else {"type": config}
    builder = DENSITIES.get(str(options.get("type")))
    own = () if builder is None else inspect.signature(builder).parameters
    changes = {key: options.pop(key) for key in transforms.KEYS if key in options and key not in own}
    if builder is None:
        _refuse_policy(options, schedule, given["prediction_type"])
    law: Law = build(
        DENSITIES,
        options,
        also=transforms.KEYS,
        schedule=schedule,
        build_law=lambda part: _build_law(part, schedule, given),
        **given,
    )
    return transforms.transformed(law, changes, schedule)


def _refuse_policy(options: Config, schedule: NoiseSchedule, prediction_type: str | None) -> None:
    """Raises ValueError if the config of a density names a policy. The message has that policy's density."""
    if POLICIES.get(str(options.get("type"))) is None:
        return
    instead = "the density of that policy"
    with suppress(ValueError):
        recipe = build(POLICIES, options, schedule=schedule, prediction_type=prediction_type)
        density = options_of(recipe.get("density", "uniform"))
        shown = {key: value for key, value in density.items() if value is not None}
        instead = f"what it draws by, {shown}"
    raise ValueError(f"{options['type']!r} is a policy, and a density is wanted here: take {instead}")


def _refuse_part(name: str) -> None:
    """Raises ValueError if the name of a policy is that of a density or a weighting alone."""
    if POLICIES.get(name) is not None:
        return
    config = f"dict(type={name!r}, ...)"
    for registry, policy in (
        (DENSITIES, f"dict(density={config}, weighting='constant')"),
        (WEIGHTINGS, f"dict(density='uniform', weighting={config})"),
    ):
        if registry.get(name) is not None:
            raise ValueError(
                f"{name!r} is a {registry.name}, and a policy is wanted here: give both parts, {policy}"
            )


def _check_arguments(config: Any, schedule: Any, data_spectrum: Any) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"a policy needs a NoiseSchedule, such as NoiseSchedule.from_betas(betas), got {type(schedule)}"
        )
    if not (config is None or isinstance(config, str | Mapping)):
        raise ValueError(f"a policy needs a name or a mapping, got {config!r}")
    if not (data_spectrum is None or callable(data_spectrum)):
        raise ValueError(f"data_spectrum needs a function that returns a spectrum, got {type(data_spectrum)}")


def _name_parts_and_options(
    options: dict[str, Any], schedule: NoiseSchedule, prediction_type: str | None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The policy's name, its parts, and the options that every policy takes. A name becomes its recipe."""

    def recipe_of(config: Config) -> dict[str, Any]:
        also = (*_PART_KEYS, *_COMMON_KEYS)
        parts = build(POLICIES, config, also=also, schedule=schedule, prediction_type=prediction_type)
        return dict(parts)

    if "type" not in options:
        common = {key: options.pop(key) for key in _COMMON_KEYS if key in options}
        return "custom", options, common
    name = str(options["type"])
    _refuse_part(name)
    own = _parameters(name)
    common = {key: options.pop(key) for key in _COMMON_KEYS if key in options and key not in own}
    given = {key: options.pop(key) for key in _PART_KEYS if key in options and key not in own}
    parts = _with_parts(recipe_of(options), given)
    if given:
        _check_effects(options, given, recipe_of)
        name = f"{name} with {', '.join(f'{key} {_name_of(parts[key])}' for key in given)}"
    # The config's options win over those of the recipe.
    return name, parts, {**{key: parts.pop(key) for key in _COMMON_KEYS if key in parts}, **common}


def _check_effects(options: Config, given: Config, recipe_of: Callable[[Config], dict[str, Any]]) -> None:
    """Raises ValueError if a named policy's parameter only changes what a config's parts replace."""
    name, recipe = str(options["type"]), recipe_of(options)
    for key, parameter in _parameters(name).items():
        if key not in options or parameter.default is inspect.Parameter.empty:
            continue
        without = recipe_of({k: value for k, value in options.items() if k != key})
        if without != recipe and _with_parts(without, given) == _with_parts(recipe, given):
            raise ValueError(
                f"policy {name!r}: {key} has no effect beside {' and '.join(given)}: leave one of them out"
            )


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """The recipe's own parameters; none if nothing is registered under this name."""
    recipe = POLICIES.get(name)
    return {} if recipe is None else inspect.signature(recipe).parameters


def _with_parts(recipe: Config, given: Config) -> dict[str, Any]:
    """A recipe with a config's parts. One without `type` only changes parameters of the recipe's part."""
    parts = {"draw": "iid", **recipe}
    for key, part in given.items():
        changes = isinstance(part, Mapping) and "type" not in part and key in parts
        parts[key] = {**options_of(parts[key]), **part} if changes else part
    return parts


def _check_parts(parts: Mapping[str, Any]) -> None:
    unknown = [key for key in parts if key not in _PART_KEYS]
    if unknown or "density" not in parts or "weighting" not in parts:
        known = [*_PART_KEYS, *_COMMON_KEYS]
        raise ValueError(
            f"a policy needs type=NAME, or density=... and weighting=...; got keys {sorted(parts)}"
            f"{nearest(unknown[0], known) if unknown else ''}; known: type, {', '.join(known)}"
        )


def _normalized(value: Any) -> tuple[type[TimestepPolicy], bool]:
    """The policy class for a config's `normalize`, and whether to divide the weights by their mean."""
    if value == "loss":
        return LossNormalizedPolicy, True
    if not isinstance(value, bool):
        raise ValueError(f"policy normalize needs true, false or 'loss', got {value!r}")
    return TimestepPolicy, value


def _weighting(
    config: str | Config, schedule: NoiseSchedule, prediction_type: str | None, equivalent_to: str | None
) -> "_Weighting | AdaptiveWeighting":
    builder = WEIGHTINGS.module_dict.get(_name_of(config))
    fixed = _Weighting(config, schedule, prediction_type, equivalent_to)
    if not (isinstance(builder, type) and issubclass(builder, AdaptiveWeighting)):
        return fixed
    # Learned from the model's own loss, so both values of equivalent_to mean the same objective.
    learned: AdaptiveWeighting = build(WEIGHTINGS, config, schedule=schedule)
    return learned


class _Weighting:
    """The function from the density table (T,) to the weights (T,) that a weighting config describes."""

    def __init__(
        self,
        config: str | Config,
        schedule: NoiseSchedule,
        prediction_type: str | None,
        equivalent_to: str | None,
    ) -> None:
        if equivalent_to not in (None, "host", "epsilon"):
            raise ValueError(f"equivalent_to needs 'host' or 'epsilon', got {equivalent_to!r}")
        function = WEIGHTINGS.module_dict.get(_name_of(config))
        defined_on = getattr(function, "defined_on", None)
        if defined_on and equivalent_to not in (None, defined_on):
            raise ValueError(
                f"{_name_of(config)} always converts from the {defined_on} loss: leave out"
                f" equivalent_to={equivalent_to!r}"
            )
        self._config = config
        self._schedule = schedule
        self._source = defined_on or ("epsilon" if equivalent_to == "epsilon" else None)
        self._target = ""
        if self._source is not None:
            self._target = prediction_type or conversion.usual_prediction_type(schedule)

    def __call__(self, density: Tensor) -> Tensor:
        weight: Tensor = build(WEIGHTINGS, self._config, schedule=self._schedule, density=density)
        if self._source is None:
            return weight
        return conversion.converted(weight, self._schedule, self._target, source=self._source)


def _name_of(config: Any) -> str:
    return str(config.get("type") if isinstance(config, Mapping) else config)
