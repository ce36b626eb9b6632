"""The parts of `tools/host_training.py --hosts`, and a whole training of a checkout by it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host_training
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from whole_trainings import checks, colossalai_on_cpu, material, stand_ins
from whole_trainings.checks import Check, Result
from whole_trainings.hosts import image_hosts
from whole_trainings.recording import Record, Recorder
from whole_trainings.runs import Run, Script

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.hosts
@pytest.mark.parametrize(
    ("name", "unchecked"),
    [
        ("Latte train.py", set()),
        ("DiT", {"resume"}),
        ("fast-DiT", {"resume"}),
        ("SiT", {"resume"}),
        ("LightningDiT", set()),
        ("REPA", set()),
        ("guided-diffusion", set()),
        ("MDT", set()),
        ("OpenDiT 1.0.0", set()),
        ("PixArt-alpha", set()),
        ("DiT-3D", set()),
    ],
)
def test_a_whole_training_passes_every_check(name: str, unchecked: set[str], tmp_path: Path) -> None:
    hosts = Path(os.environ["SPEEDIT_HOSTS"])
    (host,) = host_training.chosen(host_training.HOSTS, [name])
    if not (hosts / host.folder).is_dir():
        pytest.skip(f"no checkout {host.folder}")
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    tool, written = ROOT / "tools" / "host_training.py", tmp_path / "found.json"
    command = [sys.executable, str(tool), "--hosts", str(hosts), "--only", name]
    command += ["--json", str(written), "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(written.read_text())
    assert {check: result["holds"] for check, result in found["checks"].items()} == {
        check: None if check in unchecked else True for check in checks.CHECKS
    }
    assert "NCCL (gloo)" in found["stand_ins"]


class Host:
    """Trains as a diffusion object does: the model at t, and a loss for each sample."""

    def training_losses(self, model: Any, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        mse = (model(x, t) ** 2).flatten(1).mean(1)
        return {"loss": mse, "mse": mse}

    def p_sample_loop(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)


class Network(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + t.view(-1, 1)


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes what a recorder does to the calls of modules away again."""
    monkeypatch.setattr(nn.Module, "__call__", nn.Module.__call__)


@pytest.mark.usefixtures("unwatched")
class TestRecorder:
    def test_it_keeps_what_the_model_saw_and_what_was_reported(self, tmp_path: Path) -> None:
        recorder = Recorder("Network")
        host = recorder.watching(Host)()
        host.training_losses(Network(), torch.zeros(2, 3), torch.tensor([1, 2]))
        host.p_sample_loop((1,))
        recorder.record.save(tmp_path / "record.pt")
        kept = Record.load(tmp_path / "record.pt")
        assert [t.tolist() for t in kept.t] == [[1, 2]]
        # The model answers t, so its mean square is t squared.
        assert kept.terms[0]["mse"].tolist() == [1.0, 4.0]
        assert len(kept.samples) == 1

    def test_a_validation_is_not_a_step(self) -> None:
        recorder = Recorder("Network")
        with torch.no_grad():
            recorder.watching(Host)().training_losses(Network(), torch.zeros(1, 3), torch.tensor([1]))
        assert recorder.record.t == []

    def test_a_replayed_t_reaches_the_model(self) -> None:
        recorder = Recorder("Network", [torch.tensor([7, 8])])
        recorder.watching(Host)().training_losses(Network(), torch.zeros(2, 3), torch.tensor([1, 2]))
        assert recorder.record.t[0].tolist() == [7, 8]

    def test_a_step_without_the_model_is_an_error(self) -> None:
        recorder = Recorder("Other")
        with pytest.raises(RuntimeError, match="called the Other 0 times, wanted once"):
            recorder.watching(Host)().training_losses(Network(), torch.zeros(1, 3), torch.tensor([1]))

    def test_what_does_not_train_stays_as_it_is(self) -> None:
        assert Recorder("Network").watching(dict)(a=1) == {"a": 1}


def record(loss: float = 1.0, t: int = 2) -> Record:
    """A step of one sample at t, with an mse of 4 and a vb of 0.5."""
    terms = {"loss": torch.tensor([loss]), "mse": torch.tensor([4.0]), "vb": torch.tensor([0.5])}
    return Record([torch.tensor([t])], [terms])


