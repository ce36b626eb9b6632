"""What a low-resolution input leaves open has the covariance of the sample given the input."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.trainer.diffusion.augmentation import NoiseAugmentation
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess
from speedit_plugins.trainer.low_resolution import enlarged, reduced

Load = Callable[[str], ModuleType]
SIDE, NUM_SAMPLES = 12, 1500


def flow(largest: float) -> NoiseAugmentation:
    return NoiseAugmentation(RectifiedFlow(), largest=largest)


def cosine(largest: float) -> NoiseAugmentation:
    return NoiseAugmentation(GaussianProcess(NoiseSchedule.cosine(1000)), largest=largest)


def lowered(samples: Tensor) -> Tensor:
    return enlarged(reduced(samples, 2), 2)


@pytest.fixture
def unexplained(load: Load) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = load("tasks.unexplained").unexplained
    return found


@pytest.fixture
def residual(unexplained: Callable[..., Tensor]) -> Callable[[Tensor, NoiseAugmentation], Tensor]:
    """What the input of half the side leaves open of samples."""
    generator = torch.Generator().manual_seed(1)
    return lambda samples, augmentation: unexplained(
        samples, lowered(samples), augmentation, factor=2, generator=generator
    )


def smooth() -> tuple[Tensor, Tensor]:
    """Gaussian images (N, 1, 12, 12), and their covariance, 0.8 ^ (distance in x + distance in y)."""
    places = torch.arange(SIDE, dtype=torch.float64)
    line = 0.8 ** (places[:, None] - places).abs()
    covariance = torch.kron(line, line)
    noise = torch.randn(NUM_SAMPLES, SIDE**2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = noise @ torch.linalg.cholesky(covariance).T
    return samples.float().reshape(-1, 1, SIDE, SIDE), covariance


def mean_covariance(covariance: Tensor, augmentation: NoiseAugmentation) -> Tensor:
    """The covariance of an image given its noised input, averaged over 64 levels, by whole matrices."""
    basis = torch.eye(SIDE**2).reshape(-1, 1, SIDE, SIDE)
    lower = lowered(basis).flatten(1).double().T
    levels = augmentation.levels((torch.arange(64) + 0.5) / 64)
    given = lower @ covariance @ lower.T
    found = []
    for alpha, sigma in zip(*augmentation.scales(levels), strict=True):
        seen = alpha**2 * given + sigma**2 * torch.eye(SIDE**2, dtype=torch.float64)
        across = alpha * covariance @ lower.T
        found.append(covariance - across @ torch.linalg.pinv(seen, hermitian=True, rtol=1e-10) @ across.T)
    return torch.stack(found).mean(dim=0)


@pytest.mark.parametrize(
    ("augmentation", "tolerance"), [(flow(0.0), 0.03), (flow(0.2), 0.03), (cosine(0.5), 0.06)]
)
def test_gaussian_images_keep_their_conditional_covariance(
    augmentation: NoiseAugmentation, tolerance: float, residual: Callable[..., Tensor]
) -> None:
    samples, covariance = smooth()
    wanted = mean_covariance(covariance, augmentation)
    found = residual(samples, augmentation)
    # 144 values of 1,500 samples tell the variance within 1 %. What lies beyond the 3 x 3 blocks around helps
    # the whole matrices a little more, the more the noisier the input.
    assert float(found.var(dim=0).mean()) == pytest.approx(float(wanted.diagonal().mean()), rel=tolerance)
    middle = DataSpectrum(torch.linalg.eigvalsh(wanted).clamp(min=0)).log_snr_at()
    assert DataSpectrum.of(found).log_snr_at() == pytest.approx(middle, abs=tolerance)
    # The data's own middle is nowhere near.
    assert middle > DataSpectrum.of(samples).log_snr_at() + 1


def test_detail_of_one_variance_has_its_middle_at_the_inverse(residual: Callable[..., Tensor]) -> None:
    def filled(blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    # Blocks of one value each, and detail with mean 0 in each block: the input tells the blocks alone.
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(2000, 1, 8, 8, generator=generator).cumsum(dim=2).cumsum(dim=3)
    detail = 0.3 * torch.randn(2000, 1, 16, 16, generator=generator)
    detail = detail - filled(reduced(detail, 2))
    samples = filled(blocks) + detail
    found = DataSpectrum.of(residual(samples, flow(0.0)))
    # Three of four components have the variance 0.09. Half is explained where the noise has it too.
    assert found.log_snr_at() == pytest.approx(-math.log(0.09), abs=0.05)


def test_an_input_of_noise_alone_explains_nothing(residual: Callable[..., Tensor]) -> None:
    samples, _ = smooth()

    class NoiseAlone(NoiseAugmentation):
        def levels(self, uniform: Tensor) -> Tensor:
            return torch.ones_like(uniform)

    found = residual(samples, NoiseAlone(RectifiedFlow(), largest=1.0))
    assert_close(found, samples - samples.mean(dim=0))


def test_frames_of_a_video_are_predicted_as_images(unexplained: Callable[..., Tensor]) -> None:
    samples, _ = smooth()
    # With its opposite each image has a mean of 0 over the samples, as each frame has.
    images = torch.cat([samples[:200], -samples[:200]])  # (400, 1, 12, 12)
    generator = torch.Generator()

    def as_video(values: Tensor) -> Tensor:
        first, second = values.unflatten(0, (2, 100, 2)).flatten(0, 1).unbind(1)
        return torch.stack([first, second], dim=2)  # (200, 1, 2, 12, 12)

    given = lowered(images)
    of_images = unexplained(images, given, flow(0.0), factor=2, generator=generator)
    of_videos = unexplained(as_video(images), as_video(given), flow(0.0), factor=2, generator=generator)
    assert_close(of_videos, as_video(of_images), atol=1e-5, rtol=0)
