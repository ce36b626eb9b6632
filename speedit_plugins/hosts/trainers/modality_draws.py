"""A host draws t once for each modality of a batch, video and sound, and returns each sample's loss.

Its strategies have `prepare_training_inputs(batch, timestep_sampler)`, and `compute_loss(video_pred,
audio_pred, inputs)`. The policy draws in place of the sampler that the strategy is given, and weighs each
modality's loss at its own t. This is the trainer of LTX-2.

Dims: B batch, N tokens, D width.
"""

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.replaced import exchange

STRATEGIES = ("FlexibleStrategy", "TextToVideoStrategy", "VideoToVideoStrategy")


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Puts a policy into the training strategies of LTX-2.

    Video and sound have a policy each: what one of them measures or learns is of its own data. The host's
    other settings, its sampler's law included, are what a relative policy thins.

    Args:
        module: the host's `ltx_trainer.training_strategies`.
        draws_of: makes a `SeparateDraws`, at the first draw for a modality.

    Raises:
        ValueError: a strategy is not there, or has a policy already.
    """
    draws = ModalityDraws(draws_of)
    for name in STRATEGIES:
        strategy = getattr(module, name, None)
        if strategy is None:
            raise ValueError(f"{module.__name__} has no {name}, a training strategy of LTX-2")
        exchange(strategy, "prepare_training_inputs", draws.preparing)
        exchange(strategy, "compute_loss", draws.weighing)


class ModalityDraws:
    """The `SeparateDraws` of each modality.

    Args:
        draws_of: makes one.
    """

    def __init__(self, draws_of: Callable[..., SeparateDraws]) -> None:
        self._draws_of = draws_of
        self._draws: dict[str, SeparateDraws] = {}

    def of(self, modality: str) -> SeparateDraws:
        """What draws and weighs for "video" or "audio"."""
        if modality not in self._draws:
            self._draws[modality] = self._draws_of()
        return self._draws[modality]

    def preparing(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The host's `prepare_training_inputs` with a sampler of ours around its own."""

        def prepare_training_inputs(self_: Any, batch: Mapping[str, Any], timestep_sampler: Any) -> Any:
            return own(self_, batch, _Sampler(timestep_sampler, self, batch))

        return prepare_training_inputs

    def weighing(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The host's `compute_loss` with the weights of each modality's t."""

        def compute_loss(
            self_: Any, video_pred: Tensor | None, audio_pred: Tensor | None, inputs: Any
        ) -> Tensor:
            if not torch.is_grad_enabled():
                plain: Tensor = own(self_, video_pred, audio_pred, inputs)
                return plain
            made = {"video": video_pred, "audio": audio_pred}
            trained = [
                name
                for name, prediction in made.items()
                if prediction is not None and getattr(inputs, f"{name}_targets") is not None
            ]
            sigmas = [getattr(inputs, name).sigma for name in trained]
            if len(trained) == 1 or sigmas[0] is sigmas[1]:
                whole: Tensor = own(self_, video_pred, audio_pred, inputs)
                return self.of(trained[0]).weigh(whole, sigmas[0])
            # The host adds the two losses, each made of one prediction.
            video = self.of("video").weigh(own(self_, video_pred, None, inputs), sigmas[0])
            audio = self.of("audio").weigh(own(self_, None, audio_pred, inputs), sigmas[1])
            return video + audio

        return compute_loss


class _Sampler:
    """A host's sampler whose `sample_for` is the policy's. Other attributes are the host's."""

    def __init__(self, sampler: Any, draws: ModalityDraws, batch: Mapping[str, Any]) -> None:
        self._sampler = sampler
        self._draws = draws
        self._latents = list(_latents(batch))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def sample_for(self, tokens: Tensor) -> Tensor:
        """The sigma (B,) at which tokens (B, N, D) are noised.

        The policy observes the latents of the batch that have been cut into these tokens: their sides tell a
        spectrum.

        Raises:
            ValueError: the batch has no latents of this size.
        """
        same = (entry for entry in self._latents if entry[1].numel() == tokens.numel())
        found = next(same, None)
        if found is None:
            raise ValueError(f"the batch has no latents of the {tokens.numel()} values that are noised")
        # The host noises video first, so what is left is the sound, also if it has as many values.
        self._latents = [entry for entry in self._latents if entry is not found]
        name, data = found
        return self._draws.of(name).times(lambda: self._sampler.sample_for(tokens), data)


def _latents(batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The modality and the latents (B, ...) of each target in a batch, by the host's names for them."""
    for key, modality in (("video_latents", "video"), ("latents", "video"), ("audio_latents", "audio")):
        entry = batch.get(key)
        data = entry.get("latents") if isinstance(entry, Mapping) else None
        if isinstance(data, Tensor):
            yield modality, data
