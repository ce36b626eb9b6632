"""A small figure of each named policy, drawn from the policy itself: how often, and with what weight."""

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import inspect_policy
import torch
from policy_pictures.figure import LINE_COLORS, over_log_snr_axis, over_time, shade_areas
from policy_pictures.tables import over_log_snr
from torch import Tensor

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.spectrum import DataSpectrum

Prepare = Callable[[TimestepPolicy], None]
# What is drawn of a policy, and how the figure calls it.
TABLES = {
    "density": "how often, uniform = 1",
    "log_snr": "how often, per unit log-SNR",
    "weight": "weight",
}
# The words after `inspect_policy.py` that draw the figure of other trainers' laws in docs/policies.md.
COMPARED = (
    "--policy auto --host sd-scripts --timestep_sampling sigmoid --host diffusers-sd3"
    " --host ltx-2 --seq_length 4096 --host open-sora-2 --num_frames 33 --height 96 --width 96"
)


@dataclass(frozen=True)
class View:
    """How a policy is shown.

    Args:
        schedule: the noise schedule, by its constructor.
        prediction_type: what the model predicts.
        options: parameters that differ from the defaults.
        states: label of a line -> what the policy has been told before it is drawn.
        note: one line below the figure, of what it is shown on.
        is_logarithmic: the axis of the weights is logarithmic.
    """

    schedule: Callable[[], NoiseSchedule] = NoiseSchedule.linear
    prediction_type: str = "epsilon"
    options: Mapping[str, Any] = field(default_factory=dict)
    states: Mapping[str, Prepare] = field(default_factory=lambda: {"": lambda policy: None})
    note: str = "Linear schedule."
    is_logarithmic: bool = False


def _advanced(step: int) -> Prepare:
    return lambda policy: policy.advance(step)


def _told_losses(policy: TimestepPolicy) -> None:
    """Losses that fall from 1 at the clean end to 0.02 at the noisy one, ten of each timestep."""
    index = torch.arange(policy.schedule.num_timesteps).repeat(10)
    policy.update(index, 0.02 + 0.98 * (1 - index / policy.schedule.num_timesteps) ** 4)


def _told_errors(policy: TimestepPolicy) -> None:
    """The least errors of a flow for data of variance 1/4, a hundred of each timestep."""
    schedule = policy.schedule
    error = 0.25 / (1 + 0.25 * schedule.snr) / schedule.sigma**2
    for _ in range(100):
        policy.update(torch.arange(schedule.num_timesteps), error)


def _told_falling(policy: TimestepPolicy) -> None:
    """Losses of a flow that fall most around log-SNR 0: ten rounds, with 400 losses of each timestep."""
    schedule = policy.schedule
    for number in range(400):
        excess = torch.exp(-(schedule.log_snr**2) / 8) * 0.997**number
        policy.update(torch.arange(schedule.num_timesteps), 0.5 + excess)


_FLOW = View(NoiseSchedule.rectified_flow, "flow", note="Rectified flow.")
_OF_V = View(prediction_type="v", note="Linear schedule; weights for a model of v.")
_CENTRED = View(options={"mean": 0.0}, note="Linear schedule; data whose middle is at log-SNR 0.")
_TAUGHT = View(
    NoiseSchedule.rectified_flow,
    "flow",
    states={"": _told_errors},
    note="Rectified flow; the least errors that a model can have on data of variance 1/4.",
)
VIEWS: dict[str, View] = {
    "spectral": _CENTRED,
    "spectral_fast": _CENTRED,
    "spectral_flow": View(
        NoiseSchedule.rectified_flow,
        "flow",
        {"mean": 0.0},
        note="Rectified flow; data whose middle is at log-SNR 0.",
    ),
    **dict.fromkeys(("logit_normal", "mode", "cosmap", "beta", "u_shaped", "jit", "bell"), _FLOW),
    **dict.fromkeys(("edm", "edm2", "soft_min_snr", "debiased", "truncated_snr"), _OF_V),
    "sigma_sqrt": replace(_FLOW, is_logarithmic=True),
    "clts": View(
        states={f"step {step:,}": _advanced(step) for step in (0, 25_000, 50_000)},
        note="Linear schedule, at three steps of the training.",
    ),
    "loss_second_moment": View(
        states={"": _told_losses},
        note="Linear schedule; losses that fall from 1 at the clean end to 0.02 at the noisy end.",
    ),
    **dict.fromkeys(("loss_balanced", "info_noise", "uncertainty"), _TAUGHT),
    "adaptive": View(
        NoiseSchedule.rectified_flow,
        "flow",
        states={"": _told_falling},
        note="Rectified flow; losses that fall most around log-SNR 0.",
    ),
}


