"""How good a contestant of benchmarks/race is: the squared Fréchet distance of its samples to the data.

Everybody's samples are drawn by the same sampler of ours for their kind of process, with as many calls of the
model: Heun for flows, DPM-Solver++ for models of noise. They are compared in spaces that neither a training
nor a teacher uses: the features of a classifier of the data's classes, trained here on whole images, and
pixels averaged over 8 x 8 cells.

Dims: N samples, C channels, H x W pixels, K classes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.flow.spaces import Space, of_images
from benchmarks.image_sets import ImageSet, spread_labels
from benchmarks.race.training import Training
from speedit_plugins.trainer.data.loader import stream_seed
from speedit_plugins.trainer.diffusion.sampling import sample
from speedit_plugins.trainer.evaluation.distances import FeatureStatistics
from speedit_plugins.trainer.evaluation.features import Pixels

# Real images that the samples are compared with, and those that the classifier is trained on.
NUM_REFERENCE, NUM_TAUGHT = 8000, 10_000
_SAMPLES = 3
FEATURES = 64


class Quality:
    """Draws samples of trainings and measures their distance to the data.

    Args:
        data: what is trained on; labels of samples have its proportions.
        num_samples: N.
        num_calls: calls of the model for a sample; odd, as Heun's steps need two each but the last.
        folder: keeps the classifier, so that a resumed race measures with the same one.
        device: of the sampling.
    """

    def __init__(
        self, data: ImageSet, *, num_samples: int, num_calls: int, folder: Path, device: str = "cpu"
    ) -> None:
        if num_calls < 3 or num_calls % 2 == 0:
            raise ValueError(f"num_calls needs to be odd and >= 3, got {num_calls}")
        assert data.labels is not None
        self._device, self._num_calls = device, num_calls
        self._shape = (num_samples, *data.images.shape[1:])
        self._labels = spread_labels(data.labels, num_samples).to(device)
        self._spaces = spaces_of(data, folder)
        real = data.images[:: max(1, len(data.images) // NUM_REFERENCE)]
        self._real = {name: FeatureStatistics.of(space(real)) for name, space in self._spaces.items()}

    def distances(self, training: Training, seed: int) -> dict[str, float]:
        """Space -> distance of samples that start at the seed's noise."""
        return self.of(self.draw(training, seed))

    def draw(self, training: Training, seed: int) -> Tensor:
        """Samples (N, C, H, W) on the CPU, of the averaged weights."""
        generator = torch.Generator().manual_seed(stream_seed(seed, _SAMPLES))
        is_flow = training.process.prediction_type == "flow"
        found = sample(
            training.denoiser(),
            training.process,
            torch.randn(self._shape, generator=generator).to(self._device),
            condition=self._labels,
            sampler="heun" if is_flow else "dpm_solver",
            num_steps=(self._num_calls + 1) // 2 if is_flow else self._num_calls,
            clip_sample=True,
        )
        return found.cpu()

    def of(self, samples: Tensor) -> dict[str, float]:
        """Space -> distance of samples (N, C, H, W); infinite if one is not finite."""
        if not samples.isfinite().all():
            return dict.fromkeys(self._spaces, float("inf"))
        found = {}
        for name, space in self._spaces.items():
            ours, real = FeatureStatistics.of(space(samples)), self._real[name]
            found[name] = ours.frechet_distance(real)
        return found


def spaces_of(data: ImageSet, folder: Path) -> dict[str, Space]:
    """The spaces; the first one decides the race."""
    classifier = Classifier(data.images.shape[1], data.num_classes)
    path = folder / "classifier.pt"
    if path.exists():
        classifier.load_state_dict(torch.load(path, weights_only=True))
    else:
        classifier.teach(data)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(classifier.state_dict(), path)
    return {"classifier": classifier.features_of, "pixels@8": of_images(Pixels(pool=8))}


class Classifier(nn.Module):
    """A small convolutional network over whole images; its last 64 features are a space.

    The embedded `DigitClassifier` sees images averaged to 8 x 8, where details are gone.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4, FEATURES),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, num_classes))

    def teach(self, data: ImageSet, *, epochs: int = 2, batch_size: int = 64, seed: int = 0) -> None:
        """Trains on at most `NUM_TAUGHT` images; the same data give the same network."""
        assert data.labels is not None
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)
        every = -(-len(data.images) // NUM_TAUGHT)
        images, labels = data.images[::every], data.labels[::every]
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(batch_size):
                loss = F.cross_entropy(self.head(self.body(images[rows])), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def features_of(self, images: Tensor) -> Tensor:
        """Features (N, 64) of images (N, C, H, W) in [-1, 1]."""
        return torch.cat([self.body(part) for part in images.split(500)])


def reach(distances: Mapping[str, float]) -> float:
    """The distance that decides the race: of the first space."""
    return next(iter(distances.values()))


Measure = Callable[[Training, int], dict[str, float]]
