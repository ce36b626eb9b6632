"""The accelerations that benchmarks/compose compares, as changes of a config, and how they are combined.

An arm is a name: `base`, or parts joined by "+", such as `auto` or `muon+contrastive+auto`. `auto` draws the
timesteps by that policy, where every other arm draws them uniformly.

The numbers are those of the papers, scaled to a model of `DEPTH` blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.overrides import merged
from speedit_plugins.registry import nearest

Overrides = dict[str, Any]

BASE, AUTO, JOINT = "base", "auto", "+"
FLOW, EPSILON = "flow", "epsilon"
WIDTH, DEPTH, NUM_HEADS = 128, 6, 4


@dataclass(frozen=True)
class Acceleration:
    """A change of the training beside the timesteps.

    Args:
        overrides: keys of a config, merged into the base's section by section.
        processes: where it makes sense.
        has_teacher: it trains with the embedded ImageNet network, so that network must not judge it.
        until: share of the horizon after which it is off. A step then costs less.
        until_key: the key that has the step at which it goes off.
        patch_factor: how many times as wide patches are: a quarter of the tokens with 2.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    processes: tuple[str, ...] = (FLOW, EPSILON)
    has_teacher: bool = False
    until: float = 1.0
    until_key: tuple[str, ...] = ()
    patch_factor: int = 1


# The release's projector is 2048 wide, for models of 1152: as wide here, it would be larger than the model.
_REPA = {"type": "REPA", "teacher": "embedded", "layer": 2, "weight": 0.5, "projector_width": 2 * WIDTH}
ACCELERATIONS: Mapping[str, Acceleration] = {
    "contrastive": Acceleration({"contrastive": {"weight": 0.05}}),
    "muon": Acceleration({"optimizer": {"type": "Muon"}}),
    "blocks": Acceleration({"model": {"norm": "rms", "qk_norm": True, "rope": True, "perceptron": "swiglu"}}),
    "routing": Acceleration({"routing": {"from": 1, "to": -2, "keep": 0.5}}),
    "repa": Acceleration({"alignment": _REPA}, has_teacher=True),
    "repa_early": Acceleration(
        {"alignment": _REPA}, has_teacher=True, until=0.4, until_key=("alignment", "until")
    ),
    "sra": Acceleration({"alignment": {"type": "SRA", "layer": 2}}),
    "mdt": Acceleration(
        {"model": {"type": "MDTv2", "decode_layer": 2}, "masking": {"type": "MDT", "ratio": 0.3}}
    ),
    "noise": Acceleration({"noise_assignment": "batch"}),
    "uncertainty": Acceleration({"uncertainty": True}),
    "x0": Acceleration({"diffusion": {"prediction_type": "x0"}}, processes=(FLOW,)),
    # The loss of a velocity weighs x_0 by 1 / t^2; with p2 by 1 / (t^2 + (1 - t)^2), so nearly evenly.
    "x0_p2": Acceleration(
        {"diffusion": {"prediction_type": "x0", "policy": {"weighting": "p2"}}}, processes=(FLOW,)
    ),
    "patches": Acceleration(patch_factor=2),
}
# What the stack is made of, unless the command line says otherwise.
STACK = ("contrastive", "muon", "blocks", "routing", "repa")


@dataclass(frozen=True)
class Arm:
    """A combination of accelerations, with or without `auto`. ValueError for an unknown or repeated part."""

    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (*ACCELERATIONS, AUTO)
        for part in self.parts:
            if part not in known:
                raise ValueError(
                    f"unknown acceleration {part!r}{nearest(part, known)}; known: {', '.join(known)}"
                )
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"an arm has each acceleration once, got {self.name}")

    @classmethod
    def named(cls, name: str) -> "Arm":
        """The arm of a name; parts are put into the order of `ACCELERATIONS`, `auto` last."""
        if name == BASE:
            return cls()
        order = {part: place for place, part in enumerate((*ACCELERATIONS, AUTO))}
        parts = name.split(JOINT)
        return cls(tuple(sorted(parts, key=lambda part: order.get(part, -1))))

    @property
    def name(self) -> str:
        """`base`, or the parts joined by "+"."""
        return JOINT.join(self.parts) or BASE

    @property
    def is_auto(self) -> bool:
        """Whether `auto` draws the timesteps."""
        return AUTO in self.parts

    @property
    def accelerations(self) -> tuple[str, ...]:
        """The parts without `auto`."""
        return tuple(part for part in self.parts if part != AUTO)

    @property
    def has_teacher(self) -> bool:
        """Whether the ImageNet network takes part in the training."""
        return any(ACCELERATIONS[part].has_teacher for part in self.accelerations)

    @property
    def until(self) -> float:
        """Share of the horizon after which a step costs less; 1 if all steps cost the same."""
        return min((ACCELERATIONS[part].until for part in self.accelerations), default=1.0)

    def fits(self, process: str) -> bool:
        """Whether every part makes sense on this process."""
        return all(process in ACCELERATIONS[part].processes for part in self.accelerations)

    def config(self, base: Mapping[str, Any], horizon: int) -> Overrides:
        """The config of a training of `horizon` steps: the base's with the arm's keys."""
        found = merged(base, {})
        for part in self.accelerations:
            acceleration = ACCELERATIONS[part]
            found = merged(found, acceleration.overrides)
            if acceleration.patch_factor > 1:
                found["model"]["patch_size"] *= acceleration.patch_factor
            if acceleration.until_key:
                content: Any = round(acceleration.until * horizon)
                for key in reversed(acceleration.until_key):
                    content = {key: content}
                found = merged(found, content)
        return merged(found, {"diffusion": {"policy": {"type": AUTO}}}) if self.is_auto else found


def standard_arms(process: str, stack: Sequence[str] = STACK) -> list[Arm]:
    """Every acceleration alone and with `auto`, and the stack, in the order in which they are trained."""
    found = [Arm(), Arm((AUTO,))]
    for parts in [*((name,) for name in ACCELERATIONS), tuple(stack)]:
        arm = Arm.named(JOINT.join(parts))
        found += [arm, Arm((*arm.parts, AUTO))] if parts else []
    return [arm for arm in dict.fromkeys(found) if arm.fits(process)]
