"""Several machines: agents of torchrun that meet by the network, here the loopback one."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest
from distributed_runs import without_key_bias
from processes import BIN, Job
from runs import arguments, last_step, small_config
from torch.testing import assert_close

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.training.train import train

MAIN = Path(__file__).with_name("machine_main.py")
CONFIG = Path("configs/image/digits/speedit.yaml").absolute()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


def agent(
    name: str, port: int, options: list[str], *, num_machines: int = 2, own_folder: Path | None = None
) -> Job:
    """The agent of a machine with two ranks. The rendezvous is on node-a."""
    launcher = [
        *(BIN / "torchrun", "--nnodes", str(num_machines), "--nproc-per-node", "2", "--rdzv-id", "test"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"),
        *("--rdzv-conf", f"is_host={int(name == 'node-a')}", "--shutdown-timeout", "100000"),
    ]
    environment = {"MACHINE": name, **({} if own_folder is None else {"OWN_FOLDER": str(own_folder)})}
    return Job([*launcher, MAIN, "-c", CONFIG, "-p", "train", *options], environment)


@pytest.mark.slow
def test_two_machines_equal_one_process_and_one_goes_on_when_the_other_is_lost(
    tmp_path: Path, port: int
) -> None:
    # Without what depends on the number of processes.
    same: dict[str, Any] = {"model__class_dropout_prob": 0.0, "ckpt_every": 5}
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    # A job that waited for the timeout would wait for a day.
    endless = {"max_training_steps": 100_000, "log_every": 1, "distributed_timeout_seconds": 86_400}
    options = arguments(parts, keep_every=5, **endless, **same)
    with agent("node-a", port, options) as survivor:
        with agent("node-b", port, options):
            survivor.until(lambda: last_step(parts) >= 7)
        # Leaving the block has killed the agent of node-b and its ranks.
        output = survivor.end()
    assert survivor.process.returncode != 0
    named = re.findall(
        r"^speedit: rank (\d): lost machine (\S+) \(ranks (\d), (\d)\); if", output, re.MULTILINE
    )
    assert named, output
    for said in named:
        assert {int(said[0]), int(said[2]), int(said[3])} < set(range(4))
        assert said[1] == "node-b"
        assert said[0] not in said[2:]
    train(small_config(whole, max_training_steps=5, **same))
    found, expected = (
        without_key_bias(checkpoints.load(folder / "checkpoints" / "step_0000005").model)
        for folder in (parts, whole)
    )
    # Gradients are summed in two orders in float32, in 5 steps of less than lr = 1e-3 each.
    assert_close(found, expected, rtol=0, atol=1e-6)
    saved = checkpoints.newest_whole(checkpoints.newest_first(parts / "checkpoints"))
    assert saved is not None
    end = checkpoints.step_of(saved) + 3
    rest = arguments(parts, max_training_steps=end, log_every=1, **same)
    with agent("node-a", port, rest, num_machines=1) as alone:
        output = alone.end()
    assert alone.process.returncode == 0, output
    assert f"going on from {saved}" in output
    assert "fp32, 2 processes" in output
    assert checkpoints.damage(parts / "checkpoints" / f"step_{end:07d}") is None


@pytest.mark.slow
def test_a_folder_that_machines_do_not_share_is_refused_on_all(tmp_path: Path, port: int) -> None:
    folders = {name: tmp_path / name for name in ("node-a", "node-b")}
    for folder in folders.values():
        folder.mkdir()
    options = arguments(Path("run"))
    with (
        agent("node-a", port, options, own_folder=folders["node-a"]) as first,
        agent("node-b", port, options, own_folder=folders["node-b"]) as second,
    ):
        outputs = [job.end() for job in (first, second)]
    for job, output in zip((first, second), outputs, strict=True):
        assert job.process.returncode != 0
        said = re.findall(r"^speedit: rank \d: error: (.*)", output, re.MULTILINE)
        assert len(said) == 1, output
        assert re.match(
            rf"experiment_dir needs a folder that all processes share, got {tmp_path}/node-\w/run on node-\w"
            r" without the train\.lock that rank 0 wrote on node-\w; wanted a path on a file system of all",
            said[0],
        ), said[0]
    # What was begun is taken away.
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
