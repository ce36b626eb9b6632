"""What a host needs and a CPU or this environment lacks: CUDA, NCCL, torchvision, timm, xformers, decord.

Everything here is put in place for the rest of the process, before the host's script starts.

Dims: B batch, F frames, C channels, H height, W width, N tokens, D width.
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from fractions import Fraction
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from conformance import diffusers_stand_ins
from conformance.stand_ins import StandIns
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from speedit_plugins.trainer.data.videos.files import read_frames, read_header, write_mp4

ROOT = Path(__file__).resolve().parents[2]
# The pictures (B, C, H, W) that were given to `save_image`.
SAVED: list[Tensor] = []
# Imported by the hosts, and never called in these trainings.
UNUSED = ("decord", "wandb", "imageio", "apex", "pandarallel", "fairscale")
# Without AVX-512 they take up to 25 times longer in bfloat16.
PRODUCTS = ("conv2d", "conv3d", "linear", "scaled_dot_product_attention")
COMMON = (
    "torch.cuda (present, device 'cpu')",
    "NCCL (gloo)",
    "bfloat16 products and convolutions (float32, rounded afterwards)",
    "DistributedDataParallel (without device_ids)",
    "timm (its layers)",
    "torchvision (its transforms; folders of images by PIL, videos by PyAV)",
    "torch.compile (none: it would cost minutes)",
    "torch.load (reads argparse.Namespace, as before torch 2.6)",
    "ftfy and bs4 (the captions are plain text)",
    "imported, never called: " + ", ".join(UNUSED),
)


class OnCpu(TorchFunctionMode):
    """Every torch call that names a CUDA device gets the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.cuda:
            return args[0]
        if func is torch.device and _on_cpu(args[0]) is not args[0]:
            return torch.device("cpu")
        placed = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **placed)


def in_float32(function: Any) -> Any:
    """A product that is computed in float32 if it is one of bfloat16."""

    @functools.wraps(function)
    def computed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype is not torch.bfloat16:
            return function(x, *args, **kwargs)
        named = {name: _wide(value) for name, value in kwargs.items()}
        return function(x.float(), *map(_wide, args), **named).bfloat16()

    return computed


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("cpu") if is_cuda or (isinstance(value, str) and value.startswith("cuda")) else value


class DeviceCount(int):
    """One device for each rank, as mmengine wants it. `rank % count` is the device that DiT trains on."""

    def __rmod__(self, rank: int) -> Any:
        return torch.device("cpu")


class Normalize:
    """(video - mean) / std over the channels of (..., C, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self._mean) / self._std


class DropPath(nn.Module):
    """timm's class at a rate of 0, the only one that these trainings use."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if rate:
            raise ValueError(f"the stand-in for DropPath needs rate 0, got {rate}")

    def forward(self, x: Tensor) -> Tensor:
        return x


@functools.cache
def read_video(
    filename: str, pts_unit: str = "sec", output_format: str = "TCHW"
) -> tuple[Tensor, None, dict]:
    """A video as uint8 (F, C, H, W), without sound. All of them fit into memory."""
    count = read_header(Path(filename)).num_frames
    images = read_frames(Path(filename), range(count), num_frames=count)
    pixels = torch.stack([(diffusers_stand_ins.to_tensor(image) * 255).round().byte() for image in images])
    if output_format == "THWC":
        pixels = pixels.permute(0, 2, 3, 1)
    return pixels, None, {"video_fps": 8.0}


def read_image(path: str) -> Image.Image:
    """torchvision's `pil_loader`."""
    return Image.open(path).convert("RGB")


def write_video(filename: str, video_array: Tensor, fps: float, **_: Any) -> None:
    """Writes uint8 (F, H, W, C)."""
    write_mp4(Path(filename), video_array, fps=fps)


