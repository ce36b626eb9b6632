import difflib
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from policy_cases import PAIRED, POLICY_NAMES, equivalents
from policy_cases import build as build_quietly
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.recipes import speed as recipes
from speedit_plugins.registry import (
    DENSITIES,
    DRAWS,
    POLICIES,
    WEIGHTINGS,
    Registry,
    build,
    nearest,
)

LINEAR = NoiseSchedule.linear()


# Parameters that a part needs.
NEEDED: dict[str, dict[str, Any]] = {
    "mixture": {"laws": ["uniform", "logit_normal"], "shares": [0.5, 0.5]},
    "stages": {"laws": ["uniform", "logit_normal"], "until": [10]},
    "table": {"points": [[0, 1], [1, 2]]},
}

# Configs name these, so none of them may disappear.
PUBLISHED = {
    DENSITIES: "uniform thinned asymmetric logit_normal log_snr_normal clts loss_second_moment mode cosmap"
    " beta u_shaped laplace cauchy loss_balanced info_noise adaptive mixture stages table auto",
    WEIGHTINGS: "constant change_aware p2 min_snr inverse_density soft_min_snr debiased truncated_snr edm"
    " sigma_sqrt cosmap bell uncertainty table",
    DRAWS: "iid paired",
    POLICIES: "uniform speedit speedit_reference speed speed_reference open_sora_speed spectral spectral_fast"
    " spectral_flow auto p2 min_snr logit_normal clts loss_second_moment mode cosmap beta u_shaped jit"
    " laplace cauchy edm edm2 soft_min_snr debiased truncated_snr sigma_sqrt bell loss_balanced info_noise"
    " adaptive uncertainty",
}


@pytest.mark.parametrize("registry", PUBLISHED, ids=lambda registry: registry.name)
def test_published_names_stay(registry: Registry) -> None:
    assert set(PUBLISHED[registry].split()) <= set(registry.module_dict)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("zzz", POLICIES),
        ({"density": "zzz", "weighting": "p2"}, DENSITIES),
        ({"density": "uniform", "weighting": "zzz"}, WEIGHTINGS),
        ({"density": "uniform", "weighting": "p2", "draw": "zzz"}, DRAWS),
    ],
)
def test_an_unknown_name_lists_all_known_ones(config: Any, names: Registry) -> None:
    known = ", ".join(sorted(names.module_dict))
    with pytest.raises(ValueError, match=f"unknown {names.name} 'zzz'; known: {known}$"):
        build_policy(config, LINEAR)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_name_a_dict_and_its_recipe_are_one_policy(name: str) -> None:
    recipe = POLICIES.module_dict[name]
    composed = recipe(LINEAR) if name in ("speed_reference", "auto") else recipe()
    by_name = build_quietly(name, LINEAR)
    for config in ({"type": name}, ConfigDict(type=name), composed):
        policy = build_quietly(config, LINEAR)
        assert torch.equal(policy.density, by_name.density)
        assert torch.equal(policy.weight, by_name.weight)
        assert policy.scope == by_name.scope
        assert torch.equal(policy.density_for(3), by_name.density_for(3))


