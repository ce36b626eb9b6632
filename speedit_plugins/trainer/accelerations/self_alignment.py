"""Self-alignment: the teacher is a running average of the model, deeper inside and at a lower noise level.

Dims: `B` samples, `F` frames (absent for images), `N` tokens, `D` width of the model.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.trainer.accelerations.alignment import Alignment
from speedit_plugins.trainer.accelerations.objective import Outcome
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.diffusion.flow import TIMESTEP_SCALE, RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import Noised
from speedit_plugins.trainer.inputs import ModelInputs
from speedit_plugins.trainer.models.interface import cut_blocks
from speedit_plugins.trainer.shards import whole


class SelfAlignment(Alignment):
    """SRA: tokens after block `layer` are drawn to the teacher's after block `teacher_layer`.

    The teacher sees the same sample, noise and condition, at a time that is earlier by a random share of up
    to `max_interval`. It is a copy of the model up to that block, in float32, and follows the trained weights
    by its own moving average: the run's average is cut into slices over the ranks. A checkpoint has the copy
    beside the optimizer, so weights that are sampled or exported have none of it.

    Source: Jiang et al. 2025, arXiv:2505.02831, and the release vvvvvjdy/SRA. Its cosine loss compares each
    channel over the tokens; here, as in the paper's figures and in REPA, each token over its channels.

    Args:
        model: before its engine is built.
        projector: from the model's tokens to the teacher's.
        process: of the training.
        teacher_layer: number of a block, counted from 1.
        max_interval: in (0, 1].
        decay: share of the teacher that a step keeps, in [0, 1).
        autocast: the context in which teacher and projector run.
        options: see `Alignment`.
    """

    def __init__(  # noqa: PLR0913 - flat, as the config names each choice
        self,
        model: nn.Module,
        projector: nn.Module,
        *,
        process: Process,
        teacher_layer: int,
        max_interval: float,
        decay: float,
        autocast: Callable[[], AbstractContextManager[Any]],
        **options: Any,
    ) -> None:
        self._teacher = copy.deepcopy(model).requires_grad_(False).eval()
        cut_blocks(self._teacher, teacher_layer)
        averages = dict(self._teacher.named_parameters())
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._averages = {name: averages[name] for name in trained if name in averages}
        self._model = model
        self._labels: list[Tensor] = _labels_seen_by(model)
        super().__init__(model, projector, autocast=autocast, **options)
        self._process, self._last = process, teacher_layer
        self._max_interval, self._decay, self._runs_in = max_interval, decay, autocast

    def paired(self, given: ModelInputs) -> ModelInputs:
        self._labels.clear()
        return super().paired(given)

    @torch.no_grad()
    def target(self, outcome: Outcome) -> Tensor:
        noised = outcome.noised
        # Torch's generator, as for dropped labels: a function of seed, step and rank.
        share = self._max_interval * torch.rand(len(noised.x_t), device=noised.x_t.device)
        x_t, timestep = less_noised(self._process, noised, outcome.draw, share)
        condition = _with_labels(outcome.given.condition, self._labels)
        with self._runs_in():
            hidden: Tensor = self._teacher(x_t, timestep, condition, hidden_after=self._last)[1]
        return hidden

    @torch.no_grad()
    def after_step(self) -> None:
        if not self.is_on:
            return
        averages: list[Tensor] = list(self._averages.values())
        # By name: fsdp2 replaces the parameters that the model was built with.
        parameters = dict(self._model.named_parameters())
        # A plugin may keep the weights in another type or on another device than the teacher's.
        trained = [whole(parameters[name]).detach().to(old) for name, old in self._averages.items()]
        torch._foreach_lerp_(averages, trained, 1 - self._decay)

    def state_dict(self) -> dict[str, Any]:
        return {name: value.detach() for name, value in self._averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in self._averages.items():
            value.copy_(state[name])


def less_noised(process: Process, noised: Noised, draw: TimestepDraw, share: Tensor) -> tuple[Tensor, Tensor]:
    """The same samples with the same noise, at an earlier time: x_t (B, C, ...), and the timestep (B,).

    Args:
        process: that noised them.
        noised: what it gave.
        draw: the draw of the batch.
        share: (B,) in [0, 1]: of a flow's time, or of the timesteps of a schedule, taken off. The earliest
            time is 0, or the first timestep.
    """
    if isinstance(process, RectifiedFlow):
        time = (noised.timestep / TIMESTEP_SCALE - share).clamp(min=0.0)
        t = time.to(noised.x_0.dtype).reshape(-1, *[1] * (noised.x_0.ndim - 1))
        return (1 - t) * noised.x_0 + t * noised.noise, TIMESTEP_SCALE * time
    rows = (share * process.schedule.num_timesteps).long()
    earlier = replace(draw, index=(noised.index - rows).clamp(min=0))
    found = process.corrupt(noised.x_0, earlier, noise=noised.noise)
    return found.x_t, found.timestep


def _labels_seen_by(model: nn.Module) -> list[Tensor]:
    """A list with the labels of the model's first call since it was empty, some of them dropped.

    It stays empty without labels. A second call in the same step may drop others.
    """
    labels: list[Tensor] = []
    table = getattr(getattr(model, "y_embedder", None), "embedding_table", None)
    if table is not None:

        def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
            if not labels:
                labels.append(given[0])

        cast(nn.Module, table).register_forward_pre_hook(keep)
    return labels


def _with_labels(condition: Condition, labels: list[Tensor]) -> Condition:
    if not labels or condition is None:
        return condition
    return labels[0] if isinstance(condition, Tensor) else {**condition, "label": labels[0]}
