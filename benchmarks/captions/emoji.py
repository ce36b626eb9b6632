"""Do generated emoji show what their captions say? The nearest training image tells.

Draws samples of random captions of the training set, and of the config's prompts, and looks for each
sample's nearest training image, by cosine between features of EfficientNet-Lite0 on images scaled up to
128 x 128 pixels. The network took no part in training. `top1` is the share of samples whose nearest image
has the caption, `top5` of those with it among the nearest five. `columns` counts the prompts of which at
least half of the samples are right. A network that ignores its caption has the shares in the line "chance".

Trains the config once for each seed, or reads a trained run with --run.

    python -m benchmarks.captions.emoji [--config FILE] [--run DIR] [--steps 500 1000] [--captions 50]
        [--per-caption 2] [--seeds 0] [--json OUT] [key=value ...]

Dims: N samples, M training images, D features, H x W pixels.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.trainer import build
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.images.emoji import Emoji
from speedit_plugins.trainer.evaluation.features import FeatureExtractor
from speedit_plugins.trainer.evaluation.networks import EfficientNetLite0
from speedit_plugins.trainer.logging.images import to_uint8
from speedit_plugins.trainer.sampling.conditions import Conditions, build_captions
from speedit_plugins.trainer.sampling.generator import SampleGenerator, load_generator
from speedit_plugins.trainer.training.assembly import build_trainer

CONFIG = "configs/text_to_image/emoji.yaml"
BATCH_SIZE = 64
NEAREST = 5
# Which captions are drawn: the same for every config.
CAPTION_SEED = 7


@dataclass(frozen=True)
class Shares:
    """Shares of samples, in [0, 1], whose caption the nearest, or one of the nearest five, images has."""

    top1: float
    top5: float


class NearestCaptions:
    """The captions of the training images that are nearest to a sample.

    Args:
        images: uint8 (M, H, W, C), the training set.
        captions: M different captions.
        extractor: maps uint8 images (B, H, W, C) to features (B, D).
    """

    def __init__(self, images: Tensor, captions: Sequence[str], extractor: FeatureExtractor) -> None:
        self._extractor = extractor
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._features = self._directions(images)  # (M, D)

    def ranks(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """How many training images are nearer to each sample than the one with its caption, int64 (N,).

        Args:
            images: uint8 (N, H, W, C).
            captions: N captions of the training set.

        Raises:
            ValueError: a caption is not in the training set.
        """
        if unknown := [caption for caption in captions if caption not in self._rows]:
            raise ValueError(f"the nearest image needs captions of the training set, got {unknown[0]!r}")
        likeness = self._directions(images) @ self._features.T  # (N, M)
        own = likeness.gather(1, torch.tensor([[self._rows[caption]] for caption in captions]))
        return (likeness > own).sum(dim=1)

    def _directions(self, images: Tensor) -> Tensor:
        """Features of length 1, float32 (N, D)."""
        parts = [self._extractor(part) for part in images.split(BATCH_SIZE)]
        return functional.normalize(torch.cat(parts), dim=1)


def shares(ranks: Tensor) -> Shares:
    """Shares of samples with few nearer images, from `NearestCaptions.ranks`."""
    return Shares(*(float((ranks < most).double().mean()) for most in (1, NEAREST)))


def num_right_columns(ranks: Tensor, captions: Sequence[str]) -> int:
    """Captions of which at least half of the samples are nearest to the caption's own image."""
    right: dict[str, list[bool]] = {}
    for rank, caption in zip(ranks.tolist(), captions, strict=True):
        right.setdefault(caption, []).append(rank == 0)
    return sum(2 * sum(each) >= len(each) for each in right.values())


def some_captions(captions: Sequence[str], number: int) -> list[str]:
    """`number` different captions, drawn with a fixed seed."""
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(CAPTION_SEED))
    return [captions[row] for row in order[:number].tolist()]