class TestChecks:
    def test_the_loss_is_the_weighted_mse_plus_vb(self) -> None:
        # 0.25 * 4 + 0.5 = 1.5.
        weight = torch.tensor([1.0, 1.0, 0.25])
        assert checks.loss(weight, [record(1.5)], Tensor.long).holds
        # Weighing vb too would give 0.25 * 4.5 = 1.125.
        assert not checks.loss(weight, [record(1.5), record(1.125)], Tensor.long).holds
        assert not checks.loss(weight, [Record()], Tensor.long).holds

    def test_equal_steps_have_equal_t_and_losses(self) -> None:
        assert checks.same_steps(record(), record()).holds
        assert checks.same_steps(record(), record(t=1)).words == "t differs in step 0"
        # Half a millionth, about 4 steps of float32 at 1.
        near = checks.same_steps(record(), record(1.0 + 5e-7))
        assert not near.holds
        assert "the losses of step 0 differ" in near.words
        assert not checks.same_steps(Record(), Record()).holds

    def test_samples_are_equal_and_finite(self) -> None:
        first, second = (Record(samples=[torch.tensor([value])]) for value in (1.0, 2.0))
        assert checks.same_samples(first, first).holds
        assert not checks.same_samples(first, second).holds
        infinite = Record(samples=[torch.tensor([float("inf")])])
        assert not checks.same_samples(infinite, infinite).holds
        assert not checks.same_samples(Record(), Record()).holds

    def test_state_dicts_differ_by_one_bit_or_one_name(self) -> None:
        first = {"a": torch.ones(2)}
        assert checks.same_tensors(first, {"a": torch.ones(2)})
        assert not checks.same_tensors(first, {"a": torch.tensor([1.0, 1.0 + 2**-23])})
        assert not checks.same_tensors(first, {"b": torch.ones(2)})

    def test_the_law_names_draws_and_sigmas(self) -> None:
        even = torch.full((10,), 0.1)
        # One draw in each tenth is what the even law expects.
        found = checks.law(even, [(torch.arange(10) + 0.5) / 10])
        assert (found.holds, found.words) == (True, "10 draws, worst tenth 0.0 sigma (from uniform 0.0)")
        assert not checks.law(even, []).holds

    def test_the_table_has_a_mark_for_each_check(self) -> None:
        found = {"exit": Check(True, "0"), "law": Check(False, "off"), "loss": Check(None, "no mse")}
        result = Result("A host", found, stand_ins=["CUDA"], seconds=90.0)
        lines = checks.table([result]).splitlines()
        assert lines[0].split() == ["host", *checks.CHECKS, "minutes"]
        assert lines[1].split() == ["A", "host", "yes", "NO", "-", "-", "-", "-", "1.5"]
        assert "  law: off" in lines
        assert "  stand-in: CUDA" in lines
        assert not result.holds
        assert json.loads(checks.to_json([result]))[0]["checks"]["law"] == {"holds": False, "words": "off"}

    def test_a_host_of_which_nothing_was_checked_does_not_hold(self) -> None:
        assert not Result("A host", {"exit": Check(None, "no checkout")}).holds
        assert Result("A host", {"exit": Check(True, "0"), "loss": Check(None, "no mse")}).holds


