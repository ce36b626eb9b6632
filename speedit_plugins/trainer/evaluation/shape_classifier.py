"""Features of shapes from a small classifier, and the Fréchet distance of two sets of shapes in them.

Dims: S shapes, B of them in a batch, R the side of a grid, N points, D features, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins.trainer.evaluation.distances import FeatureStatistics
from speedit_plugins.trainer.evaluation.features import draw_weights, held_out_fifth, train_classifier

# Side of the grid that shapes are brought to.
GRID = 16
_BATCH = 64


class ShapeClassifier:
    """The 32 penultimate features of a small 3D convolutional network, trained on labelled shapes.

    Training takes place in the constructor. On one machine, equal arguments give bitwise equal features. The
    global random state is neither used nor changed.

    Solids are averaged or enlarged to 16^3 voxels. Clouds become the share of their points in each of 16^3
    cells of the box around all clouds of the training. A point outside of it counts to the nearest cell.

    Args:
        shapes: solids (S, 1, R, R, R) in [-1, 1], or clouds (S, 3, N), finite, S >= 10.
        labels: int64 (S,), values 0..K-1 with K >= 2.
        seed: decides the held-out shapes, the initial weights and the order of training.
        epochs: passes over the training shapes, >= 1.

    Attributes:
        accuracy: accuracy on the held-out fifth of the shapes.

    Raises:
        ValueError: an argument is another one.
    """

    dim = 32

    def __init__(self, shapes: Tensor, labels: Tensor, *, seed: int = 0, epochs: int = 15) -> None:
        _check(shapes)
        if labels.shape != shapes.shape[:1] or labels.dtype != torch.int64 or len(shapes) < 10:
            raise ValueError(
                "a classifier of shapes needs at least 10 shapes with labels int64 (S,), got"
                f" {len(shapes)} shapes and labels {labels.dtype} {tuple(labels.shape)}"
            )
        if int(labels.min()) < 0 or int(labels.max()) < 1 or epochs < 1:
            raise ValueError(
                "a classifier of shapes needs labels 0..K-1, K >= 2, and epochs >= 1, got labels"
                f" {int(labels.min())}..{int(labels.max())} and {epochs} epochs"
            )
        self._rank = shapes.ndim
        self._box: tuple[Tensor, Tensor] | None = None
        if shapes.ndim == 3:
            ends = shapes.detach().cpu().float()
            self._box = ends.amin(dim=(0, 2))[:, None], ends.amax(dim=(0, 2))[:, None]
        generator = torch.Generator().manual_seed(seed)
        held_out, trained_on = held_out_fifth(len(shapes), generator)
        # Training needs gradients, also if the caller is under no_grad or inference_mode.
        with torch.inference_mode(mode=False), torch.enable_grad():
            self._network = _Network(self.dim, int(labels.max()) + 1, generator)
            grids, targets = self._grids(shapes), labels.cpu().clone()
            train_classifier(self._network, grids[trained_on], targets[trained_on], epochs, generator)
        found = self.classify(shapes[held_out.to(shapes.device)])
        self.accuracy = float((found == targets[held_out]).double().mean())

    @torch.no_grad()
    def __call__(self, shapes: Tensor) -> Tensor:
        """Features float32 (B, 32) of shapes of the same kind as in training."""
        features: Tensor = self._network.features(self._grids(shapes))
        return features

    @torch.no_grad()
    def classify(self, shapes: Tensor) -> Tensor:
        """The most likely class of each shape, int64 (B,)."""
        found = [self._network.head(self(part)).argmax(dim=1) for part in shapes.split(_BATCH)]
        return torch.cat(found)

    def _grids(self, shapes: Tensor) -> Tensor:
        """Grids (B, 1, 16, 16, 16) on the CPU."""
        _check(shapes)
        if shapes.ndim != self._rank:
            raise ValueError(
                f"the classifier was trained on shapes with {self._rank} axes, got {tuple(shapes.shape)}"
            )
        values = shapes.detach().cpu().float()
        if self._box is None:
            return functional.interpolate(
                functional.adaptive_avg_pool3d(values, min(GRID, values.shape[-1])), GRID
            )
        low, high = self._box
        cells = ((values - low) * (GRID / (high - low).clamp(min=1e-12))).long().clamp(0, GRID - 1)
        flat = (cells[:, 0] * GRID + cells[:, 1]) * GRID + cells[:, 2]  # (B, N)
        counts = torch.zeros(len(values), GRID**3).scatter_add_(1, flat, torch.ones(flat.shape))
        # About 1 where a surface passes: it crosses in the order of 16^2 cells.
        return (counts * (GRID**2 / values.shape[2])).reshape(-1, 1, GRID, GRID, GRID)


def frechet_shape_distance(classifier: ShapeClassifier, samples: Tensor, reference: Tensor) -> float:
    """Squared Fréchet distance of two sets of shapes in the features of a classifier, >= 0.

    It falls with the number of shapes, see `frechet_distance`: compare only distances of equal numbers.

    Args:
        classifier: trained on shapes that are in neither set.
        samples: generated shapes, as the classifier takes them; at least 2.
        reference: shapes of the data; at least 2.
    """
    first, second = (FeatureStatistics(classifier.dim) for _ in range(2))
    for statistics, shapes in ((first, samples), (second, reference)):
        for batch in shapes.split(_BATCH):
            statistics.update(classifier(batch))
    return first.frechet_distance(second)


class _Network(nn.Module):
    """Three convolutions and two linear layers on grids (B, 1, 16, 16, 16)."""

    def __init__(self, width: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        # skip_init: the default initialisation would use the global generator.
        self.features = nn.Sequential(
            nn.utils.skip_init(nn.Conv3d, 1, 16, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.utils.skip_init(nn.Conv3d, 16, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.utils.skip_init(nn.Conv3d, 32, 32, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.utils.skip_init(nn.Linear, 32 * 4**3, width),
            nn.SiLU(),
        )
        self.head = nn.utils.skip_init(nn.Linear, width, num_classes)
        draw_weights(self, generator)

    def forward(self, grids: Tensor) -> Tensor:
        """(B, 1, 16, 16, 16) to logits (B, K)."""
        logits: Tensor = self.head(self.features(grids))
        return logits


def _check(shapes: Tensor) -> None:
    is_solid = shapes.ndim == 5 and shapes.shape[1] == 1 and len(set(shapes.shape[2:])) == 1
    is_cloud = shapes.ndim == 3 and shapes.shape[1] == 3
    if not (is_solid or is_cloud) or 0 in shapes.shape:
        raise ValueError(f"wanted solids (S, 1, R, R, R) or clouds (S, 3, N), got {tuple(shapes.shape)}")
    if not bool(shapes.isfinite().all()):
        raise ValueError("the features of shapes need finite values, got NaN or infinity")
