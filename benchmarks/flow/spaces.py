"""Feature spaces in which samples of benchmarks/flow are compared with the data.

None of them saw the training that it judges.

Dims: N samples, C channels, H x W pixels, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from speedit_plugins.trainer.evaluation.features import FeatureExtractor
from speedit_plugins.trainer.evaluation.networks import EfficientNetLite0
from speedit_plugins.trainer.logging.images import to_uint8

# Samples as the model makes them, float32 (N, C, H, W) -> features (N, D).
Space = Callable[[Tensor], Tensor]

# A Fréchet distance of 500 samples needs far fewer features than samples.
NUM_FEATURES = 64
# The ImageNet network sees images at this side: its last map then has 2 x 2 cells.
NETWORK_SIDE = 64
# Blocks of the network before the feature map, which has 80 channels and 1/16 of the side.
MAP_BLOCKS = 8


def of_images(extractor: FeatureExtractor) -> Space:
    """The space of an extractor of uint8 images, for samples in [-1, 1]."""
    return lambda samples: extractor(torch.from_numpy(to_uint8(samples)))


def of_network(network: EfficientNetLite0) -> Space:
    """`NUM_FEATURES` random directions of the ImageNet network's 1,280 features, for samples in [-1, 1]."""
    return lambda samples: of_images(network)(samples) @ directions(1280)


def directions(width: int, *, seed: int = 0) -> Tensor:
    """Random orthonormal directions (width, NUM_FEATURES): they see deviations that the data do not have.

    Principal components of the data would not.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, NUM_FEATURES, generator=generator)).Q


@torch.no_grad()
def feature_maps(network: EfficientNetLite0, images: Tensor) -> Tensor:
    """Maps (N, 80, H / 16, W / 16) inside the network, of images in [-1, 1] with a side of 64 or more."""
    # The network's own preprocessing; `read` gives no map from inside.
    inner = network._network
    x = (images.expand(-1, 3, -1, -1) + 1) * 127.5
    x = ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
    x = inner._swish(inner._bn0(inner._conv_stem(x)))
    for block in inner._blocks[:MAP_BLOCKS]:
        x = block(x)
    return x.contiguous()


@torch.no_grad()
def features_after(network: EfficientNetLite0, maps: Tensor) -> Tensor:
    """The network's last 1,280 features, (N, 1280), of maps as `feature_maps` gives them."""
    inner = network._network
    x = maps
    for block in inner._blocks[MAP_BLOCKS:]:
        x = block(x)
    features: Tensor = inner._swish(inner._bn1(inner._conv_head(x))).mean(dim=(2, 3))
    return features
