"""What `benchmarks.gpu` does, in order of worth. Nothing heavy is imported here."""

from dataclasses import dataclass

DIT, SIT, LATTE = "facebookresearch+DiT", "willisma+SiT", "Vchitect+Latte"
SPEED, GUIDED = "NUS-HPC-AI-Lab+SpeeD", "openai+guided-diffusion"


@dataclass(frozen=True)
class Part:
    """A part of the run, in a process of its own.

    Args:
        name: of the part.
        share: its seconds in a run of 8 minutes. Time that a part leaves goes to the later ones.
        run: module and function of what it does.
        title: of its section in the report.
        about: what is measured, and how.
        least: seconds that it may take in any case.
        checkouts: folders of the peers that it compares with. Without them it measures ours alone or nothing.
    """

    name: str
    share: float
    run: str
    title: str
    about: str
    checkouts: tuple[str, ...] = ()
    least: float = 0.0


_STEPS = (
    "Whole training steps in one process, in alternating order, after three rounds that are not counted. A"
    " step lasts from an idle device to an idle device. Both sides have the same weights, the same batch in"
    " the memory of the CPU, one process without DDP, no encoder, AdamW and an EMA. Products of fp32 are TF32"
    " on both sides, as all three scripts ask for; bf16 is autocast of the model on both sides. The ratio is"
    " the peer's seconds over ours within a round: above 1, ours is faster. Peak memory is of tensors, as if"
    " the side were alone on the card. The split is the device's time in each phase. MFU counts the model's"
    " own FLOPs, without what is computed again, against the card's dense peak for that precision."
)

PARTS: tuple[Part, ...] = (
    # The first import of torch on a machine can take half a minute.
    Part("device", 10, "facts:describe_device", "The device", "What the numbers were measured on.", least=60),
    Part(
        "tests",
        150,
        "suite:run_suite",
        "Tests",
        "`pytest -m gpu`, each test by itself in the table if it did not pass.",
    ),
    Part(
        "dit-b2",
        30,
        "steps:measure_steps",
        "Training steps: DiT-B/2",
        f"{_STEPS} The peer is facebookresearch/DiT.",
        (DIT,),
    ),
    Part("dit-xl2", 55, "steps:measure_steps", "Training steps: DiT-XL/2", "As for DiT-B/2.", (DIT,)),
    Part(
        "latte",
        40,
        "steps:measure_steps",
        "Training steps: Latte",
        "As for DiT-B/2. The peer is Vchitect/Latte.",
        (LATTE,),
    ),
    Part(
        "sit-b2",
        30,
        "steps:measure_steps",
        "Training steps: a flow on DiT-B/2",
        "As for DiT-B/2. The peer is willisma/SiT, linear path and velocity; no side predicts a variance.",
        (SIT,),
    ),
    Part(
        "compiled",
        60,
        "steps:measure_steps",
        "Training steps: compiled",
        "As for DiT-B/2 in bf16, with ours a second time, with `compile: true`. The peer does not compile.",
        (DIT,),
    ),
    Part(
        "draw",
        12,
        "costs:measure_draw",
        "Draw of timesteps and weights",
        "Wall time until the device has drawn. A training does not wait for it.",
        (SPEED, GUIDED),
    ),
    Part(
        "wrappers",
        18,
        "costs:measure_wrappers",
        "What a policy adds to a step of another loop",
        "Whole steps in turn, and each seam with a model that costs nothing. Products of fp32 are TF32.",
        (DIT,),
    ),
    Part(
        "sampling",
        35,
        "quality:measure_sampling",
        "Sampling",
        "The pace beside the loop of DiT's sample.py, in turn, fp32 with TF32 products on both sides. Then"
        " model calls and seconds to samples as good as those of the SpeeD reference's 250 ancestral steps,"
        " on digits; the seconds are medians over noises for all samples together.",
        (DIT, SPEED),
    ),
    Part(
        "race",
        35,
        "quality:run_race",
        "A short race of flows",
        "`benchmarks.race` against SiT, as long as the time allows.",
        (SIT,),
    ),
)
