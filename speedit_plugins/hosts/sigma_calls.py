"""Seam E: two functions that many flow trainers share by name draw u and weigh by sigma.

    calls = SigmaCalls("auto")
    u = calls.density(lambda: compute_density_for_timestep_sampling(...), lambda: noise_scheduler)
    timesteps = noise_scheduler.timesteps[calls.checked((u * 1000).long())]
    noisy = (1.0 - sigmas) * calls.data(latents) + sigmas * noise
    weighting = calls.weighting(compute_loss_weighting_for_sd3, weighting_scheme="none", sigmas=sigmas)
    loss = (weighting * calls.error((prediction - target) ** 2)).mean()

The launcher makes these edits (`sigma_edits`). A u is a row of the scheduler's table of sigmas, row =
floor(u T), and row 0 is noise. The policy decides on the sigma in that row, so a shift in the table counts.
Without gradients, as in a validation, everything is the host's own.

Dims: B batch, T rows of the scheduler's table.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import PolicyHolder, refuse_double_weights
from speedit_plugins.hosts.draws.draw_stream import DrawStream, draws_pairs
from speedit_plugins.hosts.draws.sigma_rows import Later, clock_of, resumed, shift_in
from speedit_plugins.hosts.draws.weighted_loss import is_constant, is_one, scaled
from speedit_plugins.hosts.schedules import from_diffusers
from speedit_plugins.hosts.separate_draws import SeparateDraws, refuse_without_loss
from speedit_plugins.hosts.states.state_file import keep_in_checkpoints
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.shifted_boundary import with_shifted_boundary
from speedit_plugins.registry import Config

# Tables whose policies are kept: a scheduler that shifts by resolution has one for each bucket.
_MAX_TABLES = 64
# Sigmas in bfloat16 are off by 2^-9 of their value, and a script may round twice; another row is further off.
_TOLERANCE = 2**-7


class SigmaCalls(PolicyHolder):
    """Draws u for a script and weighs by sigma, for the scheduler that the script looks its rows up in.

    Args:
        policy: see `build_policy`. It is built for each table of sigmas that the scheduler has; `speed` moves
            its boundary with the scheduler's `shift`.
        prediction_type: what the script takes the squared error of; None asks its `--precondition_outputs`.
        generator, ranks_alike, num_strata: of the draws, see `with_policy`.
        on_use: called with this object before its first draw with gradients.
        in_checkpoints: whether checkpoints of accelerate keep the policy's state.

    Raises:
        ValueError: the policy is bad.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        >>> calls = SigmaCalls("logit_normal", generator=torch.Generator().manual_seed(0))
        >>> u = calls.density(lambda: torch.rand(3), lambda: scheduler)
        >>> scheduler.sigmas[(u * 1000).long()].round(decimals=2)
        tensor([0.9500, 0.8400, 0.7300])
    """

    def __init__(
        self,
        policy: str | Config = "recommended",
        *,
        prediction_type: str | None = None,
        generator: torch.Generator | None = None,
        ranks_alike: int | None = None,
        num_strata: int | None = None,
        on_use: Callable[["SigmaCalls"], None] | None = None,
        in_checkpoints: bool = True,
    ) -> None:
        self._stream = DrawStream(generator, ranks_alike=ranks_alike, num_strata=num_strata)
        schedule = NoiseSchedule.rectified_flow(1000)
        self._stream.check(build_policy(policy, schedule, prediction_type or "flow"))
        self._config, self._prediction_type, self._on_use = policy, prediction_type, on_use
        self._in_checkpoints = in_checkpoints
        # By table of sigmas, prediction type, and whether the table is read backwards.
        self._of_tables: OrderedDict[tuple[bytes, str, bool], SeparateDraws] = OrderedDict()
        self._current: SeparateDraws | None = None
        self._waiting_state: Mapping[str, Any] = {}
        # The rows (B,) of the last draw and their sigmas (B,); None after a draw of the script.
        self._rows: Tensor | None = None
        self._sigmas: Tensor | None = None
        # Whether the script draws from a part of the rows.
        self._is_part = False
        # A draw of the script in whose place the policy draws when its rows are looked up.
        self._later: Later | None = None

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weighs, for the table of the last draw. ValueError if there was none."""
        return self._in_use().policy

    def density(
        self,
        own: Callable[[], Tensor],
        noise_scheduler: Callable[[], Any],
        *,
        preconditions: Callable[[], Any] | None = None,
        is_reversed: bool = False,
        has_weighting: bool = True,
        has_error: bool = True,
        waits: bool = False,
    ) -> Tensor:
        """The u (B,) in [0, 1) in place of `compute_density_for_timestep_sampling(...)`.

        A policy with a law of its own replaces the script's, any other thins it.

        Args:
            own: makes the script's call.
            noise_scheduler: returns the flow-matching scheduler in whose table the script looks rows up.
            preconditions: returns whether the script turns the model's output into data before it takes the
                error, as SD3's does; None if it never does.
            is_reversed: whether the script noises with 1 - sigma, as for Lumina2, where sigma = 1 is data.
            has_weighting: whether the script calls `weighting`.
            has_error: whether it calls `error`.
            waits: whether the script sets the scheduler's table after its draw. Then its own u comes back,
                and `checked` puts the policy's rows in place of its own.

        Raises:
            ValueError: the scheduler has no table of sigmas; the policy needs data, and `data` showed none;
                or it weighs or learns, and the script has no place for that.
        """
        self._rows = self._sigmas = self._later = None
        self._is_part = False
        if not torch.is_grad_enabled():
            return own()
        draw = partial(
            self._drawn,
            noise_scheduler=noise_scheduler,
            preconditions=preconditions,
            is_reversed=is_reversed,
            has_weighting=has_weighting,
            has_error=has_error,
        )
        if not waits:
            return draw(own)
        u = own()
        self._later = Later(u, partial(draw, resumed(u, own)))
        return u

    def _drawn(
        self,
        own: Callable[[], Tensor],
        *,
        noise_scheduler: Callable[[], Any],
        preconditions: Callable[[], Any] | None,
        is_reversed: bool,
        has_weighting: bool,
        has_error: bool,
    ) -> Tensor:
        scheduler = noise_scheduler()
        predicted = "x0" if preconditions is not None and preconditions() else "flow"
        draws = self._draws_for(scheduler, self._prediction_type or predicted, is_reversed)
        if not has_weighting:
            refuse_without_loss(draws.policy, "this script has no weights that could be the policy's")
        if not has_error and draws.policy.learns:
            refuse_without_loss(draws.policy, "this script does not show it")
        if self._on_use is not None:
            self._on_use(self)
            self._on_use = None
        T = len(draws.policy.density)
        u = draws.times(own, clock=clock_of(T, is_reversed))
        self._rows = (u * T).long().clamp(max=T - 1).cpu()
        self._sigmas = torch.as_tensor(scheduler.sigmas).float().cpu()[self._rows]
        return u

    def rows(
        self,
        own: Callable[[], Tensor],
        noise_scheduler: Callable[[], Any],
        *,
        by: Callable[[], Any] | None = None,
        **options: Any,
    ) -> Tensor:
        """Rows (B,) in place of those that a script draws without u, in their dtype.

        Args:
            own, noise_scheduler, options: see `density`.
            by: returns what draws them. If it draws from a part of the rows, its `num_idx` says so, as in
                VideoX-Fun; then `checked` refuses a policy with a law of its own.
        """
        drawn = own()
        if not torch.is_grad_enabled():
            self._rows = self._sigmas = self._later = None
            return drawn
        num_rows = len(noise_scheduler().timesteps)
        again = resumed(drawn, own)
        u = self.density(lambda: (again().float() + 0.5) / num_rows, noise_scheduler, **options)
        self._is_part = getattr(None if by is None else by(), "num_idx", num_rows) != num_rows
        return (u.double() * num_rows).long().to(drawn)

    def checked(self, rows: Any) -> Any:
        """The rows (B,) by which a script looks its timesteps up, or the policy's in their place.

        Raises:
            ValueError: the script looks up other rows than were drawn.
        """
        if not torch.is_grad_enabled():
            return rows
        later = self._later
        if later is not None:
            if self._rows is None:
                later.draw()
            assert self._rows is not None
            T = len(self.policy.density)
            expected = (later.u * T).long().cpu()
        elif self._rows is None:
            return rows
        else:
            expected = self._rows
        is_all = not self._is_part or self.policy.is_relative
        if is_all and isinstance(rows, Tensor) and torch.equal(rows.cpu(), expected):
            return self._rows.to(rows) if later is not None else rows
        raise ValueError(
            "the script looks its timesteps up in other rows than the policy drew: it trains on a part of"
            " them (two experts; min and max timesteps), and that part cannot be drawn from here"
        )

    def data(self, data: Tensor) -> Tensor:
        """The data (B, ...) that a script noises, as they are. The policy sees them once a draw."""
        if self._current is not None:
            self._current.see(data)
        return data

    def weighting(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `own`, `compute_loss_weighting_for_sd3`, returns, times the policy's weights.

        Args:
            own: the script's function.
            args, kwargs: of its call: `weighting_scheme`, and `sigmas` (B, 1, ...).

        Raises:
            ValueError: the sigmas are not those of the last draw; or both the script and the policy weigh.
        """
        weights = own(*args, **kwargs)
        if not torch.is_grad_enabled():
            return weights
        draws = self._in_use()
        self._check_sigmas(kwargs["sigmas"] if "sigmas" in kwargs else args[1])
        table = draws.policy.weight
        ours = draws.weights(len(weights), learns_by_teach=True)
        if is_one(table):
            return weights
        if bool((weights != weights.flatten()[0]).any()):
            refuse_double_weights(
                draws.policy,
                "the script's --weighting_scheme weighs the loss",
                "take a scheme without weights, such as logit_normal",
            )
        return scaled(weights.float(), ours.to(weights.device))

    def error(self, error: Tensor, weights: Tensor | None = None) -> Tensor:
        """The squared error (B, ...) that a script multiplies by its weights, as it is, to learn from.

        Args:
            error: of the batch, or of a part of it.
            weights: that multiply it, (B, 1, ...), as the script has them here.

        Raises:
            ValueError: it is of a part of the batch, and the policy learns or draws pairs; or the weights
                are those of other samples too.
        """
        if not torch.is_grad_enabled() or self._rows is None:
            return error
        policy = self.policy
        if weights is not None and len(weights) != len(error) and not is_constant(policy.weight):
            raise ValueError(
                f"the script multiplies the weights of {len(weights)} samples with the errors of"
                f" {len(error)} (prior preservation), and {policy.name!r} weighs each of them: take a policy"
                " that only draws, or edit the script by hand with FlowScript"
            )
        if len(error) != len(self._rows) and (policy.learns or draws_pairs(policy)):
            raise ValueError(
                f"{policy.name!r} {'learns from each loss' if policy.learns else 'draws pairs'}, and this"
                " script splits its batch (prior preservation): take another policy, or edit the script by"
                " hand with FlowScript"
            )
        if policy.learns:
            self._in_use().teach(error.detach().flatten(1).mean(1))
        return error

    def accelerator(self, made: Any) -> Any:
        """The script's accelerator. Its checkpoints keep the policy's state too, unless a file does."""
        if self._in_checkpoints:
            keep_in_checkpoints(made, self)
        return made

    def state_dict(self) -> dict[str, Any]:
        """The policy's state; empty before the first draw."""
        return dict(self._waiting_state) if self._current is None else self._current.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, now or at the first draw.

        Raises:
            ValueError: the state is of another policy.
        """
        if state and self._current is not None:
            self._current.load_state_dict(state)
        elif state:
            self._waiting_state = state

    def _in_use(self) -> SeparateDraws:
        if self._current is None:
            raise ValueError(
                "the script weighs its loss before the policy drew u: it draws elsewhere, or under"
                " torch.no_grad()"
            )
        return self._current

    def _draws_for(self, scheduler: Any, predicted: str, is_reversed: bool) -> SeparateDraws:
        """What draws for a scheduler's table as it is now, with the state of the last draw."""
        table = torch.as_tensor(scheduler.sigmas).float().cpu().numpy().tobytes()
        key = (table, predicted, is_reversed)
        found = self._of_tables.pop(key, None) or self._made_for(scheduler, predicted, is_reversed)
        self._of_tables[key] = found
        if len(self._of_tables) > _MAX_TABLES:
            self._of_tables.popitem(last=False)
        if self._waiting_state:
            found.load_state_dict(self._waiting_state)
            self._waiting_state = {}
        elif self._current is not None and found is not self._current:
            found.load_state_dict(self._current.state_dict())
        self._current = found
        return found

    def _made_for(self, scheduler: Any, predicted: str, is_reversed: bool) -> SeparateDraws:
        schedule = from_diffusers(scheduler)
        if not torch.allclose(schedule.alpha + schedule.sigma, torch.ones_like(schedule.sigma)):
            raise ValueError(
                f"{type(scheduler).__name__} is not a scheduler of flow matching, where the scales of data"
                " and noise sum to 1"
            )
        if is_reversed:
            noise = schedule.alpha.flip(0)
            # The script's first row is data without noise, which no schedule has.
            noise = noise.where(noise > 0, noise[noise > 0].min() / 2)
            schedule = replace(schedule, alpha=schedule.sigma.flip(0), sigma=noise)
        # A shift of the script's sigma is one the other way of 1 - sigma.
        shift = shift_in(scheduler)
        return SeparateDraws(
            with_shifted_boundary(self._config, 1 / shift if is_reversed else shift),
            schedule=schedule,
            prediction_type=predicted,
            sees_later=True,
            stream=self._stream,
        )

    def _check_sigmas(self, sigmas: Tensor) -> None:
        drawn = self._sigmas
        flat = sigmas.detach().flatten(1)[:, 0].float().cpu() if sigmas.dim() > 1 else sigmas.float().cpu()
        if drawn is None or flat.shape != drawn.shape or not torch.allclose(flat, drawn, rtol=_TOLERANCE):
            raise ValueError(
                "the script weighs its loss at other sigmas than the policy drew: a second draw of its own"
                " (such as for audio), or a part of the batch"
            )
