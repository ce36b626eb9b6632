"""Seconds of a guided sample: ours and the loop of facebookresearch/DiT's sample.py, in turn, equal weights.

Both make as many ancestral steps from the same noise, with guidance on three channels as in DiT's script.

Dims: B samples.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.peers.original_dit import importable
from benchmarks.speed.devices import waiting
from benchmarks.speed.wrapper_overhead import Timings, interleaved
from benchmarks.spread import Spread
from speedit_plugins.registry import MODELS, PROCESSES, build
from speedit_plugins.trainer.diffusion.sampling import sample
from speedit_plugins.trainer.models import dit  # noqa: F401 - registers the models

CHANNELS = 4
NUM_CLASSES = 1000
# The script's default, and the channels that its model guides.
GUIDANCE, GUIDED_CHANNELS = 4.0, 3


@dataclass(frozen=True)
class Samples:
    """What is drawn: B samples of a model, with latents of `edge` x `edge`, in so many steps."""

    model: str
    batch: int
    edge: int
    num_steps: int

    def __str__(self) -> str:
        shape = f"{CHANNELS} x {self.edge} x {self.edge}"
        return f"{self.batch} guided samples of {self.model}, {shape}, {self.num_steps} ancestral steps"


def measure(checkout: Path, samples: Samples, *, rounds: int, device: str = "cpu") -> Timings:
    """Times both sides once per round, in alternating order, after a round that is not counted.

    Args:
        checkout: of facebookresearch/DiT.
        samples: what each side draws in a round.
        rounds: >= 1.
        device: cpu or cuda.
    """
    with importable(checkout):
        theirs = importlib.import_module("models").DiT_models[samples.model](input_size=samples.edge)
        diffusion = importlib.import_module("diffusion").create_diffusion(str(samples.num_steps))
    # Some layers start at zero. Random weights keep special values out of every operation.
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.02)
    ours = build(MODELS, {"type": samples.model, "input_size": samples.edge})
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.to(device).eval(), ours.to(device).eval()
    process = build(PROCESSES, {"type": "SpeeDiffusion", "noise_schedule": "linear", "learn_sigma": True})
    noise = torch.randn(samples.batch, CHANNELS, samples.edge, samples.edge).to(device)
    labels = torch.arange(samples.batch).to(device)
    null = torch.full_like(labels, NUM_CLASSES)

    def host() -> None:
        both = torch.cat([noise, noise])
        diffusion.p_sample_loop(
            theirs.forward_with_cfg,
            both.shape,
            both,
            clip_denoised=False,
            model_kwargs={"y": torch.cat([labels, null]), "cfg_scale": GUIDANCE},
            device=device,
        )

    def own() -> None:
        sample(
            ours,
            process,
            noise,
            condition=labels,
            null_condition=null,
            num_steps=samples.num_steps,
            guidance_scale=GUIDANCE,
            guidance_channels=GUIDED_CHANNELS,
        )

    return interleaved(host, own, rounds, clock=waiting(device))


def told(samples: Samples, found: Timings) -> str:
    """A sentence: seconds of both, samples per second, and the ratio with its quartiles."""
    host, ours = Spread.of(found.host).median, Spread.of(found.ours).median
    ratio = Spread.of([theirs / own for theirs, own in zip(found.host, found.ours, strict=True)])
    rate = samples.batch / ours
    return (
        f"{samples}: facebookresearch/DiT {host:.3f} s, ours {ours:.3f} s ({rate:.2f} samples/s),"
        f" ratio {ratio.median:.3f} ({ratio.low:.3f}, {ratio.high:.3f}) over {len(found.ours)} rounds."
    )
