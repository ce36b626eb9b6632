import inspect
import re
from pathlib import Path

import inspect_policy
import pytest
from host_flags import host_configs, split_hosts

from speedit_plugins.hosts.laws.laws import HOSTS, host_config


def test_names_and_flags_that_are_not_known() -> None:
    for flags, message in (
        (
            {"discrete_shift": 3.0},
            "did you mean 'discrete_flow_shift'?; known: ",
        ),
        (
            {"timestep_sampling": "shfit"},
            "needs one of sigma, uniform, sigmoid, shift, flux_shift, got",
        ),
        ({"sigmoid_scale": "big"}, "sigmoid_scale needs float, got 'big'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            host_config("sd-scripts", flags)
    with pytest.raises(ValueError, match="unknown host 'musubi'; did you mean 'musubi-tuner'"):
        host_config("musubi", {})
    with pytest.raises(ValueError, match="needs height, width and num_frames"):
        host_config("open-sora-1.2", {"use_timestep_transform": True})
    with pytest.raises(ValueError, match="content with timestep_type sigmoid has no config"):
        host_config("ai-toolkit", {"content_or_style": "content"})
    with pytest.raises(ValueError, match="uniform or logit-normal_MEAN_STD, got 'lognormal'"):
        host_config("rae", {"time_dist_type": "lognormal"})


def test_no_flag_of_a_host_is_an_option_of_the_command() -> None:
    usage = inspect_policy._parser().format_usage()
    own = {option.replace("-", "_") for option in re.findall(r"--([a-z-]+)", usage)}
    assert "plot" in own
    for name, host in HOSTS.module_dict.items():
        assert not own & set(inspect.signature(host).parameters), name


def test_every_host_names_the_code_that_was_read() -> None:
    for name, host in HOSTS.module_dict.items():
        source = (inspect.getdoc(host) or "").partition("Source: ")[2]
        assert re.match(r"[\w-]+/[\w.-]+[ ,]", source), name
        assert ".py" in source, name


def test_blocks_end_at_the_next_host_or_option_of_the_command() -> None:
    typed = "--host a --x 1 --y --host b --policy p --host=c -0.5 --plot f.png"
    rest, blocks = split_hosts(typed.split(), ["--policy", "--plot"])
    assert rest == ["--policy", "p", "--plot", "f.png"]
    assert blocks == [["a", "--x", "1", "--y"], ["b"], ["c", "-0.5"]]


def test_flags_as_they_are_typed() -> None:
    typed = ["--flow-schedule-shift=0", "--flow_use_beta_schedule", "--flow_beta_schedule_alpha", "1e-1"]
    config = host_configs([["simpletuner", *typed], ["simpletuner", "--flow_sigmoid_scale", "2"]])
    assert config == {
        "simpletuner 0 1e-1": {
            "density": {"type": "beta", "a": 0.1, "b": 2.0},
            "weighting": "constant",
        },
        "simpletuner 2": {
            "density": {"type": "logit_normal", "std": 2.0},
            "weighting": "constant",
            "shift": 3.0,
        },
    }
    with pytest.raises(ValueError, match="needs flags as --name value, got 'Linear'"):
        host_configs([["sit", "Linear"]])


def test_the_documentation_shows_every_host_and_its_own_command() -> None:
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \|", page, re.MULTILINE)
    assert set(HOSTS.module_dict) <= set(rows)
    figures = pytest.importorskip("docs_site.figures")
    # The figure is drawn by the command beside it.
    typed = " ".join(page.replace("\\\n", " ").split())
    assert f"tools/inspect_policy.py {figures.COMPARED} --plot" in typed
