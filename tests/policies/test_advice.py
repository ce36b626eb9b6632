"""The warning about a policy of noise prediction on a flow or a model of v, and the figures that it names."""

import re
import warnings
from pathlib import Path

import pytest

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies import advice

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
    for schedule, predicted in ((FLOW, "flow"), (LINEAR, "v")):
        (told,) = warned(name, schedule, predicted)
        assert repr(name) in told
        assert advice.TAKE[predicted] in told
        assert (ROOT / advice.REPORT).is_file()
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
    assert "| spectral_flow | 1.31 " in flows
    assert of_v.split("|")[3].split()[0] == "2.25"
    for predicted, figure in (("flow", "1.31"), ("v", "2.25")):
        assert figure in advice.TAKE[predicted]


@pytest.mark.parametrize(
    ("config", "schedule", "predicted"),
    [
        ("speedit", LINEAR, "epsilon"),
        ("speedit", LINEAR, "x0"),
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
