"""Faults of a config, a command line, and paths."""

from collections.abc import Callable, Sequence

from benchmarks.faults.bench import Bench, Fault, Outcome

Act = Callable[[Bench], Outcome]


def over(*overrides: str, phase: str = "train") -> Act:
    """Runs a phase with these overrides."""
    return lambda bench: bench.speedit(*overrides, phase=phase)


def after_training(*overrides: str, phase: str = "sample") -> Act:
    """Runs a phase on a trained run, with these overrides."""

    def act(bench: Bench) -> Outcome:
        bench.trained()
        return bench.speedit(*overrides, phase=phase)

    return act


def written(text: str, *overrides: str) -> Act:
    """Runs train with this text as the config."""

    def act(bench: Bench) -> Outcome:
        path = bench.folder / "own.yaml"
        path.write_text(text)
        return bench.command([*bench.arguments(config=path)[:6], "--dry-run", *overrides])

    return act


def _wrong_key(override: str, wanted: str) -> Fault:
    key = override.partition("=")[0]
    return Fault(f"the key `{key}`", over(override), (rf"{key}: unknown key; [^;]*\b{wanted}\b",))


_MINIMAL = """\
experiment_dir: outputs/mine
image_size: 8
num_classes: 10
model: {type: DiT, input_size: 8, patch_size: 2, in_channels: 1, hidden_size: 32, depth: 1, num_heads: 4}
encoder: {type: Pixels, channels: 1}
max_training_steps: 4
"""
_DATA = "data: {dataset: {type: Digits}, batch_size: 8}\n"

KEYS: Sequence[Fault] = (
    _wrong_key("max_steps=10", "max_training_steps"),
    _wrong_key("steps=10", "max_training_steps"),
    _wrong_key("epochs=3", "max_training_steps"),
    _wrong_key("batch_size=8", r"data\.batch_size"),
    _wrong_key("lr=1e-3", r"optimizer\.lr"),
    _wrong_key("learning_rate=1e-3", r"optimizer\.lr"),
    _wrong_key("optimizer.lerning_rate=1e-3", r"optimizer\.lr"),
    _wrong_key("output_dir=here", "experiment_dir"),
    _wrong_key("guidance=4", "guidance_scale"),
    _wrong_key("save_every=5", "ckpt_every"),
    _wrong_key("num_workers=2", r"data\.num_workers"),
    Fault("the optimizer `adamw`", over("optimizer.type=adamw"), ("optimizer.type", "AdamW")),
    Fault("the model `DIT`", over("model.type=DIT"), ("did you mean 'DiT'",)),
    Fault("the policy `sped`", over("diffusion.policy.type=sped"), ("did you mean 'speed",)),
    Fault("the dataset `Digit`", over("data.dataset.type=Digit"), ("did you mean 'Digits'",)),
    Fault("the sampler `ddmi`", over("sampler.type=ddmi", phase="sample"), (r"sampler\.type", "ddim")),
    Fault("the precision `float16`", over("precision=float16"), ("precision", "fp16")),
    Fault("the device `gpu`", over("device=gpu"), ("device", "cuda")),
    Fault("CUDA on a machine without", over("device=cuda"), ("device: cuda",)),
    Fault("a seed that is no number", over("seed=abc"), ("seed", "abc")),
    Fault("a batch of 0", over("data.batch_size=0"), (r"data\.batch_size",)),
    Fault("a learning rate below 0", over("optimizer.lr=-1"), (r"optimizer\.lr",)),
    Fault("more sampler steps than timesteps", over("sampler.num_steps=5000", phase="sample"), ("1000",)),
    Fault("an image side that the patch does not divide", over("image_size=16", "model.patch_size=3")),
    Fault("fewer classes than the data have", over("num_classes=5"), ("num_classes", "10")),
    Fault("more classes than the model embeds", over("model.num_classes=3"), ("num_classes",)),
    Fault("heads that do not divide the width", over("model.num_heads=5"), ("num_heads",)),
    Fault("a class that is not there", over("sample_classes=[10]", phase="sample"), ("sample_classes",)),
    Fault("a class by a name that is not there", after_training("sample_classes=[cat]"), ("cat",)),
    Fault("no number of steps", over("max_training_steps=0"), ("max_training_steps",)),
    Fault("an option without effect", over("optimizer.min_lr=1e-5"), ("min_lr", "no effect")),
    Fault("guidance in a model without classes", over("num_classes=0", phase="sample"), ("guidance_scale",)),
)

COMMANDS: Sequence[Fault] = (
    Fault("an override without `=`", over("precision"), ("precision", "key=value")),
    Fault(
        "the phase `Train`",
        lambda bench: bench.command([*bench.arguments()[:5], "Train"]),
        ("train", "Train"),
    ),
    Fault(
        "a config that is not there",
        lambda bench: bench.speedit(config="image/digits/speedid.yaml"),
        ("speedid", "speedit"),
    ),
    Fault("a config that is a folder", lambda bench: bench.speedit(config=bench.folder), ("folder",)),
    Fault("a tab in YAML", written("model:\n\ttype: DiT\n"), ("own.yaml", "tab|line 2")),
    Fault("a key twice in YAML", written(_MINIMAL + _DATA + "image_size: 16\n"), ("image_size",)),
    Fault("an empty config", written(""), ("own.yaml|missing",)),
    Fault("a config that is a list", written("- train\n- sample\n"), ("own.yaml",)),
    Fault("a cut config", written(_MINIMAL + "data: {dataset: {type: Dig"), ("own.yaml",)),
    Fault("a config without data", written(_MINIMAL), ("data",)),
    Fault(
        "`1e-4`, which is text in YAML 1.1",
        written(_MINIMAL + _DATA + "optimizer: {lr: 1e-4}\n"),
        ("parameters",),
        ends="well",
    ),
    Fault(
        "a module to import that is not there",
        lambda bench: bench.command([*bench.arguments(), "--import", "my_pakage.data"]),
        ("my_pakage",),
    ),
    Fault(
        "an `experiment_dir` that is a file",
        lambda bench: ((bench.folder / "run").write_text(""), bench.speedit())[1],
        ("run",),
    ),
    Fault(
        "an `experiment_dir` that cannot be made",
        over("experiment_dir=/proc/speedit"),
        ("/proc/speedit",),
    ),
    Fault("`resume` of a run that is not there", over("resume=outputs/no_run"), ("resume", "no_run")),
    Fault(
        "`resume` of a step that is not there",
        lambda bench: (
            bench.trained(),
            bench.speedit(f"resume={bench.checkpoint(3)}", "max_training_steps=6"),
        )[1],
        ("step_0000003", "step_0000004|2, 4"),
    ),
    Fault(
        "`resume` of the run's folder",
        lambda bench: (
            bench.trained(),
            bench.speedit(f"resume={bench.run_folder}", "max_training_steps=6"),
        )[1],
        ("going on from", "step_0000004"),
        ends="well",
    ),
    Fault(
        "`resume: never` over a run",
        after_training("resume=never", phase="train"),
        ("resume: never", "another experiment_dir"),
    ),
    Fault(
        "a checkpoint to sample from that is not there", over("ckpt_path=no.pt", phase="sample"), ("no.pt",)
    ),
    Fault("sampling before training", over(phase="sample"), ("checkpoint",)),
    Fault("testing before sampling", after_training(phase="test"), ("inference",)),
)
