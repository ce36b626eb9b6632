"""Trainers that start from nothing: research code, and trainers of video models."""

import math
from typing import Literal

from speedit_plugins.hosts.laws.laws import HOSTS, Config, curve, interpolated, law, logit_normal, mixture
from speedit_plugins.registry import Builder


def sit(*, path_type: Literal["Linear"] = "Linear", prediction: Literal["velocity"] = "velocity") -> Config:
    """SiT with its defaults: uniform draws.

    Source: willisma/SiT, transport/transport.py:92, transport/__init__.py, train_utils.py.
    """
    return law("uniform")


def lightningdit(
    *,
    path_type: Literal["Linear"] = "Linear",
    prediction: Literal["velocity"] = "velocity",
    use_lognorm: bool = True,
    use_cosine_loss: bool = True,
) -> Config:
    """LightningDiT, with the defaults of the config that it ships. The cosine loss draws no timesteps.

    Its t = 0 is noise; the law is even.
    Source: hustvl/LightningDiT, transport/transport.py:134 to :165, train.py:104,
    configs/lightningdit_xl_vavae_f16d32.yaml.
    """
    return law("logit_normal" if use_lognorm else "uniform")


def repa(
    *,
    path_type: Literal["linear"] = "linear",
    prediction: Literal["v"] = "v",
    weighting: Literal["uniform", "lognormal"] = "uniform",
) -> Config:
    """REPA. Its log-normal law of sigma / alpha is a logit-normal law of u.

    Source: sihyun-yu/REPA 67f7145, loss.py:57, train.py:432.
    """
    return law("logit_normal" if weighting == "lognormal" else "uniform")


def rae(
    *,
    time_dist_type: str = "logit-normal_0_1",
    time_dist_shift_dim: int | None = None,
    time_dist_shift_base: int = 4096,
) -> Config:
    """RAE, with the defaults of the configs that it ships.

    Args:
        time_dist_type: uniform, or logit-normal_MEAN_STD.
        time_dist_shift_dim: values of a sample; None is their number in the data.
        time_dist_shift_base: values for which the shift is 1.

    Source: bytetriper/RAE a4d18c4, src/stage2/transport/transport.py:125 to :170, src/train.py:137,
    configs/stage2/training/ImageNet256/DiTDH-XL_DINOv2-B.yaml.
    """
    name, *numbers = time_dist_type.split("_")
    if (name, len(numbers)) not in (("uniform", 0), ("logit-normal", 2)):
        raise ValueError(
            f"host 'rae' time_dist_type needs uniform or logit-normal_MEAN_STD, got {time_dist_type!r}"
        )
    density = logit_normal(*map(float, numbers)) if numbers else {"type": "uniform"}
    shift = (
        {"type": "dimension", "base": time_dist_shift_base}
        if time_dist_shift_dim is None
        else math.sqrt(time_dist_shift_dim / time_dist_shift_base)
    )
    # Times end at 1 - 1/1000, before the shift.
    return law({**density, "window": [0.0, 0.999]}, shift=shift)


def torchtitan() -> Config:
    """torchtitan's FLUX: uniform draws. Source: pytorch/torchtitan b5bcd76, models/flux/trainer.py:214."""
    return law("uniform")


def open_sora_1_2(
    *,
    sample_method: Literal["uniform", "logit-normal"] = "uniform",
    loc: float = 0.0,
    scale: float = 1.0,
    use_timestep_transform: bool = False,
    transform_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
) -> Config:
    """Open-Sora 1.2's `rflow`.

    Args:
        sample_method, loc, scale, use_timestep_transform, transform_scale: of its scheduler.
        height, width, num_frames: of a clip, in pixels. The transform needs them.

    Source: hpcaitech/Open-Sora v1.2.0, opensora/schedulers/rf/rectified_flow.py:10 and :36.
    """
    density = logit_normal(loc, scale) if sample_method == "logit-normal" else "uniform"
    if not use_timestep_transform:
        return law(density)
    if height is None or width is None or num_frames is None:
        raise ValueError("host 'open-sora-1.2' use_timestep_transform needs height, width and num_frames")
    frames = 1 if num_frames == 1 else num_frames // 17 * 5
    return law(density, shift=math.sqrt(height * width / 512**2 * frames) * transform_scale)


