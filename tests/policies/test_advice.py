"""What a user is warned of: a policy of noise prediction on a flow or a model of v, with the figures that the
warning names, and a loop that leaves out a call that its policy needs.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.policies import advice
from speedit_plugins.policies.expected_calls import NUM_DRAWS

ROOT = Path(__file__).parents[2]
FLOW, LINEAR = NoiseSchedule.rectified_flow(1000), NoiseSchedule.linear(1000)


def warned(config: object, schedule: NoiseSchedule, predicted: str | None) -> list[str]:
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        policy = build_policy(config, schedule, predicted)  # type: ignore[arg-type]  # strings and mappings
        advice.warn_if_slow(policy, predicted, config)  # type: ignore[arg-type]  # as above
    return [str(note.message) for note in notes]


@pytest.mark.parametrize(
    "name", ["speedit", "speedit_reference", "speed", "speed_reference", "p2", "min_snr"]
)
def test_one_warning_names_the_report_and_what_to_take(name: str) -> None:
    for schedule, predicted in ((FLOW, "flow"), (LINEAR, "v"), (LINEAR, "x0")):
        if name not in advice._MEASURED[predicted]:
            assert warned(name, schedule, predicted) == []
            continue
        (told,) = warned(name, schedule, predicted)
        assert repr(name) in told
        assert advice.TAKE[predicted] in told
        (report,) = re.findall(r"\((docs/\S+)\); take", told)
        assert (ROOT / report).is_file()
        # Parameters do not make it another policy.
        assert len(warned({"type": name}, schedule, predicted)) == 1


def test_the_figures_are_those_of_the_report() -> None:
    text = (ROOT / advice.REPORT).read_text(encoding="utf-8")
    flows = text.split("## On a rectified flow")[1]
    (of_v,) = re.findall(r"\| v-prediction, over uniform v \|(.*)\|", text)
    for name, row in re.findall(r"\| (\w+) \| (.+?) \|", flows):
        if name in advice._MEASURED["flow"]:
            figure = row.replace("*", "").split(" (")[0]
            assert str(advice._MEASURED["flow"][name]).startswith(figure), name
    assert f"{of_v.split('|')[1].replace('*', '').split(' (')[0].strip()}" == advice._MEASURED["v"]["speedit"]
    of_auto, *_ = re.findall(
        r"\| digits_8 \| classifier \|(.*)\|", (ROOT / advice.FLOW_REPORT).read_text("utf-8")
    )
    assert of_auto.split("|")[3].split()[0] == "1.33"
    (of_x0,) = re.findall(r"\| x0 \| classifier \|(.*)\|", (ROOT / advice.FLOW_REPORT).read_text("utf-8"))
    auto, speedit = (of_x0.split("|")[column].split()[0] for column in (1, 2))
    assert (auto, speedit) == ("1.89", advice._MEASURED["x0"]["speedit"])
    assert auto in advice.TAKE["x0"]
    assert of_v.split("|")[2].split()[0] == "2.17"
    for predicted, figure in (("flow", "1.33"), ("v", "2.17")):
        assert figure in advice.TAKE[predicted]


@pytest.mark.parametrize(
    ("config", "schedule", "predicted"),
    [
        ("speedit", LINEAR, "epsilon"),
        ("min_snr", LINEAR, "x0"),
        ("speedit", FLOW, None),
        ("uniform", FLOW, "flow"),
        ({"type": "spectral_flow", "mean": 0.0}, FLOW, "flow"),
        # Converted weights, or none, were not measured.
        ({"type": "speedit", "equivalent_to": "epsilon"}, LINEAR, "v"),
        ({"type": "speedit", "weighting": "constant"}, FLOW, "flow"),
    ],
)
def test_no_warning(config: object, schedule: NoiseSchedule, predicted: str | None) -> None:
    assert warned(config, schedule, predicted) == []


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ("loss_balanced", ["update"]),
        ("uncertainty", ["update"]),
        ({"type": "uniform", "normalize": "loss"}, ["update"]),
        ("clts", ["advance"]),
        ({"type": "uniform", "window": {"high": 0.5, "start": [0, 1], "steps": 9}}, ["advance"]),
        (
            {
                "density": {"type": "stages", "laws": ["uniform", "info_noise"], "until": [9]},
                "weighting": "constant",
            },
            ["update", "advance"],
        ),
        ("speed", []),
        ({"type": "auto", "mean": 0.0}, []),
        ({"type": "logit_normal", "window": [0, 0.9]}, []),
    ],
)
def test_a_loop_that_never_calls_what_its_policy_needs_is_warned_once(config: Any, needed: list[str]) -> None:
    def told(*called: str) -> list[str]:
        policy = build_policy(config, LINEAR)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            with torch.no_grad():
                _draw_often(policy, NUM_DRAWS)
            assert notes == [], "an evaluation"
            if "update" in called:
                policy.update(torch.tensor([1]), torch.tensor([1.0]))
            if "advance" in called:
                policy.advance()
            _draw_often(policy, NUM_DRAWS - 1)
            assert notes == [], "too early"
            _draw_often(policy, 2 * NUM_DRAWS)
        assert all(note.filename == __file__ for note in notes)
        return [str(note.message) for note in notes]

    for called in ((), ("update",), ("advance",), ("update", "advance")):
        missing = [method for method in needed if method not in called]
        found = told(*called)
        assert len(found) == bool(missing)
        named = " and ".join(f"policy.{method}" for method in missing)
        assert all(f"your loop has not called {named}. In each" in message for message in found)


def _draw_often(policy: TimestepPolicy, times: int) -> None:
    for _ in range(times):
        policy.draw(1)
