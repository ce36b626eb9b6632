"""A dataset of captioned videos that needs no download: handwritten digits moving over a dark background.

Dims: N videos, F frames, H x W pixels, S the side of a digit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.images.digits import Digits

IMAGE_SIZES = (16, 32, 64)
SPLITS = ("all", "train", "test")
DIRECTIONS = ("left", "right", "up", "down")
# Side of a digit in the source, and of what `still_digits` returns.
STILL_SIZE = 8
DARK = -1.0


class MovingDigits:
    """1,797 grey videos, each of one handwritten digit that crosses the frame in a straight line.

    A digit's side is half the frame's side. It moves from one border to the opposite one within `num_frames`
    frames, at positions rounded to whole pixels. The digits are those of `Digits`, in the source's order.
    That order goes by writer, and its last fifth is the test split.

    Args:
        image_size: 16, with digits at their original 8 x 8 pixels; 32 and 64 use enlarged digits.
        num_frames: frames per video, >= 2.
        text: samples have a caption.
        class_cond: samples have the digit as their label.
        split: "all", "train" or "test".
    """

    channels = 1
    captions = tuple(f"a handwritten {digit} moving {way}" for digit in range(10) for way in DIRECTIONS)

    def __init__(
        self,
        *,
        image_size: int = 16,
        num_frames: int = 8,
        text: bool = True,
        class_cond: bool = False,
        split: str = "all",
    ) -> None:
        if image_size not in IMAGE_SIZES:
            raise ValueError(f"MovingDigits needs image_size in {IMAGE_SIZES}, got {image_size}")
        if num_frames < 2:
            raise ValueError(f"MovingDigits needs num_frames >= 2, got {num_frames}")
        if split not in SPLITS:
            raise ValueError(f"MovingDigits needs split in {SPLITS}, got {split!r}")
        self.image_size = image_size
        self.num_frames = num_frames
        self.text = text
        self.class_cond = class_cond
        self.split = split
        self.num_classes = 10 if class_cond else 0
        digits = Digits(image_size=image_size // 2)
        num_train = len(digits) - len(digits) // 5
        part = {"all": slice(None), "train": slice(num_train), "test": slice(num_train, None)}[split]
        self.digits, self.labels = digits.images[part], digits.labels[part]  # (N, 1, S, S), (N,)

    def __len__(self) -> int:
        return len(self.digits)

    def identity(self) -> dict[str, str]:
        """A constant for each split: the digits come with their package."""
        return identify(contents=["MovingDigits", self.split])

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "video" float32 (1, F, H, W) in [-1, 1], "caption", "label" int in [0, 10).

        `generator` decides the direction, then the position perpendicular to it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"MovingDigits has {len(self)} videos, got index {index}")
        side = self.image_size // 2
        direction = DIRECTIONS[int(torch.randint(len(DIRECTIONS), (), generator=generator))]
        across = int(torch.randint(side + 1, (), generator=generator))
        video = torch.full((1, self.num_frames, self.image_size, self.image_size), DARK)
        for frame in range(self.num_frames):
            top, left = self._position(frame, direction, across)
            video[:, frame, top : top + side, left : left + side] = self.digits[index]
        digit = int(self.labels[index])
        sample: dict[str, Any] = {"video": video}
        if self.text:
            sample["caption"] = f"a handwritten {digit} moving {direction}"
        if self.class_cond:
            sample["label"] = digit
        return sample

    def _position(self, frame: int, direction: str, across: int) -> tuple[int, int]:
        """(top, left) of the digit in a frame, in pixels."""
        steps = self.num_frames - 1
        if direction in ("left", "up"):
            frame = steps - frame
        # frame * (image_size // 2) / steps, rounded in integer arithmetic.
        along = (frame * (self.image_size // 2) * 2 + steps) // (2 * steps)
        return (across, along) if direction in ("left", "right") else (along, across)


def direction_of(video: Tensor) -> list[str]:
    """Direction of motion of each video's bright part, one of DIRECTIONS.

    It is the largest component of the mean velocity. For a video without motion the result is meaningless.

    Args:
        video: (N, 1, F, H, W) in [-1, 1].
    """
    centres = _centres(video)
    time = torch.arange(centres.shape[1], dtype=torch.float64, device=video.device)
    # The least-squares slope of position over time, up to a positive factor.
    down, right = torch.einsum("f,nfd->nd", time - time.mean(), centres).unbind(1)
    numbers = torch.stack([-right, right, -down, down], dim=1).argmax(dim=1)
    return [DIRECTIONS[number] for number in numbers.tolist()]


def still_digits(video: Tensor) -> Tensor:
    """The digit of each video without its motion, in [-1, 1], (N, 1, 8, 8).

    Cuts the digit out of every frame and averages the cuts. A cut is the square with half the frame's side
    that holds the most brightness. If a digit has blank rows or columns, several squares tie; the one centred
    closest to the centre of brightness is taken. The digit is complete, but may be shifted over its blank
    lines. Cuts from frames larger than 16 x 16 are box-averaged to 8 x 8.

    Args:
        video: (N, 1, F, H, W) in [-1, 1], in one of MovingDigits' sizes.

    Raises:
        ValueError: another shape.
    """
    centres = _centres(video)  # (N, F, 2)
    size, side = video.shape[-1], video.shape[-1] // 2
    if size not in IMAGE_SIZES or video.shape[-2] != size:
        raise ValueError(
            f"still_digits needs square frames with a side in {IMAGE_SIZES}, got {tuple(video.shape)}"
        )
    # Pad with dark pixels: near the frame's border, the best cut may reach beyond it.
    border = side // 2
    padded = functional.pad(video[:, 0], (border,) * 4, value=DARK)  # (N, F, P, P)
    # In float64, sums of the source's grey levels are exact: ties are exact ties in every frame.
    light = (padded.double() + 1.0) / 2.0
    held = functional.avg_pool2d(light, (side, 1), stride=1, divisor_override=1)
    held = functional.avg_pool2d(held, (1, side), stride=1, divisor_override=1)  # (N, F, K, K)
    num_places = held.shape[-1]
    middles = torch.arange(num_places, device=video.device) - border + (side - 1) / 2
    off_row, off_column = (centres.unsqueeze(-1) - middles).square().unbind(2)  # (N, F, K) each
    # Much smaller than one grey level, 1 / 16, so that it only breaks ties.
    held = held - 1e-3 * (STILL_SIZE / side) ** 2 * (off_row.unsqueeze(-1) + off_column.unsqueeze(-2))
    best = held.flatten(2).argmax(dim=2)[:, :, None, None]  # (N, F, 1, 1)
    within = torch.arange(side, device=video.device)
    number = torch.arange(len(video), device=video.device)[:, None, None, None]
    frame = torch.arange(video.shape[2], device=video.device)[:, None, None]
    cuts = padded[number, frame, best // num_places + within[:, None], best % num_places + within]
    still = cuts.mean(dim=1, keepdim=True)  # (N, 1, S, S)
    return functional.avg_pool2d(still, side // STILL_SIZE)  # (N, 1, 8, 8)


def _centres(video: Tensor) -> Tensor:
    """Centre of brightness of each frame as (row, column) in pixels, float64 (N, F, 2).

    Pixels darker than mid-grey have no weight; otherwise a background that is not quite dark would pull the
    centre to the middle of the frame. A frame without brighter pixels has its centre in the middle.
    """
    if video.dim() != 5 or video.shape[1] != 1 or video.shape[2] < 2:
        raise ValueError(f"wanted grey videos (N, 1, F, H, W) with F >= 2, got {tuple(video.shape)}")
    bright = video[:, 0].double().clamp(min=0.0)  # (N, F, H, W)
    # An all-dark frame gets uniform weights, to avoid dividing by zero.
    bright = bright + (bright.sum(dim=(2, 3), keepdim=True) == 0)
    total = bright.sum(dim=(2, 3))
    axes = [torch.arange(length, dtype=torch.float64, device=video.device) for length in video.shape[3:]]
    row = torch.einsum("nfhw,h->nf", bright, axes[0]) / total
    column = torch.einsum("nfhw,w->nf", bright, axes[1]) / total
    return torch.stack([row, column], dim=-1)


DATASETS.register_module(name="MovingDigits", module=MovingDigits)
