"""Seam D for latent-diffusion and Stable Diffusion 1 and 2: a config's `target:` names a class of this file.

For every class of `ldm.models.diffusion.ddpm` that trains through `p_losses`, this module has a class of the
same name, such as `speedit_plugins.hosts.latent_diffusion.LatentDiffusion`: the host's class, with a policy.

Dims: T timesteps, B batch, C channels, H and W height and width.
"""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import Attachment, under_way
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.draws.weighted_loss import scaled
from speedit_plugins.hosts.schedules import prediction_type_of, schedule_of
from speedit_plugins.hosts.states.policy_state import load_policy_state, policy_state
from speedit_plugins.policies.advice import warn_if_slow
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.registry import Config, nearest

_HOST = "ldm.models.diffusion.ddpm"
# The checkpoint keeps the policy's state under this key.
CHECKPOINT_KEY = "speedit_plugins"
_TERMS = ("train/loss_simple", "train/loss_vlb", "train/loss")


def _takes_t(host_class: Any) -> bool:
    method = getattr(host_class, "p_losses", None)
    return method is not None and "t" in inspect.signature(method).parameters


try:
    _ddpm: Any = import_module(_HOST)
    _DDPM: Any = getattr(_ddpm, "DDPM", None)
    if not (_takes_t(_DDPM) and hasattr(_DDPM, "get_loss")):
        raise ImportError(f"{_HOST} has no class DDPM with p_losses(x_start, ..., t) and get_loss")
except ImportError as error:
    raise ImportError(
        "speedit_plugins.hosts.latent_diffusion needs latent-diffusion or Stable Diffusion 1 or 2"
        f" ({_HOST}.DDPM with p_losses and get_loss); importing it failed: {error}"
    ) from error


class _WeighedErrors:
    """The errors (B, C, H, W) that `get_loss` returned in one training call: plain, and weighed."""

    def __init__(self, draw: TimestepDraw) -> None:
        self.draw = draw
        self.plain: list[Tensor] = []
        self.weighed: list[Tensor] = []

    def weigh(self, error: Tensor) -> Tensor:
        """The error of the host's next term, weighed if the policy weighs that term."""
        # If the host asks a second time, it is for the variational term.
        is_variational = self.plain and self.draw.scope == "mse"
        weighed = error if is_variational else scaled(error, self.draw.weight)
        self.plain.append(error)
        self.weighed.append(weighed)
        return weighed


