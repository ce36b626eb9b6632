"""Small TorchScript files that are called like StyleGAN's Inception file and like the I3D file of the FVD."""

from pathlib import Path

import torch
from torch import Tensor, nn

FEATURES = 12
CLASSES = 5


class Mixed(nn.Module):
    """A layer with a first convolution and a second branch, like each of Inception's mixed layers."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 1)
        self.tower = nn.Conv2d(6, num_features - 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x)], dim=1)


class InceptionStandin(nn.Module):
    """Maps uint8 images (B, 3, H, W) to features or probabilities. Resizes as TensorFlow 1 did."""

    def __init__(
        self, mixed_name: str = "mixed_6", scale: float = 128.0, num_features: int = FEATURES
    ) -> None:
        super().__init__()
        self.scale = scale
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Conv2d(3, 6, 11, stride=18))  # 17 x 17 of 299
        self.layers.add_module(mixed_name, Mixed(num_features))
        self.layers.add_module("pool2", nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(num_features, CLASSES)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        # Pixel i of the result interpolates the two image pixels around i H / 299. Rows come first.
        x = self.between(self.between(img.float(), 2), 3)
        features = self.layers((x - 128.0) / self.scale).flatten(1)
        if return_features:
            return features
        logits = features @ self.output.weight.t()
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(dim=1)

    def between(self, x: Tensor, dim: int) -> Tensor:
        place = torch.arange(299, dtype=torch.float64) * (x.shape[dim] / 299.0)
        lower = place.floor().long()
        upper = (lower + 1).clamp(max=x.shape[dim] - 1)
        share = (place - lower).float()
        if dim == 2:
            share = share.unsqueeze(1)
        return x.index_select(dim, lower) * (1 - share) + x.index_select(dim, upper) * share


class I3dStandin(nn.Module):
    """Maps float videos (B, 3, F, H, W) to the mean of each colour: of the video, and of its last frame."""

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        assert x.shape[3] == 224
        assert x.shape[4] == 224
        return torch.cat([x.mean(dim=[2, 3, 4]), x[:, :, -1].mean(dim=[2, 3])], dim=1)


def save_script(module: nn.Module, path: Path) -> str:
    """Scripts the module in evaluation mode and saves it. Returns the path as a string, for a config."""
    torch.jit.script(module.eval()).save(str(path))
    return str(path)


def save_inception(path: Path, mixed_name: str = "mixed_6", num_features: int = FEATURES) -> str:
    """Saves an `InceptionStandin` with fixed weights. Returns the path as a string."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save_script(InceptionStandin(mixed_name, num_features=num_features), path)