class TestCommand:
    def test_names_are_found_whatever_the_case(self) -> None:
        names = [host.name for host in host_training.chosen(host_training.HOSTS, ["latte"])]
        assert names == ["Latte train.py", "Latte train_with_img.py"]
        assert host_training.chosen(host_training.HOSTS, None) == list(host_training.HOSTS)

    def test_a_whole_name_is_not_part_of_others(self) -> None:
        assert [host.name for host in host_training.chosen(host_training.HOSTS, ["dit"])] == ["DiT"]

    def test_an_unknown_name_lists_the_known_ones(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            host_training.main(["--hosts", ".", "--only", "Nobody"])
        assert "no host Nobody; known: Open-Sora 1.0.0, Latte train.py" in capsys.readouterr().err

    def test_an_absent_checkout_is_said(self, tmp_path: Path) -> None:
        result = host_training.trained(image_hosts.DiT(), tmp_path, tmp_path)
        assert result.checks["exit"] == Check(None, "no checkout facebookresearch+DiT")

    def test_a_host_that_fails_keeps_its_reason(self, tmp_path: Path) -> None:
        def train(checkout: Path, work: Path) -> Result:
            raise OSError("no space")

        (tmp_path / "a+b").mkdir()
        host = SimpleNamespace(name="A host", folder="a+b", train=train)
        assert host_training.trained(host, tmp_path, tmp_path).checks["exit"] == Check(
            False, "OSError: no space"
        )


class TestRuns:
    def run(self, work: Path, **options: Any) -> Run:
        return Run(Script(work, work, "Network", ()), "one", "train.py", [], **options)

    def test_several_processes_are_started_by_torchrun(self, tmp_path: Path) -> None:
        command = self.run(tmp_path, num_processes=2).command(tmp_path / "one.json")
        assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def test_assertions_are_left_out_on_request(self, tmp_path: Path) -> None:
        assert "PYTHONOPTIMIZE" not in self.run(tmp_path).environment()
        assert self.run(tmp_path, asserts=False).environment()["PYTHONOPTIMIZE"] == "1"

    def test_a_script_that_fails_leaves_its_code_and_last_words(self, tmp_path: Path) -> None:
        (tmp_path / "train.py").write_text("raise SystemExit('no data')\n")
        done = self.run(tmp_path).done()
        assert done.exit_code == 1
        assert done.last_words() == "SystemExit: no data"
        assert done.said("no data")
        assert done.records[0].exit_code == 1


class TestStandIns:
    def test_a_cuda_device_is_the_cpu(self) -> None:
        with stand_ins.OnCpu():
            device = torch.device("cuda", 0)
            made = torch.zeros(2, device="cuda:0").cuda().to(device)
        assert device == made.device == torch.device("cpu")

    def test_videos_come_back_as_they_were_written(self, tmp_path: Path) -> None:
        (first, second) = material.write_videos(tmp_path / "videos", 2, size=32, num_frames=4)
        assert first[1].startswith("a handwritten 0 moving ")
        assert first[0].name == "0000.mp4"
        video, _, _ = stand_ins.read_video(str(second[0]))
        assert (video.shape, video.dtype) == ((4, 3, 32, 32), torch.uint8)
        # Dark, and a bright digit: H.264 changes both a little.
        assert int(video.min()) < 30
        assert int(video.max()) > 200
        assert stand_ins.read_video(str(first[0]), output_format="THWC")[0].shape == (4, 32, 32, 3)

    def test_normalize_centres_each_channel(self) -> None:
        centred = stand_ins.Normalize([0.5, 0.0], [0.5, 2.0])(torch.ones(3, 2, 1, 1))
        assert centred[0].flatten().tolist() == [1.0, 0.5]

    def test_a_drop_path_with_a_rate_is_refused(self) -> None:
        with pytest.raises(ValueError, match="needs rate 0, got 0.1"):
            stand_ins.DropPath(0.1)

    def test_attention_stays_in_its_own_sequence(self) -> None:
        # Two sequences, of 3 queries each, and of 2 and 4 keys.
        q, k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
        bias = colossalai_on_cpu.BlockDiagonalMask.from_seqlens([3, 3], [2, 4])
        found = colossalai_on_cpu.attention(q, k, v, attn_bias=bias)
        for rows, columns in ((slice(3), slice(2)), (slice(3, 6), slice(2, 6))):
            alone = [q[:, rows], k[:, columns], v[:, columns]]
            wanted = functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in alone))
            # Sums of 8 products in float32.
            torch.testing.assert_close(found[:, rows], wanted.transpose(1, 2), rtol=1e-5, atol=1e-6)

    def test_the_small_networks_have_the_hubs_layout(self, tmp_path: Path) -> None:
        vae, t5 = material.write_vae(tmp_path / "vae"), material.write_t5(tmp_path / "t5")
        assert json.loads((vae / "config.json").read_text())["_class_name"] == "AutoencoderKL"
        assert json.loads((t5 / "config.json").read_text())["d_model"] == material.TEXT_WIDTH
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(t5)("a handwritten 3 moving left")["input_ids"]
        # Five words and the end, none of them unknown.
        assert len(tokens) == 6
        assert tokens[-1] == 1
        assert 2 not in tokens