class _Steered(_DDPM):  # type: ignore[misc]  # the host has no types
    """Comes before a host's class in the order of methods: a policy draws t and weighs the training loss.

    In eval mode and without gradients everything is the host's, so that a monitored val/loss can be compared
    between policies.

    Args:
        policy: see `build_policy`; it may be a config of OmegaConf.
        ranks_alike, num_strata: see `with_policy`.
        args, kwargs: of the host's class.

    Raises:
        ValueError: the policy is bad; `learn_logvar` is on: it would learn the weights away; or the schedule
            of the conditioning is shortened: the host noises it at its own t.
    """

    # Each class of this module sets both. `is_attached` and `without_policy` look for `host_class`.
    host_class: type
    _signature: inspect.Signature

    def __init__(
        self,
        *args: Any,
        policy: str | Config = "recommended",
        ranks_alike: int | None = None,
        num_strata: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.learn_logvar:
            raise ValueError(
                "learn_logvar=True divides the loss at each timestep by a factor that it learns, and so takes"
                " the weights out again: wanted learn_logvar=False"
            )
        # An unconditional model does not use the shortened schedule.
        if getattr(self, "shorten_cond_schedule", False) and self.model.conditioning_key is not None:
            raise ValueError(
                f"num_timesteps_cond={self.num_timesteps_cond} noises the conditioning at the t that the host"
                " draws, not at the policy's: wanted num_timesteps_cond=1"
            )
        # The host's constructor has registered the schedule by now.
        config, predicted = _plain(policy), prediction_type_of(self)
        built = build_policy(config, schedule_of(self), predicted)
        warn_if_slow(built, predicted, config)
        self._speedit_attachment = Attachment(
            built, DrawStream(ranks_alike=ranks_alike, num_strata=num_strata)
        )

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weights."""
        return self._speedit_attachment.policy

    def p_losses(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The host's loss and its terms, scalars. In training mode they are at our t, not at the given one.

        `train/loss` is then the weighted loss; `train/loss_simple` and `train/loss_vlb` are not weighted.

        Raises:
            ValueError: the host's loss is not made of these two terms.
        """
        if not (self.training and is_training()):
            plain: tuple[Tensor, dict[str, Tensor]] = super().p_losses(*args, **kwargs)
            return plain
        bound = self._signature.bind(self, *args, **kwargs)
        t, attachment = bound.arguments["t"], self._speedit_attachment
        draw = attachment.draw(t, bound.arguments["x_start"])
        bound.arguments["t"] = draw.index.to(t.dtype)
        with under_way(attachment, _WeighedErrors(draw)) as errors:
            loss, terms = super().p_losses(*bound.args[1:], **bound.kwargs)
        return self._weighted(loss, terms, errors)

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """The host's error (B, C, H, W), or its mean. During a training call the error is weighed."""
        error: Tensor = super().get_loss(pred, target, mean=mean)
        errors: _WeighedErrors | None = self._speedit_attachment.call
        if errors is None:
            return error
        if mean:
            raise ValueError(
                "p_losses asked get_loss for the batch's mean, wanted mean=False: weights are by sample"
            )
        return errors.weigh(error)

    def _weighted(
        self, loss: Tensor, terms: Mapping[str, Tensor], errors: _WeighedErrors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        attachment, draw = self._speedit_attachment, errors.draw
        self._confirm(loss, terms, errors)
        error = _per_sample(errors.plain[0])  # (B,)
        factor = self.lvlb_weights[draw.index]
        vlb = (factor * error).mean()
        if len(errors.plain) == 1 and draw.scope == "mse":
            # DDPM in pixel space makes both terms of one error: the unweighted variational term is made here.
            loss = terms["train/loss_simple"] * self.l_simple_weight + self.original_elbo_weight * vlb
        # A learning policy balances the loss that the host would have without it.
        simple = self.l_simple_weight * error / _variance(self, draw.index)
        attachment.learn(draw, simple + self.original_elbo_weight * factor * error)
        return loss, {**terms, **dict(zip(_TERMS, (error.mean(), vlb, loss), strict=True))}

    def _confirm(self, loss: Tensor, terms: Mapping[str, Tensor], errors: _WeighedErrors) -> None:
        """Raises ValueError unless the host makes its loss of these errors as known; a fork may not."""
        missing = [name for name in _TERMS if name not in terms]
        if missing or len(errors.plain) not in (1, 2):
            raise ValueError(
                f"{self.host_class.__name__}.p_losses asked get_loss {len(errors.plain)} times and reports"
                f" {sorted(terms)}; wanted once or twice, and {', '.join(_TERMS)}"
            )
        simple = _per_sample(errors.weighed[0]).mean()
        vlb = (self.lvlb_weights[errors.draw.index] * _per_sample(errors.weighed[-1])).mean()
        pairs = [(terms["train/loss_simple"], simple), (terms["train/loss_vlb"], vlb)]
        if len(errors.plain) == 1:
            pairs.append((loss, simple * self.l_simple_weight + self.original_elbo_weight * vlb))
        else:
            # LatentDiffusion has a constant `logvar` in its first term, so its errors are compared.
            pairs.append((errors.plain[0].mean(), errors.plain[1].mean()))
        # In every call, since a host may change its loss during training. All pairs are compared at once, so
        # the CPU waits once.
        theirs, ours = (torch.stack([each.detach() for each in side]) for side in zip(*pairs, strict=True))
        if not torch.allclose(theirs, ours, equal_nan=True):
            raise ValueError(
                f"{self.host_class.__name__}.p_losses does not sum l_simple_weight * loss_simple and"
                " original_elbo_weight * loss_vlb of one error at the policy's t: it has no place for weights"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: adds the policy's state."""
        # Lightning has the hook. A host that is a bare module may not have it.
        hook = getattr(super(), "on_save_checkpoint", None)
        if hook is not None:
            hook(checkpoint)
        checkpoint[CHECKPOINT_KEY] = policy_state(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: restores what was saved. After a checkpoint of the host alone the policy is new.

        Raises:
            ValueError: the checkpoint has another policy or T.
        """
        hook = getattr(super(), "on_load_checkpoint", None)
        if hook is not None:
            hook(checkpoint)
        if CHECKPOINT_KEY in checkpoint:
            load_policy_state(self, checkpoint[CHECKPOINT_KEY])


def __getattr__(name: str) -> Any:
    """The class of this name. It is made at its first use and kept, so that its objects can be pickled."""
    known = {
        key: each
        for key, each in vars(_ddpm).items()
        if isinstance(each, type) and issubclass(each, _DDPM) and _takes_t(each)
    }
    if name not in known:
        raise AttributeError(
            f"{__name__} has no class {name!r}{nearest(name, list(known))}; known: {', '.join(sorted(known))}"
        )
    host_class: Any = known[name]
    members = {
        "host_class": host_class,
        "_signature": inspect.signature(host_class.p_losses),
        "__module__": __name__,
        "__doc__": host_class.__doc__,
    }
    globals()[name] = type(name, (_Steered, host_class), members)
    return globals()[name]


def _per_sample(error: Tensor) -> Tensor:
    """Means (B,) of an error (B, C, H, W), by the host's own operation."""
    return error.mean(dim=list(range(1, error.dim())))


def _variance(host: Any, index: Tensor) -> Tensor | float:
    """The constant by which LatentDiffusion divides its error at timesteps (B,); DDPM does not."""
    log_variance = getattr(host, "logvar", None)
    if not isinstance(log_variance, Tensor):
        return 1.0
    # Some versions keep this table on the CPU.
    return log_variance.to(index.device)[index].exp()


def _plain(config: Any) -> Any:
    """A config in plain dicts and lists: OmegaConf's own containers resolve and copy in their own way."""
    if isinstance(config, Mapping):
        return {str(key): _plain(value) for key, value in config.items()}
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [_plain(value) for value in config]
    return config
