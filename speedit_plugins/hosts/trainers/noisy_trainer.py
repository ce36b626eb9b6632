"""A flow host whose trainer has a method that draws the times of a batch and noises it at them.

The method is `get_noisy_model_input_and_timesteps(args, noise, latents, timesteps, noise_scheduler, device,
dtype)` of musubi-tuner's `NetworkTrainer`, which its trainers of images and videos inherit.

    adapt(musubi_tuner.training.trainer_base, partial(SeparateDraws, "auto"))

The host's own method noises, at the times of the policy. Its scripts make their loss in many places, all by
`torch.nn.functional.mse_loss`: the first one after a draw is weighed.

Dims: B batch.
"""

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.hosts.draws.host_window import ALL_TIMES
from speedit_plugins.hosts.draws.weighted_loss import is_constant
from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.element_loss import refuse_beside
from speedit_plugins.hosts.trainers.noisy_batch import DENSITY, NO_WINDOW, UNIFORM, Rows, changed, replaced
from speedit_plugins.hosts.trainers.replaced import exchange

TRAINER = "NetworkTrainer"
METHOD = "get_noisy_model_input_and_timesteps"
WEIGHTING = "compute_loss_weighting_for_sd3"
NUM_TIMESTEPS = 1000
Noised = tuple[Tensor, Tensor]


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Lets a policy draw and weigh in the trainers that inherit from musubi-tuner's `NetworkTrainer`.

    Args:
        module: has the class, `compute_density_for_timestep_sampling` and `compute_loss_weighting_for_sd3`.
        draws_of: makes a `SeparateDraws` with these options. It is called before the first draw.

    Raises:
        ValueError: the module lacks one of them, or draws by a policy already.
    """
    trainer = getattr(module, TRAINER, None)
    own = getattr(trainer, METHOD, None)
    missing = [name for name in (TRAINER, DENSITY, WEIGHTING) if not hasattr(module, name)]
    if own is None or missing:
        names = " and no ".join(missing or [f"{TRAINER}.{METHOD}"])
        raise ValueError(f"{module.__name__} has no {names} (musubi-tuner 30c658c)")

    def drawing(own: Callable[..., Noised]) -> Callable[..., Noised]:
        batches, signature = TrainersBatches(module, own, draws_of), inspect.signature(own)

        def drawn(self: Any, *args: Any, **kwargs: Any) -> Noised:
            given = dict(signature.bind(self, *args, **kwargs).arguments)
            trainer = given.pop(next(iter(given)))
            return batches.noised(trainer, given)

        return drawn

    exchange(trainer, METHOD, drawing)


class TrainersBatches:
    """What the replaced method does.

    Args:
        module: of the host.
        own: the host's method, a function of the trainer and its arguments.
        draws_of: see `adapt`.
    """

    def __init__(
        self, module: ModuleType, own: Callable[..., Noised], draws_of: Callable[..., SeparateDraws]
    ) -> None:
        self._module, self._own, self._draws_of = module, own, draws_of
        self._draws: SeparateDraws | None = None
        self._draws_rows = False

    def noised(self, trainer: Any, given: Mapping[str, Any]) -> Noised:
        """What the host's method returns, at the times of the policy.

        Raises:
            ValueError: the trainer draws again until a t fits one of two models (Wan 2.2); or it weighs its
                loss, and so does the policy.
        """
        args = given["args"]
        if not torch.is_grad_enabled() or getattr(args, "show_timesteps", None):
            return self._own(trainer, **given)
        if getattr(trainer, "high_low_training", False):
            raise ValueError(
                "the trainer draws again until the t of each sample fits one of its two models"
                " (--dit_high_noise), which takes no policy: train the two models in runs of their own, with"
                " --min_timestep and --max_timestep"
            )
        if self._draws is None:
            self._draws = self._made(given)
        draws, rows = self._draws, Rows.of_scheduler(given["noise_scheduler"])
        # The quantiles of a host with buckets are the same in each call, and a refused draw needs another.
        keeps = draws.policy.is_relative and is_constant(draws.policy.density)
        drawing = dict(given) if keeps else {**given, "timesteps": None}
        clock = HostsTime(
            lambda t: t.float(),
            lambda draw, t: rows.sigma_of(draw, t) if self._draws_rows else draw.time.to(t),
            lambda: self._shift_of(trainer, given),
        )
        sigma = draws.times(lambda: self._hosts_sigma(trainer, drawing), given["latents"], clock)
        _Awaited(draws)
        return self._at(sigma, rows, trainer, given)

    def _made(self, given: Mapping[str, Any]) -> SeparateDraws:
        args = given["args"]
        low, high = args.min_timestep, args.max_timestep
        window = (
            ALL_TIMES[0] if low is None else low / NUM_TIMESTEPS,
            ALL_TIMES[1] if high is None else high / NUM_TIMESTEPS,
        )
        draws = self._draws_of(window=window)
        weighting = getattr(self._module, WEIGHTING)
        first = given["noise_scheduler"].timesteps[:1]
        made = weighting(args.weighting_scheme, given["noise_scheduler"], first, "cpu", torch.float32)
        if made is not None:
            refuse_beside(
                draws.policy,
                f"--weighting_scheme {args.weighting_scheme} weighs the host's loss",
                "drop --weighting_scheme",
            )
        return draws

    def _hosts_sigma(self, trainer: Any, given: Mapping[str, Any]) -> Tensor:
        """The sigma (B,) that the host would draw, float32: of zeros and a noise of ones, it makes sigma."""
        self._draws_rows = False
        density = getattr(self._module, DENSITY)

        def row(*args: Any, **kwargs: Any) -> Any:
            self._draws_rows = True
            return density(*args, **kwargs)

        latents = given["latents"]
        shown = {
            "latents": torch.zeros((), device=latents.device).expand(latents.shape),
            "noise": torch.ones((), device=latents.device).expand(latents.shape),
            "dtype": torch.float32,
        }
        with replaced(self._module, **{DENSITY: row}):
            return self._own(trainer, **{**given, **shown})[0].flatten(1)[:, 0]

    def _shift_of(self, trainer: Any, given: Mapping[str, Any]) -> float:
        """The shift s of the host's draws: what is 1/2 without it becomes s / (1 + s)."""
        size = len(given["latents"])
        args = changed(given["args"], preserve_distribution_shape=False, **NO_WINDOW)
        own, module = {**given, "args": args, "timesteps": [0.5] * size}, self._module
        with replaced(module, **{DENSITY: lambda **_: torch.full((size,), 0.5)}):
            sigma = float(TrainersBatches(module, self._own, self._draws_of)._hosts_sigma(trainer, own)[0])
        return sigma / (1 - sigma)

    def _at(self, sigma: Tensor, rows: Rows, trainer: Any, given: Mapping[str, Any]) -> Noised:
        """The host's own batch, noised at sigma (B,)."""
        args = changed(given["args"], preserve_distribution_shape=False, **NO_WINDOW)
        if not self._draws_rows:
            args = changed(args, timestep_sampling=UNIFORM)
            return self._own(trainer, **{**given, "args": args, "timesteps": sigma.tolist()})
        u = (len(rows.sigma) - rows.row_of(sigma) - 0.5) / len(rows.sigma)
        with replaced(self._module, **{DENSITY: lambda **_: u}):
            return self._own(trainer, **{**given, "args": args})


class _Awaited:
    """Weighs the first `mse_loss` with gradients after a draw, and is gone then.

    Args:
        draws: what has drawn.
    """

    # torch's own mse_loss, while ours replaces it.
    _own: Callable[..., Tensor] = staticmethod(functional.mse_loss)

    def __init__(self, draws: SeparateDraws) -> None:
        self._draws = draws
        if not isinstance(getattr(functional.mse_loss, "__self__", None), _Awaited):
            _Awaited._own = staticmethod(functional.mse_loss)
        vars(functional)["mse_loss"] = self.mse_loss

    def mse_loss(self, input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's squared error, weighed; `reduction` as torch has it."""
        own = _Awaited._own
        reduction = kwargs.get("reduction", "mean")
        if not torch.is_grad_enabled() or args or reduction not in ("none", "mean"):
            return own(input, target, *args, **kwargs)
        vars(functional)["mse_loss"] = own
        error = own(input, target, reduction="none")
        weighed = self._draws.weigh(error)
        if reduction == "none":
            return weighed
        return own(input, target) if weighed is error else weighed.mean()