def open_sora_2(*, num_frames: int, height: int, width: int) -> Config:
    """Open-Sora 2.0: logit-normal draws, with a shift that is linear in the tokens of a frame.

    Args:
        num_frames, height, width: of the latents.

    Source: hpcaitech/Open-Sora, scripts/diffusion/train.py:386 to :390, opensora/utils/sampling.py:295.
    """
    by_area = interpolated(height * width // 4, 256, 1.0, 4096, 3.0)
    return law("logit_normal", shift=by_area * math.sqrt(num_frames))


def hunyuanvideo_1_5(
    *,
    flow_snr_type: Literal["uniform", "lognorm", "mix", "mode"] = "lognorm",
    train_timestep_shift: float = 3.0,
) -> Config:
    """HunyuanVideo-1.5. Source: Tencent-Hunyuan/HunyuanVideo-1.5 60783e7, train.py:226, :752 and :1158."""
    densities = {
        "uniform": "uniform",
        "lognorm": "logit_normal",
        "mix": mixture(["logit_normal", "uniform"], 0.7, 0.3),
        "mode": "mode",
    }
    return law(densities[flow_snr_type], shift=train_timestep_shift)


def ltx_2(
    *,
    seq_length: int,
    timestep_sampling_mode: Literal["uniform", "shifted_logit_normal"] = "shifted_logit_normal",
    std: float = 1.0,
    uniform_prob: float = 0.1,
) -> Config:
    """The trainer of LTX-2: a logit-normal law, stretched between two of its quantiles, and uniform draws.

    Args:
        seq_length: tokens of a sample.
        timestep_sampling_mode: of `flow_matching` in its config.
        std, uniform_prob: of `timestep_sampling_params` there.

    Source: Lightricks/LTX-2 400fd31, packages/ltx-trainer/src/ltx_trainer/timestep_samplers.py.
    """
    if timestep_sampling_mode == "uniform":
        return law("uniform")
    mean = interpolated(seq_length, 1024, 0.95, 4096, 2.05)
    # Its 0.5 % and 99.9 % quantiles become 0 and 1.
    low, high = (1 / (1 + math.exp(-mean - z * std)) for z in (-2.5758, 3.0902))

    def stretched(u: float) -> float:
        x = low + (high - low) * u
        return math.exp(-(((math.log(x / (1 - x)) - mean) / std) ** 2) / 2) / (x * (1 - x))

    return law(mixture([curve(stretched), "uniform"], 1 - uniform_prob, uniform_prob))


def diffsynth(
    *,
    template: Literal["FLUX.1", "Wan", "Z-Image"] = "FLUX.1",
    min_timestep_boundary: float = 0.0,
    max_timestep_boundary: float = 1.0,
) -> Config:
    """DiffSynth-Studio: uniform draws, shifted by the model's scheduler, and a bell over the shifted times.

    Args:
        template: of its scheduler; each model has one.
        min_timestep_boundary, max_timestep_boundary: shares of the steps, counted from the noisy end.

    Source: modelscope/DiffSynth-Studio fed7b18, diffsynth/diffusion/loss.py:11, flow_match.py:34, :47, :343.
    """
    shift = {"FLUX.1": 3.0, "Wan": 5.0, "Z-Image": 3.0}[template]
    bounds = [1 - max_timestep_boundary, 1 - min_timestep_boundary]
    density = "uniform" if bounds == [0, 1] else {"type": "uniform", "window": bounds}
    return {**law(density, "bell", shift), "normalize": True}


_HOSTS: dict[str, Builder] = {
    "sit": sit,
    "lightningdit": lightningdit,
    "repa": repa,
    "rae": rae,
    "torchtitan": torchtitan,
    "open-sora-1.2": open_sora_1_2,
    "open-sora-2": open_sora_2,
    "hunyuanvideo-1.5": hunyuanvideo_1_5,
    "ltx-2": ltx_2,
    "diffsynth": diffsynth,
}
for _name, _host in _HOSTS.items():
    HOSTS.register_module(name=_name, module=_host)