def view_of(name: str) -> View:
    """How a policy is shown: on the linear schedule, unless VIEWS says otherwise."""
    return VIEWS.get(name, View())


def policy_figure(name: str, table: str) -> bytes:
    """One of `TABLES` of a registered policy, against the timestep or log-SNR, as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    view = view_of(name)
    schedule = view.schedule()
    # The same file from the same policy: no random ids, no date.
    with mpl.rc_context({"svg.hashsalt": name, "font.size": 9}):
        figure, axis = plt.subplots(figsize=(3.7, 2.1), layout="constrained")
        axis.set_title(TABLES[table], fontsize=9, loc="left")
        _dress(axis, schedule, is_over_time=table != "log_snr")
        for color, (label, prepare) in zip(LINE_COLORS, view.states.items(), strict=False):
            policy = _built(name, view, schedule)
            prepare(policy)
            places = schedule.log_snr if table == "log_snr" else torch.arange(schedule.num_timesteps)
            axis.plot(places, _values(policy, table), color=color, linewidth=1.6, label=label)
        if table == "weight" and view.is_logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0, top=1.08 * axis.get_ylim()[1])
        if len(view.states) > 1 and table == "density":
            axis.legend(frameon=False, fontsize=8)
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
        plt.close(figure)
    return written.getvalue()


def alternative_text(name: str, table: str) -> str:
    """What a figure shows, for readers who do not see it."""
    view = view_of(name)
    policy = _built(name, view, view.schedule())
    list(view.states.values())[-1](policy)
    values = _values(policy, table)
    what = "density over log-SNR" if table == "log_snr" else table
    return f"{what} of {name}, between {float(values.min()):.2g} and {float(values.max()):.2g}"


def comparison() -> bytes:
    """The figure of the command COMPARED, as SVG."""
    import matplotlib as mpl

    with TemporaryDirectory() as folder, mpl.rc_context({"svg.hashsalt": "hosts"}):
        path = Path(folder) / "hosts.svg"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = inspect_policy.main([*COMPARED.split(), "--plot", str(path)])
        if status != 0:
            raise ValueError(f"the figure of hosts was not drawn: {printed.getvalue()}")
        return path.read_bytes()


def _values(policy: TimestepPolicy, table: str) -> Tensor:
    if table == "weight":
        return policy.weight
    if table == "density":
        return len(policy.density) * policy.density
    # Every schedule that is shown has a log-SNR at every timestep.
    return torch.tensor(over_log_snr(policy.schedule, policy.density), dtype=torch.float64)


def _built(name: str, view: View, schedule: NoiseSchedule) -> TimestepPolicy:
    config = {"type": name, **view.options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return build_policy(
            config, schedule, view.prediction_type, data_spectrum=lambda: DataSpectrum(torch.ones(1))
        )


def _dress(axis: Any, schedule: NoiseSchedule, is_over_time: bool) -> None:
    ruler = over_time(schedule) if is_over_time else over_log_snr_axis(schedule)
    shade_areas(axis, ruler)
    axis.set_xlim(ruler.first, ruler.last)
    axis.set_xlabel("timestep (0 is clean)" if is_over_time else "log-SNR (noise on the right)", fontsize=8)
    axis.grid(axis="y", color="#d0d0d0", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