class TestPartsOfANamedPolicy:
    def test_a_part_replaces_the_recipes(self) -> None:
        policy = build_policy({"type": "speed", "k": 3.0, "weighting": "constant"}, LINEAR)
        assert torch.equal(policy.density, build_policy({"type": "speed", "k": 3.0}, LINEAR).density)
        assert torch.equal(policy.weight, torch.ones_like(policy.weight))
        assert policy.name == "speed with weighting constant"

    def test_without_a_type_it_changes_parameters(self) -> None:
        by_part = build_policy({"type": "speedit", "weighting": {"gamma": 0.5}}, LINEAR)
        assert torch.equal(by_part.weight, build_policy({"type": "speedit", "gamma": 0.5}, LINEAR).weight)

    def test_draw_and_scope(self) -> None:
        policy = build_policy({"type": "uniform", "draw": "paired", "scope": "loss"}, LINEAR)
        assert policy.scope == "loss"
        assert torch.equal(
            policy.density_for(4),
            build_policy(
                {"density": "uniform", "weighting": "constant", "draw": "paired"}, LINEAR
            ).density_for(4),
        )

    @pytest.mark.parametrize(
        "config",
        [
            {"type": "speed", "k": 3.0, "density": "uniform"},
            {"type": "p2", "k": 3.0, "weighting": {"k": 2.0}},
        ],
    )
    def test_a_parameter_of_the_replaced_part_is_refused(self, config: Any) -> None:
        with pytest.raises(ValueError, match=f"policy '{config['type']}': k has no effect beside "):
            build_policy(config, LINEAR)

    def test_a_recipes_own_parameter_comes_first(self) -> None:
        def weighed(*, weighting: str = "half", stratified: int = 0) -> dict[str, Any]:
            assert stratified == 2
            return {"density": "uniform", "weighting": {"half": "p2"}.get(weighting, "constant")}

        POLICIES.register_module(name="weighed", module=weighed)
        try:
            policy = build_policy({"type": "weighed", "weighting": "half", "stratified": 2}, LINEAR)
        finally:
            POLICIES.module_dict.pop("weighed")
        assert torch.equal(policy.weight, build_policy("p2", LINEAR).weight)
        assert not policy.stratified


@pytest.mark.parametrize("density", sorted(DENSITIES.module_dict))
@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS.module_dict))
@pytest.mark.parametrize("draw", sorted(DRAWS.module_dict))
def test_any_density_weighting_and_draw_compose(density: str, weighting: str, draw: str) -> None:
    parts = {
        "density": {"type": density, **NEEDED.get(density, {})},
        "weighting": {"type": weighting, **NEEDED.get(weighting, {})},
        "draw": {"type": draw},
    }
    policy = build_quietly(parts, LINEAR)
    assert policy.name == "custom"
    assert float(policy.density.sum()) == pytest.approx(1.0)
    plain = build_quietly({**parts, "draw": "iid"}, LINEAR)
    assert torch.equal(policy.density_for(1), plain.density)


def test_parts_take_parameters_and_a_scope() -> None:
    policy = build_policy(
        {
            "density": {"type": "thinned", "k": 2.0, "tau": 100},
            "weighting": {"type": "p2", "gamma": 0.5},
            "scope": "loss",
            "stratified": True,
            "normalize": True,
        },
        LINEAR,
    )
    assert (policy.scope, policy.boundary_index) == ("loss", 100)
    assert policy.mean_weight == pytest.approx(1.0)
    assert_close(policy.weight / policy.weight[0], ((1 + LINEAR.snr) / (1 + LINEAR.snr[0])) ** -0.5)


def test_parameters_of_named_policies_reach_their_parts() -> None:
    assert build_policy({"type": "speed", "tau": 123}, LINEAR).boundary_index == 123
    snr = float(LINEAR.snr[49])
    assert build_policy({"type": "speed", "snr_boundary": snr}, LINEAR).boundary_index == 50
    assert float(build_policy({"type": "speed", "lam": 0.9}, LINEAR).weight.max()) == pytest.approx(0.9)
    assert float(build_policy({"type": "min_snr", "gamma": 1.0}, LINEAR).weight[0]) == pytest.approx(
        1 / 9999, rel=1e-3
    )
    lower = build_policy({"type": "speedit", "threshold": 0.5, "gamma": 2.0, "k": 2.0}, LINEAR)
    assert lower.boundary_index == LINEAR.flat_index(0.5) + 1
    assert_close(lower.weight, (2 + LINEAR.snr) ** -2)


def test_build_does_not_change_its_config() -> None:
    config: dict[str, Any] = {"type": "speed", "k": 3.0, "normalize": True, "equivalent_to": "epsilon"}
    parts: dict[str, Any] = {"density": {"type": "thinned", "k": 3.0}, "weighting": {"type": "p2"}}
    before = [dict(config), {key: dict(value) for key, value in parts.items()}]
    build_policy(config, LINEAR)
    build_policy(parts, LINEAR)
    assert [config, parts] == before