class ImageFolder(torch.utils.data.Dataset[tuple[Any, int]]):
    """The images below `root`, with the number of their folder as the label."""

    def __init__(self, root: str, transform: Any = None) -> None:
        folders = sorted(path for path in Path(root).iterdir() if path.is_dir())
        files = [sorted(folder.iterdir()) for folder in folders]
        self.samples = [(path, label) for label, paths in enumerate(files) for path in paths]
        self._transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        image: Any = Image.open(path).convert("RGB")
        return image if self._transform is None else self._transform(image), label


class CIFAR10(ImageFolder):
    """A folder of images, with the arguments of torchvision's class."""

    def __init__(self, root: str, transform: Any = None, download: bool = False) -> None:
        super().__init__(root, transform)


def save_image(images: Tensor, path: str, **_: Any) -> None:
    """Keeps pictures (B, C, H, W) in `SAVED`, in place of a file."""
    SAVED.append(images.detach().float().clone())


def make_grid(images: Tensor, **_: Any) -> Tensor:
    """Keeps pictures (B, C, H, W) in `SAVED`. Returns them side by side."""
    save_image(images, "")
    return torch.cat(list(images), dim=-1)


def install_common() -> list[str]:
    """Puts what every host here needs in place. Returns its names."""
    # They look at what is installed when they are imported, so this comes before the stand-ins.
    for name in ("diffusers.models", "diffusers.optimization", "transformers"):
        import_module(name)
    import_module("diffusers").AutoencoderKL, import_module("transformers").T5EncoderModel  # noqa: B018 - lazy
    sys.modules.update(_torchvision())
    sys.modules.update(_timm())
    sys.modules["ftfy"] = module_with("ftfy", fix_text=_same)
    sys.modules["bs4"] = module_with("bs4", BeautifulSoup=lambda text, **_: SimpleNamespace(text=text))
    sys.meta_path.append(StandIns(UNUSED))
    _without_cuda()
    return list(COMMON)


def install_on_cpu() -> list[str]:
    """Lets a host that runs on a CPU by itself import PyPI's torchvision. Returns what was replaced.

    That is built for CUDA, and beside a CPU's torch none of its kernels load. Then it fails where it
    describes them to the compiler.
    """
    register: Any = torch.library.register_fake

    def registered(operator: Any, *args: Any, **options: Any) -> Any:
        if str(operator).startswith("torchvision::"):
            return _same
        return register(operator, *args, **options)

    torch.library.register_fake = registered
    return ["torchvision's kernels (none is called)"]


def module_with(name: str, **contents: Any) -> ModuleType:
    """A module of this name that counts as installed."""
    module = ModuleType(name)
    # Libraries look at the spec to see what is installed.
    vars(module).update(contents, __spec__=ModuleSpec(name, None), __path__=[], __version__="0")
    return module


def _torchvision() -> dict[str, ModuleType]:
    modules = diffusers_stand_ins.stand_ins()
    top, transforms = modules["torchvision"], modules["torchvision.transforms"]
    vars(transforms).update(Normalize=Normalize, RandomResizedCrop=diffusers_stand_ins.RandomCrop)
    vars(transforms).update(Lambda=_same)
    functional = modules["torchvision.transforms.functional"]
    vars(functional).update(InterpolationMode=diffusers_stand_ins.Interpolation)
    video = module_with("torchvision.io", read_video=read_video, write_video=write_video)
    video_file = module_with("torchvision.io.video", read_video=read_video, write_video=write_video)
    # What Open-Sora 1.2 and 1.3 take of torchvision's own reader, beside the public functions.
    backend = SimpleNamespace(default_timebase=Fraction(0, 1))
    vars(video_file).update(_video_opt=backend, _read_from_stream=_frames, _align_audio_frames=_refused)
    vars(video_file).update(_log_api_usage_once=_nothing, _check_av_available=_nothing)
    utils = module_with("torchvision.utils", save_image=save_image, make_grid=make_grid)
    # What a host's CSV data set needs beside the videos.
    folder = module_with(
        "torchvision.datasets.folder", IMG_EXTENSIONS=(".png", ".jpg"), pil_loader=read_image
    )
    vars(folder).update(default_loader=_refused)
    download = module_with("torchvision.datasets.utils", download_url=_refused)
    datasets = module_with("torchvision.datasets", folder=folder, utils=download)
    vars(datasets).update(ImageFolder=ImageFolder, CIFAR10=CIFAR10)
    vars(top).update(io=video, utils=utils, datasets=datasets, get_video_backend=lambda: "pyav")
    added = (video, video_file, utils, folder, download, datasets)
    kept = (top, transforms, functional, *added)
    return {module.__name__: module for module in kept}


