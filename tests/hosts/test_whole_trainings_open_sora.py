"""What the whole trainings of Open-Sora add to `tools/host_training.py`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from whole_trainings import stand_ins
from whole_trainings.open_sora import results
from whole_trainings.recording import Record, Recorder
from whole_trainings.runs import Script

from speedit_plugins import NoiseSchedule


class Host:
    """Trains as a rectified flow: its terms have a weighted loss alone."""

    def __init__(self, mean: Any) -> None:
        self._mean = mean

    def training_losses(self, model: Any, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {"loss": 0.5 * self._mean(model(x, t))}


class Network(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + t.view(-1, 1)


@pytest.fixture
def recorder() -> Any:
    """A recorder whose global hooks are taken away again."""
    before = dict(nn.modules.module._global_forward_pre_hooks)
    yield Recorder("Network")
    nn.modules.module._global_forward_pre_hooks.clear()
    nn.modules.module._global_forward_pre_hooks.update(before)


def test_a_flows_unweighted_loss_and_shape_are_kept(recorder: Recorder) -> None:
    host = recorder.watching(Host)(recorder.keeping(lambda x: x.mean(1)))
    host.training_losses(Network(), torch.zeros(2, 3), torch.tensor([1.0, 2.0]))
    (terms,) = recorder.record.terms
    assert (terms["mse"].tolist(), terms["loss"].tolist()) == ([1.0, 2.0], [0.5, 1.0])
    assert recorder.record.shapes == [(2, 3)]


def test_a_t_that_is_embedded_in_training_is_recorded(recorder: Recorder) -> None:
    embedding = recorder.seeing(lambda t, width: t.expand(width))
    with torch.no_grad():
        embedding(torch.tensor(0.25), 2)
    assert embedding(torch.tensor(0.75), 2).tolist() == [0.75, 0.75]
    assert [t.item() for t in recorder.record.t] == [0.75]


def test_only_another_version_of_an_imported_library_needs_a_fresh_process(tmp_path: Path) -> None:
    host = Script(tmp_path, tmp_path, "Network", (), needs=("something",))
    (host.packages / "imported_by_nobody").mkdir(parents=True)
    assert not host.replaces_imported()
    (host.packages / "torch").mkdir()
    assert host.replaces_imported()


def test_products_of_bfloat16_are_those_of_float32_rounded() -> None:
    linear = stand_ins.in_float32(functional.linear)
    x, weight = torch.randn(4, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    assert torch.equal(linear(x, weight), functional.linear(x.float(), weight.float()).bfloat16())
    assert torch.equal(linear(x.float(), weight.float()), functional.linear(x.float(), weight.float()))


def test_the_hosts_schedule_is_the_linear_one_to_float32() -> None:
    exact, hosts = NoiseSchedule.linear().alphas_cumprod, results.hosts_schedule().alphas_cumprod
    # A thousand factors, each rounded to a step of 6e-8 below 1, and a root of as many roundings of products.
    assert_close(hosts, exact, rtol=1000 * 2**-24, atol=0)
    assert not torch.equal(hosts, exact)


def drawn(shift: float, kept: float) -> Record:
    """Evenly spaced quantiles of a shifted logit-normal law, of which a share past the boundary is kept."""
    quantile = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    time = torch.sigmoid(torch.special.ndtri(quantile))
    # The SNR of 1/143 at time t is ((1 - t) / t)^2.
    late = time > 1 / (1 + (1 / 143) ** 0.5)
    time = time[~late | (torch.arange(len(time)) % round(1 / kept) == 0)]
    t = 1000 * shift * time / (1 + (shift - 1) * time)
    return Record([t], shapes=[(len(t), 4, 5, 8, 8)])


def test_the_law_of_a_thinned_flow_moves_with_the_shift() -> None:
    found = results.thinned_law([drawn(2.0, 0.2)], k=5.0, shift={5: 2.0})
    assert found.holds, found.words
    assert not results.thinned_law([drawn(2.0, 0.2)], k=5.0, shift={5: 1.0}).holds


def run(values: list[float], said: str = "") -> Any:
    record = Record([torch.tensor([value]) for value in values])
    return SimpleNamespace(records=[record], said=lambda words: words in said)


def test_a_resumed_run_draws_what_would_have_come_next() -> None:
    # With two steps an epoch, three steps end after the first of epoch 1.
    long, words = run([0.1, 0.2, 0.3, 0.4]), "Loaded checkpoint at epoch 1 step 1"
    assert results.resumed(long, run([0.4], words), 3, 2).holds
    assert not results.resumed(long, run([0.1], words), 3, 2).holds
    assert not results.resumed(long, run([0.4]), 3, 2).holds


def test_ranks_are_compared_draw_by_draw() -> None:
    first, second = Record([torch.tensor([0.1])]), Record([torch.tensor([0.2])])
    assert results.alike([first, first])
    assert not results.alike([first, second])
    assert not results.alike([Record(), Record()])