def test_a_plugin_registers_its_own_by_a_call() -> None:
    def last_only(schedule: NoiseSchedule, *, mass: float = 1.0) -> Density:
        table = torch.zeros(schedule.num_timesteps, dtype=torch.float64)
        table[-1] = mass
        return Density(table)

    def half(density: Tensor) -> Tensor:
        return torch.full_like(density, 0.5)

    DENSITIES.register_module(name="last_only", module=last_only)
    WEIGHTINGS.register_module(name="half", module=half)
    try:
        policy = build_policy({"density": "last_only", "weighting": "half"}, LINEAR)
        assert set(policy.draw(16).index.tolist()) == {999}
        assert policy.mean_weight == 0.5
    finally:
        DENSITIES.module_dict.pop("last_only")
        WEIGHTINGS.module_dict.pop("half")


def test_build_passes_what_the_caller_gives_only_where_it_fits() -> None:
    registry = Registry("thing")
    registry.register_module(name="plain", module=lambda *, size: size)
    registry.register_module(name="aware", module=lambda schedule, *, size=2: (schedule, size))
    registry.register_module(name="open", module=lambda **options: options)
    assert build(registry, {"type": "plain", "size": 3}, schedule="s") == 3
    assert build(registry, "aware", schedule="s") == ("s", 2)
    assert build(registry, {"type": "open", "a": 1}, schedule="s") == {"a": 1}


def test_a_registry_has_the_calls_that_users_of_mmengine_know() -> None:
    shapes = Registry("shape")

    @shapes.register_module()
    class Square:
        def __init__(self, *, side: int = 1) -> None:
            self.side = side

    @shapes.register_module(name="dot")
    def point() -> str:
        return "."

    assert shapes.get("Square") is Square
    assert shapes.get("Circle") is None
    assert shapes.build({"type": "Square", "side": 3}).side == 3
    assert (point(), shapes.build("dot")) == (".", ".")
    with pytest.raises(ValueError, match=r"shape 'Square' side needs int, got 'x'"):
        shapes.build({"type": "Square", "side": "x"})
    with pytest.raises(ValueError, match=r"needs a name, got <class .*a decorator has brackets"):
        shapes.register_module(Square)  # type: ignore[arg-type]  # what a decorator without brackets calls


def test_a_name_has_one_module_unless_it_is_forced() -> None:
    shapes = Registry("shape")
    shapes.register_module(name="square", module=dict)
    shapes.register_module(name="square", module=dict)
    with pytest.raises(ValueError, match="register the shape 'square': builtins.dict and builtins.list"):
        shapes.register_module(name="square", module=list)
    shapes.register_module(name="square", module=list, force=True)
    # Ours may be imported after the one that replaces it.
    shapes.register_module(name="square", module=dict)
    assert shapes.get("square") is list


def test_the_same_lines_read_again_are_no_second_module() -> None:
    shapes, lines = Registry("shape"), "class Square: ...\n"
    for _ in range(2):
        scope: dict[str, Any] = {"__name__": "shapes"}
        exec(lines, scope)
        shapes.register_module(module=scope["Square"])
    assert shapes.get("Square") is scope["Square"]