def main() -> None:
    """Prints a line for chance, and one for each seed and step, or for the run."""
    arguments = _arguments()
    emoji = Emoji()
    images = torch.stack([emoji.load(row, torch.Generator())["image"] for row in range(len(emoji))])
    nearest = NearestCaptions(
        torch.from_numpy(to_uint8(images)), emoji.captions, EfficientNetLite0(resize=128)
    )
    rows: list[dict[str, object]] = []
    _say(rows, {"what": "chance", "top1": 1 / len(emoji), "top5": NEAREST / len(emoji)})
    if arguments.run is not None:
        config = load_config(
            arguments.config, "sample", [*arguments.overrides, f"experiment_dir={arguments.run}"]
        )
        generator, captions, source = load_generator(config)
        prompts = Conditions(captions=captions)
        _say(rows, {"what": str(source), **_scored(generator, prompts, None, nearest, arguments)})
    else:
        for seed in arguments.seeds:
            for row in _trained(seed, arguments, nearest):
                _say(rows, row)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _trained(
    seed: int, arguments: argparse.Namespace, nearest: NearestCaptions
) -> Iterator[dict[str, object]]:
    """The scores of one training at the given steps."""
    with tempfile.TemporaryDirectory() as folder:
        steps = [f"max_training_steps={max(arguments.steps)}"] if arguments.steps else []
        options = [*arguments.overrides, f"experiment_dir={folder}", f"seed={seed}", *steps]
        config = load_config(arguments.config, "train", options)
        trainer = build_trainer(config)
        prompts = Conditions(captions=build_captions(config, trainer.loader.dataset, trainer.device))
        process = build.build_process(config, respaced=False)
        generator = SampleGenerator(trainer.model, process, trainer.inputs.encoder, config)
        seconds = 0.0
        for step in sorted(arguments.steps or [config.max_training_steps]):
            trainer.engine.model.train()
            start = time.perf_counter()
            while trainer.step < step:
                trainer.optimizer_step()
            seconds += time.perf_counter() - start
            scores = _scored(generator, prompts, trainer.averaged_weights(), nearest, arguments)
            yield {"what": f"seed {seed}, step {step}, {seconds:.0f} s", **scores}


def _scored(
    generator: SampleGenerator,
    prompts: Conditions,
    weights: dict[str, Tensor] | None,
    nearest: NearestCaptions,
    arguments: argparse.Namespace,
) -> dict[str, object]:
    """The shares of random captions, and of the config's prompts that are captions of the training set."""
    random = some_captions(Emoji().captions, arguments.captions) * arguments.per_caption
    ranks = nearest.ranks(_drawn(generator, prompts, random, weights), random)
    found = shares(ranks)
    asked = _asked(generator.config)
    asked_ranks = nearest.ranks(_drawn(generator, prompts, asked, weights), asked)
    of_prompts = shares(asked_ranks)
    return {
        "top1": found.top1,
        "top5": found.top5,
        "num_samples": len(random),
        "prompts_top1": of_prompts.top1,
        "prompts_top5": of_prompts.top5,
        "columns": num_right_columns(asked_ranks, asked),
        "num_columns": len(set(asked)),
    }


def _asked(config: ExperimentConfig) -> list[str]:
    return list(config.sample_prompts) * config.samples_per_class


def _drawn(
    generator: SampleGenerator,
    prompts: Conditions,
    names: Sequence[str],
    weights: dict[str, Tensor] | None,
) -> Tensor:
    """A sample of each caption, uint8 (N, H, W, C)."""
    conditions = Conditions(tuple(names), captions=prompts.captions)
    drawn = []
    for start in range(0, len(names), BATCH_SIZE):
        rows = torch.arange(start, min(start + BATCH_SIZE, len(names)))
        condition = conditions.of(rows, generator.device)
        drawn.append(generator.draw(condition, len(rows), weights=weights, stream=start))
    return torch.from_numpy(to_uint8(torch.cat(drawn).clamp(-1, 1)))


def _say(rows: list[dict[str, object]], row: dict[str, object]) -> None:
    rows.append(row)
    text = f"{row['what']:<34} top1 {row['top1']:.4f}  top5 {row['top5']:.4f}"
    if "columns" in row:
        text += (
            f"  prompts: top1 {row['prompts_top1']:.3f}  top5 {row['prompts_top5']:.3f}"
            f"  columns {row['columns']} of {row['num_columns']}"
        )
    print(text, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.captions.emoji",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--run", type=Path, help="a trained run of the config: read it, and train nothing")
    parser.add_argument("--steps", nargs="+", type=int, help="when samples are drawn; the last ends it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--captions", type=int, default=50, help="random captions of the training set")
    parser.add_argument("--per-caption", type=int, default=2, help="samples of each random caption")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the config")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
