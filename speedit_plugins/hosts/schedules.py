"""What a host trains on: its noise schedule and its prediction type, read from its own object.

Dims: T timesteps.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.schedule import PREDICTION_TYPES, NoiseSchedule

# The hosts' names, in lower case, for what their models predict.
_PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "start_x": "x0",
    "x0": "x0",
    "sample": "x0",
    "velocity": "v",
    "v_prediction": "v",
    "v": "v",
    "flow_prediction": "flow",
}


# Rows of a policy for continuous time. With jitter they match a logit-normal's quantiles within 0.002.
NUM_BINS = 1000


def binned(levels: Callable[[Tensor], tuple[Tensor, Tensor]]) -> NoiseSchedule:
    """The schedule of a host with continuous time, at the midpoints of `NUM_BINS` bins.

    Args:
        levels: turns time float64 (T,) in (0, 1), 1 is noise, into the scales (T,) of signal and noise.
    """
    alpha, sigma = levels((torch.arange(NUM_BINS, dtype=torch.float64, device="cpu") + 0.5) / NUM_BINS)
    return NoiseSchedule(alpha, sigma, torch.arange(NUM_BINS, device="cpu"), NUM_BINS)


def schedule_of(diffusion: Any) -> NoiseSchedule:
    """The schedule of a guided-diffusion style object, respaced as the object is.

    Args:
        diffusion: has `alphas_cumprod` (T,), numpy or torch; if it is respaced, also `timestep_map` and
            `original_num_steps`.

    Raises:
        ValueError: there is no `alphas_cumprod`.
    """
    table = getattr(diffusion, "alphas_cumprod", None)
    if table is None:
        raise ValueError(f"{_name(diffusion)} has no alphas_cumprod to read the noise schedule from")
    timesteps = getattr(diffusion, "timestep_map", None)
    if not isinstance(timesteps, Iterable):
        return NoiseSchedule.from_alphas_cumprod(table)
    return NoiseSchedule.from_alphas_cumprod(table, list(timesteps), int(diffusion.original_num_steps))


def from_diffusers(noise_scheduler: Any) -> NoiseSchedule:
    """The training schedule of a diffusers scheduler; index 0 is the cleanest.

    Args:
        noise_scheduler: one with `alphas_cumprod` (DDPM and its kin), whose timestep is our index, and whose
            last SNR is 0 with `rescale_betas_zero_snr`; or one with a table of `sigmas` not yet set to
            inference steps, whose row r is our index T - 1 - r. The sigmas are those of flow matching (x_t =
            (1 - sigma) x_0 + sigma eps) or of EDM (x_t = sigma_data x_0 + sigma eps).

    Raises:
        ValueError: the scheduler has no such table (masked tokens, continuous time), is set to inference, or
            samples a flow (`use_flow_sigmas`) that its `alphas_cumprod` does not describe.
    """
    config = getattr(noise_scheduler, "config", {})
    if getattr(noise_scheduler, "alphas_cumprod", None) is not None:
        return _of_ddpm_family(noise_scheduler, config if isinstance(config, Mapping) else {})
    sigmas = getattr(noise_scheduler, "sigmas", None)
    is_flow = "FlowMatch" in type(noise_scheduler).__name__
    if sigmas is None or not (is_flow or "sigma_max" in config):
        raise ValueError(
            f"{_name(noise_scheduler)} has neither alphas_cumprod nor a table of sigmas: its index is not a"
            " timestep of a schedule that a policy could read"
        )
    # diffusers counts from noise to data, and ends a table with zeros that no timestep has.
    sigma = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if is_flow and getattr(noise_scheduler, "timesteps", None) is not None:
        sigma = _without_zero(sigma[: len(noise_scheduler.timesteps)])
    sigma = sigma[sigma > 0].flip(0)
    num_timesteps, wanted = len(sigma), int(config.get("num_train_timesteps", 0))
    # EDMEulerScheduler has one sigma more than it is asked for.
    if num_timesteps < wanted:
        raise ValueError(
            f"{_name(noise_scheduler)} has {num_timesteps} sigmas, wanted the {wanted} of training: read the"
            " schedule before set_timesteps"
        )
    alpha = 1 - sigma if is_flow else torch.full_like(sigma, config.get("sigma_data", 1.0))
    return NoiseSchedule(alpha, sigma, torch.arange(num_timesteps, device="cpu"), num_timesteps)


def _without_zero(sigma: Tensor) -> Tensor:
    """The sigmas (T,) of timesteps, of which the last may be data without noise; no schedule has that."""
    is_zero = len(sigma) > 1 and float(sigma[-1]) == 0
    return torch.cat([sigma[:-1], sigma[-2:-1] / 2]) if is_zero else sigma


def shift_of(noise_scheduler: Any) -> float:
    """The shift s > 0 in the table of sigmas of a diffusers flow scheduler; 1 if there is none.

    With `use_dynamic_shifting` the table is not shifted: the scheduler shifts only what it samples.
    """
    config = getattr(noise_scheduler, "config", {})
    is_fixed = isinstance(config, Mapping) and not config.get("use_dynamic_shifting")
    return float(config.get("shift") or 1.0) if is_fixed else 1.0


def _of_ddpm_family(noise_scheduler: Any, config: Mapping[str, Any]) -> NoiseSchedule:
    if config.get("use_flow_sigmas"):
        raise ValueError(
            f"{_name(noise_scheduler)} with use_flow_sigmas samples a flow, and its alphas_cumprod is another"
            " schedule: pass the scheduler of the training, such as FlowMatchEulerDiscreteScheduler"
        )
    table = torch.as_tensor(noise_scheduler.alphas_cumprod, dtype=torch.float64, device="cpu").clone()
    if config.get("rescale_betas_zero_snr"):
        # Some schedulers store 2^-24 there in place of 0, and the timestep before it may be below that.
        table[-1] = 0
    return NoiseSchedule.from_alphas_cumprod(table)


def prediction_type_of(host: Any) -> str:
    """What the host's model predicts: epsilon, x0, v or flow.

    Args:
        host: has `model_mean_type` (an enum or a string), `parameterization`, or `config.prediction_type`.

    Raises:
        ValueError: it has none of these, or predicts something else. Then pass `prediction_type`.
    """
    config = getattr(host, "config", None)
    stated = [getattr(host, "model_mean_type", None), getattr(host, "parameterization", None)]
    stated.append(config.get("prediction_type") if config is not None else None)
    for value in stated:
        if value is not None:
            name = str(getattr(value, "name", value)).lower()
            if name in _PREDICTION_TYPES:
                return _PREDICTION_TYPES[name]
            raise ValueError(f"{_name(host)} predicts {name!r}; wanted one of {', '.join(_PREDICTION_TYPES)}")
    raise ValueError(
        f"{_name(host)} does not say what its model predicts: pass prediction_type, one of"
        f" {', '.join(PREDICTION_TYPES)}"
    )


def refuse_contradiction(
    host: Any, prediction_type: str | None, read: Callable[[Any], str] = prediction_type_of
) -> None:
    """Raises ValueError if a user says that the model predicts something else than the host's own code says.

    Args:
        host: whose own loss follows what `read` returns.
        prediction_type: from the user; None leaves it to the host.
        read: returns what the host says; raises ValueError if it does not say.
    """
    if prediction_type is None:
        return
    try:
        own = read(host)
    except ValueError:
        return
    if own != prediction_type:
        raise ValueError(
            f"{_name(host)} has a model that predicts {own}, got prediction_type={prediction_type!r}; wanted"
            f" {own!r}, or none at all (the launcher: leave out --prediction-type)"
        )


def _name(host: Any) -> str:
    return f"{type(host).__module__}.{type(host).__qualname__}"