def test_nearest_names_the_closest_or_nothing() -> None:
    assert nearest("logit_norml", ["logit_normal", "uniform"]) == "; did you mean 'logit_normal'?"
    assert nearest("digits", ["ImageFolder", "Digits"]) == "; did you mean 'Digits'?"
    assert nearest("DIT", ["DiT", "Latte"]) == "; did you mean 'DiT'?"
    assert nearest("xyz", ["logit_normal", "uniform"]) == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("speedi", r"unknown policy 'speedi'; did you mean 'speedit'\?; known: .*clts, "),
        ({"type": "speed", "kk": 5.0}, r"policy 'speed' has no parameter 'kk'; did you mean 'k'\?; known: "),
        ({"type": "speed", "lamb": 0.6}, r"'lamb'; did you mean 'lam'\?"),
        ({"type": "speed", "normalise": True}, r"did you mean 'normalize'\?; known: density, draw, equi"),
        ({"type": "uniform", "density": "thined"}, r"unknown density 'thined'; did you mean 'thinned'\?"),
        ({"type": "speed", "weighting": {"gamma": 2}}, r"weighting 'change_aware' has no parameter 'gamma'"),
        ({0: 1}, r"the keys of a config need to be names, got 0 in \{0: 1\}"),
        ({"density": {"type": "thinned", 1: 2}, "weighting": "p2"}, r"need to be names, got 1 in"),
        ({"density": "uniform", "weighting": {"type": ["p2"]}}, r"unknown weighting \"\['p2'\]\""),
        ({"type": "speed", "lam": 5}, r"lam in \[0.5, 1\], got 5"),
        ({"type": "speed", "k": 0}, "k > 0, got 0"),
        ({"type": "speed", "tau": 1001}, r"tau needs to be an index in \(0, 1000\], got 1001"),
        ({"type": "speed", "tau": 700, "snr_boundary": 0.01}, "give tau or snr_boundary, got both"),
        (
            {"type": "min_snr", "equivalent_to": "host"},
            "always converts from the epsilon loss: leave out equivalent_to='host'",
        ),
        (
            {"type": "edm", "equivalent_to": "epsilon"},
            "edm always converts from the x0 loss: leave out equivalent_to='epsilon'",
        ),
        ({"type": "speed", "equivalent_to": "v"}, "equivalent_to needs 'host' or 'epsilon', got 'v'"),
        (
            {"density": "logit_norml", "weighting": "constant"},
            r"unknown density 'logit_norml'; did you mean 'logit_normal'\?; known: .*asymmetric, ",
        ),
        ({"density": "uniform", "weighting": "constnt"}, r"unknown weighting .*did you mean 'constant'\?"),
        (
            {"density": "uniform", "weighting": "constant", "draw": "pair"},
            r"unknown draw 'pair'; did you mean 'paired'\?; known: .*iid, ",
        ),
        ({"density": "uniform"}, r"needs type=NAME, or density=... and weighting=.*got keys \['density'\]"),
        ({}, r"got keys \[\]"),
        (
            {"density": "uniform", "weigting": "constant"},
            r"got keys \['density', 'weigting'\]; did you mean 'weighting'\?",
        ),
        ({"density": {"k": 5}, "weighting": "p2"}, r"a density config needs a type, got keys \['k'\]; known"),
        ({"density": "uniform", "weighting": "constant", "scope": "all"}, "scope needs 'mse' or 'loss'"),
        (
            {"density": {"type": "uniform", "schedule": 3}, "weighting": "constant"},
            "density 'uniform' has no parameter 'schedule'",
        ),
    ],
)
def test_a_bad_config_says_what_is_wrong(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_policy(config, LINEAR)


def test_a_missing_parameter_is_named() -> None:
    registry = Registry("thing")
    registry.register_module(name="box", module=lambda *, width, height, depth=1: (width, height, depth))
    with pytest.raises(ValueError, match=r"thing 'box' needs height, got \['width'\]"):
        build(registry, {"type": "box", "width": 2})


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_prediction_type_is_checked_for_every_policy(name: str) -> None:
    with pytest.raises(ValueError, match="prediction_type needs one of epsilon, x0, v, flow, got 'noise'"):
        build_quietly(name, LINEAR, "noise")


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_common_options_reach_every_policy(name: str) -> None:
    common: dict[str, Any] = {"normalize": True, "equivalent_to": equivalents(name)[-1]}
    if name not in PAIRED:
        common["stratified"] = True
    policy = build_quietly({"type": name, **common}, LINEAR, "v")
    assert policy.mean_weight == pytest.approx(1.0)


def test_recipes_are_fresh_each_time() -> None:
    first = recipes.speed()
    first["density"]["k"] = 1e9
    assert recipes.speed()["density"]["k"] == 5.0


def test_the_nearest_of_a_policy_name_is_a_policy() -> None:
    # A letter less turns `edm2` into another policy.
    for typed in {name[:-1] for name in POLICY_NAMES} - set(POLICY_NAMES):
        suggestion = difflib.get_close_matches(typed, POLICY_NAMES, n=1)
        with pytest.raises(ValueError, match=suggestion[0]):
            build_policy(typed, LINEAR)
