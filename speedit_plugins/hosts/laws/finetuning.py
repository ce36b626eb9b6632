"""Trainers that fine-tune: kohya's, diffusers' scripts, SimpleTuner, ai-toolkit, OneTrainer."""

import math
from typing import Any, Literal

from speedit_plugins.hosts.laws.laws import HOSTS, Config, curve, law, logit_normal, mixture
from speedit_plugins.registry import Builder

Scheme = Literal["none", "uniform", "logit_normal", "mode", "cosmap", "sigma_sqrt"]


def sd_scripts(
    *,
    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift"] = "sigma",
    sigmoid_scale: float = 1.0,
    discrete_flow_shift: float = 3.0,
    model_prediction_type: Literal["raw", "additive", "sigma_scaled"] = "sigma_scaled",
    weighting_scheme: Scheme = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Config:
    """kohya's sd-scripts for FLUX. The weight multiplies its own loss, and only with sigma_scaled.

    Source: kohya-ss/sd-scripts 48d368f, library/flux_train_utils.py:471 and :532, flux_train.py:555.
    """
    density, weighting = _scheme(weighting_scheme, -logit_mean, logit_std, mode_scale)
    if model_prediction_type != "sigma_scaled":
        weighting = "constant"
    if timestep_sampling == "sigma":
        # The index counts from the noisy end, and the scheduler's table is shifted.
        return law(density, weighting, discrete_flow_shift)
    if timestep_sampling == "uniform":
        return law("uniform", weighting)
    shift = {"sigmoid": 1.0, "shift": discrete_flow_shift, "flux_shift": {"type": "flux"}}[timestep_sampling]
    return law(logit_normal(0.0, sigmoid_scale), weighting, shift)


def sd_scripts_sd3(
    *,
    training_shift: float = 1.0,
    weighting_scheme: Scheme = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Config:
    """kohya's sd-scripts for Stable Diffusion 3. Here the index counts from the clean end.

    Source: kohya-ss/sd-scripts 48d368f, library/sd3_train_utils.py:918, sd3_train_network.py:364.
    """
    return law(*_scheme(weighting_scheme, logit_mean, logit_std, mode_scale), training_shift)


def musubi_tuner(
    *,
    timestep_sampling: Literal[
        "sigma",
        "uniform",
        "sigmoid",
        "shift",
        "flux_shift",
        "flux2_shift",
        "qwen_shift",
        "krea2_shift",
        "ideogram4_shift",
        "logsnr",
        "qinglong_flux",
        "qinglong_qwen",
    ] = "sigma",
    sigmoid_scale: float = 1.0,
    discrete_flow_shift: float = 1.0,
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = "none",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Config:
    """musubi-tuner: Wan, HunyuanVideo, FLUX, Qwen-Image and others.

    With `sigma` the flow shift has no effect: the scheduler's table for training is not shifted.
    Source: kohya-ss/musubi-tuner 30c658c, src/musubi_tuner/training/trainer_base.py:499, timesteps.py.
    """
    density, weighting = _scheme(weighting_scheme, -logit_mean, logit_std, mode_scale)
    normal = logit_normal(0.0, sigmoid_scale)
    # Log-SNR is -2 logit(u), so a normal law of one is a normal law of the other.
    by_snr, clean = logit_normal(-logit_mean / 2, logit_std / 2), logit_normal(-5.36 / 2, 0.5)
    flux: Config = {"type": "flux"}
    qwen = {"type": "flux", "max_shift": 0.9, "max_tokens": 8192}
    laws: dict[str, tuple[Any, ...]] = {
        "sigma": (density, weighting),
        "uniform": ("uniform", weighting),
        "sigmoid": (normal, weighting),
        "shift": (normal, weighting, discrete_flow_shift),
        "flux_shift": (normal, weighting, flux),
        "flux2_shift": (normal, weighting, {**flux, "patch_size": 1}),
        "qwen_shift": (normal, weighting, qwen),
        "krea2_shift": (normal, weighting, {**flux, "max_tokens": 6400}),
        # The mean is half the log of the pixels over 512 x 512; the latents have one for 16 x 16 of them.
        "ideogram4_shift": (logit_normal(0.0, 1.5), weighting, {"type": "pixels", "base": 32 * 32}),
        "logsnr": (by_snr, weighting),
        "qinglong_flux": (mixture([{**normal, "shift": flux}, by_snr, clean], 0.79, 0.11, 0.1), weighting),
        "qinglong_qwen": (mixture([{**normal, "shift": qwen}, clean], 0.95, 0.05), weighting),
    }
    return law(*laws[timestep_sampling])


def diffusers(
    *,
    weighting_scheme: Scheme = "none",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    shift: float = 1.0,
) -> Config:
    """The scripts of diffusers for FLUX, Qwen-Image and others.

    Args:
        weighting_scheme, logit_mean, logit_std, mode_scale: see the scripts.
        shift: `shift` of the model's scheduler, unless that shifts dynamically, as FLUX.1's does.

    Source: huggingface/diffusers 58eb52c, src/diffusers/training_utils.py:365 and :392,
    examples/dreambooth/train_dreambooth_flux.py:1625, schedulers/scheduling_flow_match_euler_discrete.py.
    """
    # The index counts from the noisy end.
    return law(*_scheme(weighting_scheme, -logit_mean, logit_std, mode_scale), shift)


def diffusers_sd3(
    *,
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap"] = "logit_normal",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    precondition_outputs: int = 1,
    shift: float = 3.0,
) -> Config:
    """The scripts of diffusers for Stable Diffusion 3, whose scheduler has shift 3.

    With `precondition_outputs` their loss is that of x0: u^2 times the loss of the velocity. The weight here
    contains that factor.
    Source: huggingface/diffusers 58eb52c, examples/dreambooth/train_dreambooth_sd3.py:1580 to :1653.
    """
    density, weighting = _scheme(weighting_scheme, -logit_mean, logit_std, mode_scale)
    if precondition_outputs:
        factors = {
            "constant": lambda u: u**2,
            "cosmap": lambda u: 2 * u**2 / (math.pi * (1 - 2 * u + 2 * u**2)),
        }
        of_x0: Any = "constant" if weighting == "sigma_sqrt" else curve(factors[weighting])
        return law(density, of_x0, shift)
    return law(density, weighting, shift)


def simpletuner(
    *,
    flow_sigmoid_scale: float = 1.0,
    flow_use_uniform_schedule: bool = False,
    flow_use_beta_schedule: bool = False,
    flow_beta_schedule_alpha: float = 2.0,
    flow_beta_schedule_beta: float = 2.0,
    flow_schedule_shift: float | None = 3.0,
    flow_schedule_auto_shift: bool = False,
    mixflow_enabled: bool = False,
) -> Config:
    """SimpleTuner. The automatic shift needs a static one of 0, and is that of images.

    Source: bghira/SimpleTuner bc8e6ab, simpletuner/helpers/models/common.py:4994,
    helpers/training/custom_schedule.py:443; defaults in its field registry, sections/advanced.py.
    """
    shift: Any = 1.0
    if flow_schedule_shift is not None and flow_schedule_shift > 0:
        shift = flow_schedule_shift
    elif flow_schedule_auto_shift:
        shift = {"type": "flux"}
    if mixflow_enabled:
        return law({"type": "beta", "a": 1.0, "b": 2.0}, shift=shift)
    if flow_use_uniform_schedule:
        return law("uniform", shift=shift)
    if flow_use_beta_schedule:
        beta = {"type": "beta", "a": flow_beta_schedule_alpha, "b": flow_beta_schedule_beta}
        return law(beta, shift=shift)
    return law(logit_normal(0.0, flow_sigmoid_scale), shift=shift)


def ai_toolkit(
    *,
    timestep_type: Literal["sigmoid", "linear", "shift", "flux_shift", "lumina2_shift"] = "sigmoid",
    content_or_style: Literal["balanced", "content", "style"] = "balanced",
    linear_timesteps: bool = False,
    arch: Literal["flux", "sd", "lumina2"] = "flux",
) -> Config:
    """ai-toolkit. `weighted` is missing: its weights are a table that its authors measured.

    Args:
        timestep_type, content_or_style, linear_timesteps: of `train` in its config.
        arch: whose scheduler shifts: FLUX's by the size of the image, sd's by 3, Lumina 2's by 6.

    Source: ostris/ai-toolkit 27a03a9, jobs/process/BaseSDTrainProcess.py:1190 to :1322,
    toolkit/samplers/custom_flowmatch_sampler.py, toolkit/sampler.py:78, SDTrainer.py:925.
    """
    kind = "linear" if linear_timesteps else timestep_type
    # Index r^3 from the noisy end favours noise; its mirror image favours clean timesteps.
    skewed = {"content": {"a": 1.0, "b": 1 / 3}, "style": {"a": 1 / 3, "b": 1.0}}.get(content_or_style)
    if skewed is not None and kind == "sigmoid":
        raise ValueError(
            f"ai-toolkit's {content_or_style} with timestep_type sigmoid has no config here; with linear or"
            " shift it has"
        )
    density: Any = "uniform" if skewed is None else {"type": "beta", **skewed}
    shifts: dict[str, Any] = {"flux": {"type": "flux"}, "sd": 3.0, "lumina2": 6.0}
    return law(
        logit_normal(0.0, 1.0) if kind == "sigmoid" else density,
        "bell" if linear_timesteps else "constant",
        shifts[arch] if kind.endswith("shift") else 1.0,
    )


def onetrainer(
    *,
    timestep_distribution: Literal[
        "UNIFORM", "SIGMOID", "LOGIT_NORMAL", "HEAVY_TAIL", "COS_MAP", "INVERTED_PARABOLA", "BETA"
    ] = "UNIFORM",
    noising_weight: float = 0.0,
    noising_bias: float = 0.0,
    timestep_shift: float = 1.0,
    dynamic_timestep_shifting: bool = False,
    loss_weight_fn: Literal["CONSTANT", "SIGMA"] = "CONSTANT",
) -> Config:
    """OneTrainer on a flow.

    Source: Nerogar/OneTrainer 23df383, modules/modelSetup/mixin/ModelSetupNoiseMixin.py:107,
    ModelSetupDiffusionLossMixin.py:313, modules/util/config/TrainConfig.py:1087 to :1107.
    """
    w, centre, s = noising_weight, noising_bias + 0.5, timestep_shift

    def sigmoid(u: float) -> float:
        # Its formula undoes the shift twice.
        return 1 / (1 + math.exp(-w * (u / (s - s * u + u) - centre)))

    def parabola(u: float) -> float:
        return max(0.0, 2 - w * (u - centre) ** 2)

    densities: dict[str, Any] = {
        "UNIFORM": lambda: "uniform",
        "LOGIT_NORMAL": lambda: logit_normal(noising_bias, w + 1),
        "HEAVY_TAIL": lambda: {"type": "mode", "scale": w},
        "BETA": lambda: {"type": "beta", "a": max(1e-4, w), "b": max(1e-4, noising_bias)},
        "COS_MAP": lambda: "cosmap",
        "SIGMOID": lambda: curve(sigmoid),
        "INVERTED_PARABOLA": lambda: curve(parabola),
    }
    weighting = {"type": "table", "points": [[0, 0], [1, 1]]} if loss_weight_fn == "SIGMA" else "constant"
    shift = {"type": "flux"} if dynamic_timestep_shifting else timestep_shift
    return law(densities[timestep_distribution](), weighting, shift)


def _scheme(name: str, mean: float, std: float, scale: float) -> tuple[Any, str]:
    """Density and weighting of Stable Diffusion 3's schemes. `mode` and `cosmap` are even in u."""
    densities: Config = {"logit_normal": logit_normal(mean, std), "mode": {"type": "mode", "scale": scale}}
    return densities.get(name, "uniform"), name if name in ("cosmap", "sigma_sqrt") else "constant"


_HOSTS: dict[str, Builder] = {
    "sd-scripts": sd_scripts,
    "sd-scripts-sd3": sd_scripts_sd3,
    "musubi-tuner": musubi_tuner,
    "diffusers": diffusers,
    "diffusers-sd3": diffusers_sd3,
    "simpletuner": simpletuner,
    "ai-toolkit": ai_toolkit,
    "onetrainer": onetrainer,
}
for _name, _host in _HOSTS.items():
    HOSTS.register_module(name=_name, module=_host)
