"""The command line: exit codes, messages, and what is imported when."""

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from speedit_plugins.cli import main
from speedit_plugins.trainer.config.loading import ExperimentConfig, load_config, to_yaml
from speedit_plugins.trainer.exhaustion import memory_line

REPOSITORY = Path(__file__).parents[2]
DIGITS = str(REPOSITORY / "configs/image/digits/speedit.yaml")


@pytest.fixture(autouse=True)
def _same_log_level() -> Iterator[None]:
    # `main` lowers it on ranks but the first.
    logger = logging.getLogger("speedit_plugins")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts functions in place of a trainer module, so that torch is not needed."""

    def put(name: str, **functions: Callable[..., object]) -> None:
        module = types.ModuleType(f"speedit_plugins.trainer.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


@pytest.mark.parametrize("phase", ["train", "inference", "sample", "test"])
def test_each_phase_runs_with_its_config_and_exit_code(stub: Callable[..., None], phase: str) -> None:
    seen = []

    def run(config: ExperimentConfig) -> int:
        seen.append(config)
        return 3

    homes = {"train": "training.train", "sample": "sampling.grids", "test": "sampling.evaluate"}
    stub(homes.get(phase, "sampling.inference"), **{phase: run})
    # Options may come between and after the key=value arguments.
    assert main(["seed=4", "-c", DIGITS, "reference=r.npz", "-p", phase, "log_every=7"]) == 3
    assert seen == [load_config(DIGITS, phase, ["seed=4", "reference=r.npz", "log_every=7"])]


def test_dry_run_prints_the_config_and_the_description_and_runs_nothing(
    stub: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, int | None]] = []
    fault: str | None = None

    def describe(config: ExperimentConfig, **options: int | None) -> SimpleNamespace:
        asked.append(options)
        return SimpleNamespace(text=f"seed {config.seed} described", fault=fault)

    stub("training.dry_run", describe=describe)
    common = ["-c", DIGITS, "-p", "train", "seed=4", "--dry-run"]
    assert main(common) == 0
    out = capsys.readouterr().out
    config = load_config(DIGITS, "train", ["seed=4"])
    assert out == f"{to_yaml(config)}\nseed 4 described\n"
    assert OmegaConf.create(out.split("\n\n")[0]).seed == 4
    assert main([*common, "--processes", "8", "--gpu-memory", "80GB"]) == 0
    assert main([*common, "--gpu-memory", "1.5GiB"]) == 0
    assert asked == [
        {"processes": None, "gpu_memory": None},
        {"processes": 8, "gpu_memory": 80 * 10**9},
        {"processes": None, "gpu_memory": 3 * 2**29},
    ]
    capsys.readouterr()
    # All is said first.
    fault = "no folder"
    assert main(common) == 2
    captured = capsys.readouterr()
    assert captured.out == out
    assert captured.err == "speedit: error: the data cannot be used: no folder\n"
    # Samples are drawn without them.
    assert main(["-c", DIGITS, "-p", "sample", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "4"], "--processes has no effect without -p train --dry-run"),
        (["--gpu-memory", "80GB"], "--gpu-memory has no effect without -p train --dry-run"),
        (["--dry-run", "--processes", "0"], "wanted a number of processes such as 8, got '0'"),
        (["--dry-run", "--gpu-memory", "80"], "wanted a size such as 80GB or 80GiB, got '80'"),
        (["--dry-run", "--gpu-memory", "0GB"], "wanted a size such as 80GB or 80GiB, got '0GB'"),
    ],
)
def test_options_of_a_plan_are_checked(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-c", DIGITS, "-p", "train", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "order"),
    [
        (RuntimeError("gloo: Connection closed by peer"), 3, ["wait", "tell"]),
        (FileNotFoundError("no such image"), 2, ["tell"]),
    ],
)
def test_who_lost_a_peer_tells_the_launcher_after_the_peer(
    stub: Callable[..., None], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, order: list[str]
) -> None:
    def fail(config: ExperimentConfig) -> int:
        raise error

    stub("training.train", train=fail)
    done: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("speedit_plugins.cli.time.sleep", lambda seconds: done.append("wait"))
    monkeypatch.setattr("speedit_plugins.cli._tell_launcher", lambda error: done.append("tell"))
    assert main(["-c", DIGITS, "-p", "train"]) == code
    assert done == order


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: -c/--config, -p/--phase; see speedit --help"),
        (["-c", DIGITS, "-p", "tain"], "argument -p/--phase: invalid choice: 'tain'"),
        (["-c", DIGITS, "-p", "train", "--dry"], "unrecognized arguments: --dry"),
        (["-c", DIGITS, "-p", "train", "sed=3"], "sed: unknown key; did you mean 'seed'?"),
        (["-c", "nowhere/x.yaml", "-p", "train"], "config 'nowhere/x.yaml' does not exist"),
        (["-c", DIGITS, "-p", "sample", "sample_classes=[]"], "sample_classes: wanted at least one class"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"speedit: error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_file_errors_of_a_phase_are_one_line(
    stub: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(config: ExperimentConfig) -> int:
        raise OSError(28, "No space left on device", "outputs/x")

    stub("training.train", train=full_disk)
    assert main(["-c", DIGITS, "-p", "train"]) == 2
    assert capsys.readouterr().err == "speedit: error: [Errno 28] No space left on device: 'outputs/x'\n"


def test_value_errors_of_this_package_are_one_line(
    stub: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stub("training.train", train=lambda config: load_config(DIGITS, "no\nphase"))
    assert main(["-c", DIGITS, "-p", "train"]) == 2
    assert capsys.readouterr().err.startswith("speedit: error: phase needs one of")


@pytest.mark.parametrize("fault", [ValueError("inside a library"), KeyError("x"), RuntimeError("x")])
def test_faults_keep_their_traceback(stub: Callable[..., None], fault: Exception) -> None:
    def train(config: ExperimentConfig) -> int:
        raise fault  # this file is outside the package, like a library

    stub("training.train", train=train)
    with pytest.raises(type(fault)):
        main(["-c", DIGITS, "-p", "train"])


BATCH = "lower data.batch_size (now 64), with as much more optimizer.grad_accumulation"
RECOMPUTE = "model.gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("error", "phase", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
            "train",
            f"out of memory of the device (asked for 20.00 GiB more): {BATCH}, or set {RECOMPUTE}, or set"
            " precision=bf16",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
                " to allocate 4000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "train",
            f"out of memory of the machine (asked for 4000000 bytes more): {BATCH}, or lower data.num_workers"
            f" (now 3), or set {RECOMPUTE}, or set precision=bf16",
        ),
        (
            MemoryError(),
            "sample",
            "out of memory of the machine: lower per_proc_batch_size (now 32), or set precision=bf16",
        ),
        (
            MemoryError("Unable to allocate 3.6 TiB for an array"),
            "test",
            "out of memory of the machine (asked for 3.6 TiB more): lower evaluation.batch_size (now 16)",
        ),
    ],
)
def test_a_run_out_of_memory_says_what_to_lower(
    stub: Callable[..., None], capsys: pytest.CaptureFixture[str], error: Exception, phase: str, line: str
) -> None:
    def fail(config: ExperimentConfig) -> int:
        raise error

    homes = {"train": "training.train", "sample": "sampling.grids", "test": "sampling.evaluate"}
    stub(homes[phase], **{phase: fail})
    options = ["data.batch_size=64", "data.num_workers=3", "precision=fp32", "per_proc_batch_size=32"]
    assert main(["-c", DIGITS, "-p", phase, *options]) == 2
    assert capsys.readouterr().err == f"speedit: error: {line}\n"


def test_an_evaluation_in_training_has_batches_of_its_own_to_lower() -> None:
    options = ["data.batch_size=1", "evaluate_every=5", "guidance_scale=1", "per_proc_batch_size=32"]
    config = load_config(DIGITS, "train", [*options, "precision=bf16", "model.gradient_checkpointing=true"])
    line = memory_line(torch.OutOfMemoryError("CUDA out of memory."), "train", config)
    sizes = "lower per_proc_batch_size (now 32), or lower evaluation.batch_size (now 16)"
    assert line == f"out of memory of the device: {sizes}"


def test_a_full_table_of_files_says_which_limit(
    stub: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    advice = f"the limit of this process is {limit}; raise it (ulimit -n 65536), or lower data.num_workers or"
    errors = {
        "at 0.png": OSError(errno.EMFILE, "Too many open files", "0.png"),
        "": RuntimeError("received 0 items of ancdata"),
    }
    for where, error in errors.items():

        def fail(config: ExperimentConfig, error: Exception = error) -> int:
            raise error

        stub("training.train", train=fail)
        assert main(["-c", DIGITS, "-p", "train"]) == 2
        wanted = f"speedit: error: {f'too many open files {where}'.strip()}: {advice} data.prefetch_factor\n"
        assert capsys.readouterr().err == wanted


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_phase_with_one_line_and_its_code(
    stub: Callable[..., None], capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    def wait(config: ExperimentConfig) -> int:
        os.kill(os.getpid(), number)
        return 0

    before = signal.getsignal(number)
    stub("sampling.grids", sample=wait)
    stub("training.train", train=wait)
    assert main(["-c", DIGITS, "-p", "sample"]) == code
    assert capsys.readouterr().err == "speedit: interrupted; nothing was written\n"
    assert main(["-c", DIGITS, "-p", "train"]) == code
    assert capsys.readouterr().err == "speedit: interrupted; no step was trained\n"
    assert signal.getsignal(number) is before


def test_ctrl_c_before_the_phase_says_that_nothing_was_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("speedit_plugins.trainer.config.loading.load_config", load)
    assert main(["-c", DIGITS, "-p", "train"]) == 130
    assert capsys.readouterr().err == "speedit: interrupted; nothing was started\n"


def test_the_processes_of_a_launch_say_a_common_error_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    # The level that a process with another rank sets for itself.
    monkeypatch.setattr(logging.getLogger("speedit_plugins"), "setLevel", lambda level: None)
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    said = {}
    for wrong in ("sed=1", "lr=2"):
        for rank in ("1", "0"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
            assert main(["-c", DIGITS, "-p", "train", wrong]) == 2
            said[wrong, rank] = capsys.readouterr().err
    assert said["sed=1", "1"].startswith("speedit: rank 1: error: sed: unknown key")
    assert said["lr=2", "1"].startswith("speedit: rank 1: error: lr: unknown key")
    assert said["sed=1", "0"] == said["lr=2", "0"] == ""
    for rank in ("0", "1"):
        told = json.loads((tmp_path / rank / "error.json").read_text())["message"]
        assert told["message"].startswith("UserError: lr: unknown key")
        # Its own line alone.
        assert told["extraInfo"]["py_callstack"].count("File ") == 1


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "speedit -c image/digits/speedit.yaml -p train" in capsys.readouterr().out


REFERENCE_RUN = """
import sys, types
run = types.ModuleType("speedit_plugins.trainer.training.train")
run.train = lambda config: 0
sys.modules[run.__name__] = run
from speedit_plugins.cli import main
code = main(["-c", sys.argv[1], "-p", "train", "diffusion.faster=True"])
sys.exit("torch was imported" if "torch" in sys.modules else code)
"""


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_process_reports_translated_keys(rank: str, lines: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", REFERENCE_RUN, DIGITS],
        cwd=REPOSITORY,
        env={**os.environ, "RANK": rank},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    wanted = "reference key: diffusion.faster: True -> diffusion.policy: {'type': 'speedit'}\n"
    assert ran.stderr == wanted * lines


def test_a_bad_config_fails_before_torch_is_imported() -> None:
    arguments = [sys.executable, "-X", "importtime", "tools/main.py", "-c", DIGITS, "-p", "train", "sed=1"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(arguments, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if "import time:" in line}
    assert "omegaconf" in imported
    assert not {"torch", "mmengine", "numpy"} & imported
    assert ran.stderr.splitlines()[-1].startswith("speedit: error: sed: unknown key")
