"""The Fréchet distance of a member's samples to the data, under each sampler.

Dims: N samples, C channels, H x W pixels.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.image_sets import ImageSet, spread_labels
from benchmarks.stacked.training import Member, Process, StackedTraining, build_model
from speedit_plugins.registry import FEATURES, build
from speedit_plugins.trainer.data.loader import stream_seed
from speedit_plugins.trainer.diffusion.sampling import sample
from speedit_plugins.trainer.evaluation.distances import feature_statistics
from speedit_plugins.trainer.logging.images import to_uint8
from speedit_plugins.trainer.models.dit import DiT

_SAMPLES = 3
# The name of each sampler here -> its name for `sample`.
_SAMPLERS = {"ddim": "ddim", "ancestral": "ddpm", "dpm": "dpm_solver", "euler": "euler", "heun": "heun"}
_NAME = re.compile(r"(\w+)-(\d+)(-unclamped)?")


@dataclass(frozen=True)
class Sampler:
    """A sampler, its steps, and whether x_0 is clamped to [-1, 1] at each."""

    kind: str
    num_steps: int
    is_clamped: bool

    @classmethod
    def named(cls, name: str) -> "Sampler":
        """Reads a name such as "ddim-25" or "ancestral-100-unclamped"; any other text is a ValueError."""
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in _SAMPLERS:
            kinds = ", ".join(_SAMPLERS)
            raise ValueError(
                f"a sampler is KIND-STEPS or KIND-STEPS-unclamped, KIND of {kinds}; got {name!r}"
            )
        return cls(_SAMPLERS[match[1]], int(match[2]), match[3] is None)


class SampleDraws:
    """Draws a fixed number of samples from trained members.

    Args:
        data: samples have its shape, and its labels in their proportions.
        num_samples: N.
        device: of the models that are sampled.
    """

    def __init__(self, data: ImageSet, num_samples: int, *, device: str = "cpu") -> None:
        self._noise_shape = (num_samples, *data.images.shape[1:])
        self._device = device
        self.labels = None if data.labels is None else spread_labels(data.labels, num_samples).to(device)

    def models(self, stack: StackedTraining) -> Iterator[tuple[Member, DiT]]:
        """Each member with a model that has its averaged weights, until the next member is taken."""
        model = build_model(stack.data, stack.shape)
        positions = model.state_dict()
        for number, member in enumerate(stack.members):
            model.load_state_dict({**positions, **stack.averaged_weights(number)})
            yield member, model

    def noise(self, seed: int) -> tuple[Tensor, torch.Generator]:
        """The noise (N, C, H, W) from which samples of a seed start, and the generator of later noise."""
        generator = torch.Generator(self._device).manual_seed(stream_seed(seed, _SAMPLES))
        return torch.randn(self._noise_shape, generator=generator, device=self._device), generator

    def draw(self, model: DiT, process: Process, seed: int, sampler: Sampler) -> Tensor:
        """Samples (N, C, H, W)."""
        noise, generator = self.noise(seed)
        return sample(
            model.eval(),
            process,
            noise,
            condition=self.labels,
            sampler=sampler.kind,
            num_steps=sampler.num_steps,
            clip_sample=sampler.is_clamped,
            generator=generator,
        )


class SampleQuality(SampleDraws):
    """Draws samples and compares them with the data, always the same number and by the same features.

    Args:
        data: the samples are compared with it, and drawn for its labels in their proportions.
        features: an entry of FEATURES, built from the data.
        samplers: names, see `Sampler`.
        num_samples: N in each comparison.
        device: of the models that are sampled; features are computed on the CPU.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        features: str,
        num_samples: int,
        samplers: tuple[str, ...] = (),
        device: str = "cpu",
    ) -> None:
        super().__init__(data, num_samples, device=device)
        self.samplers = {name: Sampler.named(name) for name in samplers}
        real = torch.from_numpy(to_uint8(data.images))
        self._extractor = build(
            FEATURES, features, images=real, labels=data.labels, device=torch.device("cpu")
        )
        self._real = feature_statistics(real, self._extractor)

    def of_stack(self, stack: StackedTraining) -> Iterator[dict[str, float]]:
        """The distance of each member's samples, by sampler.

        The member's seed decides the noise: it is the same for all members with that seed.
        """
        for member, model in self.models(stack):
            yield {
                name: self.distance(self.draw(model, stack.process, member.seed, sampler))
                for name, sampler in self.samplers.items()
            }

    def distance(self, samples: Tensor) -> float:
        """Squared Fréchet distance of samples (N, C, H, W) to the data; infinite where one is not finite."""
        if not samples.isfinite().all():
            return math.inf
        ours = feature_statistics(torch.from_numpy(to_uint8(samples)), self._extractor)
        return ours.frechet_distance(self._real)
