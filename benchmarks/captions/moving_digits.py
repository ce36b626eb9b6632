"""Do generated videos show what their captions say? Moving digits, one training per timestep policy.

Trains the moving-digits config once per policy, with the same seed, data order and noise, and at some steps
draws videos of all 40 captions with the averaged weights. The direction comes from the movement of the
centre of brightness. The digit is cut out, and a classifier trained on real videos of the train split reads
it. Real videos of the test split are scored too: they show what a perfect model would score.

    python -m benchmarks.captions.moving_digits [--policies uniform speedit] [--steps 300 600]
        [--per-caption 4] [--seeds 0] [--json OUT] [key=value ...]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins.trainer import build
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.videos.moving_digits import MovingDigits, direction_of, still_digits
from speedit_plugins.trainer.evaluation.features import DigitClassifier
from speedit_plugins.trainer.logging.images import to_uint8
from speedit_plugins.trainer.sampling.conditions import Conditions, build_captions
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.training.assembly import build_trainer

CONFIG = "configs/text_to_video/moving_digits.yaml"
BATCH_SIZE = 80
Score = Callable[[Tensor, list[str]], dict[str, float]]


def main() -> None:
    """Prints a line for real videos, and one for each policy, seed and step."""
    arguments = _arguments()
    score = _scorer(arguments.overrides)
    rows = [{"policy": "real test videos", **_score_of_real(score, arguments.overrides)}]
    _say(rows[-1])
    for seed in arguments.seeds:
        for policy in arguments.policies:
            for row in _trained(policy, seed, arguments, score):
                rows.append(row)
                _say(row)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _trained(
    policy: str, seed: int, arguments: argparse.Namespace, score: Score
) -> Iterator[dict[str, object]]:
    """The scores of one training at the given steps."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            *arguments.overrides,
            f"experiment_dir={folder}",
            f"seed={seed}",
            f"diffusion.policy={policy}",
            f"max_training_steps={max(arguments.steps)}",
        ]
        config = load_config(CONFIG, "train", options)
        trainer = build_trainer(config)
        captions = build_captions(config, trainer.loader.dataset, trainer.device)
        process = build.build_process(config, respaced=False)
        generator = SampleGenerator(trainer.model, process, trainer.inputs.encoder, config)
        names = list(MovingDigits.captions) * arguments.per_caption
        seconds = 0.0
        for step in sorted(arguments.steps):
            trainer.engine.model.train()
            start = time.perf_counter()
            while trainer.step < step:
                trainer.optimizer_step()
            seconds += time.perf_counter() - start
            videos = _drawn(
                generator, Conditions(tuple(names), captions=captions), trainer.averaged_weights()
            )
            yield {"policy": policy, "seed": seed, "step": step, "seconds": seconds, **score(videos, names)}


def _drawn(generator: SampleGenerator, conditions: Conditions, weights: dict[str, Tensor]) -> Tensor:
    """A video of each caption, (N, 1, F, H, W)."""
    videos = []
    for start in range(0, len(conditions.names), BATCH_SIZE):
        rows = torch.arange(start, min(start + BATCH_SIZE, len(conditions.names)))
        condition = conditions.of(rows, generator.device)
        videos.append(generator.draw(condition, len(rows), weights=weights, stream=start))
    return torch.cat(videos).clamp(-1, 1)


def _scorer(overrides: list[str]) -> Score:
    """Shares of videos that show the caption's digit, its direction, and both."""
    videos, captions = _real("train", overrides)
    labels = torch.tensor([_digit(caption) for caption in captions])
    classifier = DigitClassifier(torch.from_numpy(to_uint8(still_digits(videos))), labels)

    def score(videos: Tensor, captions: list[str]) -> dict[str, float]:
        found = classifier.classify(torch.from_numpy(to_uint8(still_digits(videos)))).tolist()
        digits = torch.tensor([a == _digit(b) for a, b in zip(found, captions, strict=True)])
        ways = direction_of(videos)
        moves = torch.tensor([b.endswith(a) for a, b in zip(ways, captions, strict=True)])
        shares = {"digit": digits, "direction": moves, "both": digits & moves}
        return {"num_videos": len(captions), **{k: float(v.double().mean()) for k, v in shares.items()}}

    return score


def _score_of_real(score: Score, overrides: list[str]) -> dict[str, float]:
    return score(*_real("test", overrides))


def _real(split: str, overrides: list[str]) -> tuple[Tensor, list[str]]:
    """Real videos (N, 1, F, H, W) of a split with their captions."""
    config = load_config(CONFIG, "train", overrides)
    dataset = MovingDigits(image_size=config.image_size, num_frames=config.num_frames, split=split)
    samples = [dataset.load(i, torch.Generator().manual_seed(i)) for i in range(len(dataset))]
    return torch.stack([sample["video"] for sample in samples]), [sample["caption"] for sample in samples]


def _digit(caption: str) -> int:
    return int(caption.split()[2])


def _say(row: dict[str, object]) -> None:
    where = f"seed {row['seed']}, step {row['step']}, {row['seconds']:.0f} s" if "step" in row else ""
    shares = "  ".join(f"{key} {row[key]:.3f}" for key in ("digit", "direction", "both"))
    print(f"{row['policy']:<17} {where:<27} {row['num_videos']:>5} videos  {shares}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.captions.moving_digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--policies", nargs="+", default=["uniform", "speedit"])
    parser.add_argument("--steps", nargs="+", type=int, default=[300, 600], help="when videos are drawn")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--per-caption", type=int, default=4, help="videos of each of the 40 captions")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the config")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