def _frames(container: Any, *_: Any) -> list[Any]:
    return list(container.decode(video=0))


def _same(value: Any) -> Any:
    return value


def _refused(*_: Any, **__: Any) -> Any:
    raise RuntimeError("these trainings do without this function of torchvision")


def _timm() -> dict[str, ModuleType]:
    # By its path: a host may have a package `benchmarks` of its own.
    spec = spec_from_file_location("original_dit", ROOT / "benchmarks" / "peers" / "original_dit.py")
    assert spec is not None
    assert spec.loader is not None
    original = module_from_spec(spec)
    spec.loader.exec_module(original)

    class Mlp(original.Mlp):
        """With timm's argument for another width of the result."""

        def __init__(
            self,
            in_features: int,
            hidden_features: int,
            out_features: int | None = None,
            act_layer: Any = nn.GELU,
            drop: float = 0.0,
        ) -> None:
            super().__init__(in_features, hidden_features, act_layer, drop)
            if out_features is not None:
                self.fc2 = nn.Linear(hidden_features, out_features)

    class Attention(original.Attention):
        """With timm's switch for norms of queries and keys, off."""

        def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, qk_norm: bool = False) -> None:
            if qk_norm:
                raise ValueError("the stand-in for timm's Attention has no qk_norm")
            super().__init__(dim, num_heads, qkv_bias)

    layers = module_with("timm.models.vision_transformer", PatchEmbed=original.PatchEmbed, Mlp=Mlp)
    vars(layers).update(Attention=Attention)
    others = module_with("timm.models.layers", DropPath=DropPath, trunc_normal_=nn.init.trunc_normal_)
    vars(others).update(to_2tuple=lambda value: (value, value))
    # ImageNet's.
    statistics = {"MEAN": (0.485, 0.456, 0.406), "STD": (0.229, 0.224, 0.225)}
    data = module_with("timm.data", **{f"IMAGENET_DEFAULT_{name}": each for name, each in statistics.items()})
    timm = (module_with("timm"), module_with("timm.models"), layers, others, data)
    return {module.__name__: module for module in timm}


def _without_cuda() -> None:
    ddp, start = nn.parallel.DistributedDataParallel, dist.init_process_group

    class OnGloo(ddp):
        def __init__(
            self, module: nn.Module, device_ids: Any = None, output_device: Any = None, **options: Any
        ) -> None:
            super().__init__(module, **options)

    def with_gloo(backend: str | None = None, **options: Any) -> None:
        start("gloo", **options)

    nn.parallel.DistributedDataParallel = OnGloo  # type: ignore[misc]  # a stand-in
    vars(nn.parallel.distributed)["DistributedDataParallel"] = OnGloo
    dist.init_process_group = with_gloo
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, _nothing)
    torch.compile = uncompiled
    torch.serialization.add_safe_globals([argparse.Namespace])
    # accelerate would look for the device itself.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: DeviceCount(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.cuda.current_device = lambda: 0
    Tensor.pin_memory = _same  # type: ignore[method-assign]  # a CPU has no pinned memory
    for name in PRODUCTS:
        setattr(functional, name, in_float32(getattr(functional, name)))
    OnCpu().__enter__()


def uncompiled(model: Any = None, **_: Any) -> Any:
    """`torch.compile`, as a function and as a decorator, that leaves everything as it is."""
    return uncompiled if model is None else model


def _nothing(*_: Any, **__: Any) -> None:
    """A CPU has done an operation when it returns."""
