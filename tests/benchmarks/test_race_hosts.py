"""The race's peers from their real checkouts: their conventions, sizes, and steps."""

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow

Load = Callable[[str], ModuleType]

PEERS = ["facebookresearch/DiT", "fast-DiT", "SpeeD reference", "MDT", "SiT", "REPA", "LightningDiT"]

pytestmark = pytest.mark.hosts


@pytest.fixture
def hosts() -> Path:
    return Path(os.environ["SPEEDIT_HOSTS"])


@pytest.fixture
def eager() -> Iterator[None]:
    """LightningDiT compiles itself: a minute that no test here needs."""
    with torch.compiler.set_stance("force_eager"):
        yield


def peer_of(load: Load, name: str, hosts: Path) -> Any:
    peer = next(peer for peer in load("race.hosts").PEERS if peer.name == name)
    if missing := peer.missing(hosts):
        pytest.skip(f"no checkout {', '.join(missing)}")
    return peer


def step(contestant: Any) -> None:
    with contestant.turn():
        contestant.step()


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_goes_on_from_its_state_as_if_it_had_not_stopped(
    load: Load, hosts: Path, tmp_path: Path, eager: None, name: str
) -> None:
    peer = peer_of(load, name, hosts)
    training = load("race.training")
    net = training.Net(16, 1, 10, width=32, depth=2, num_heads=2, patch_size=4)
    digits = load("image_sets").load_image_set("digits", 16)
    terms = training.Terms(batch_size=4, ema_halflife=2.0)
    x, y = torch.randn(2, 1, 16, 16), torch.tensor([1, 2])

    def shown(contestant: Any) -> torch.Tensor:
        t = torch.tensor([100, 900])
        with torch.no_grad():
            return contestant.denoiser()(x, t.float() if contestant.process.learn_sigma is False else t, y)

    whole, half, rest = (peer.train(hosts, net, digits, terms) for _ in range(3))
    first = shown(whole)
    # In turns: neither draws the other's random numbers.
    for contestant in (whole, half, whole, half):
        step(contestant)
        torch.rand(1)
    half.save(tmp_path)
    step(whole)
    rest.load(tmp_path)
    step(rest)
    assert torch.equal(shown(rest), shown(whole))
    assert not torch.equal(first, shown(whole))
    channels = 1 if whole.process.prediction_type == "flow" else 2
    assert first.shape == (2, channels, 16, 16)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_as_many_parameters_as_ours(load: Load, hosts: Path, eager: None, name: str) -> None:
    peer, training = peer_of(load, name, hosts), load("race.training")
    net = training.Net(32, 1, 10)
    wanted = load("race.__main__")._num_parameters(net)
    assert 1e6 < wanted < 5e6
    found = peer.model(hosts, peer.matched(hosts, net, wanted))
    own, extra = training.count_parameters(found, peer.training_only)
    # Widths come in steps of 16, and MDT has more blocks.
    assert abs(own / wanted - 1) < 0.06
    assert (extra > 0) == (name == "REPA")


def ours_of(data: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> Any:
    ones = torch.ones_like(time)
    draw = TimestepDraw((1000 * time).long(), time, ones)
    return RectifiedFlow().corrupt(data, draw, noise=noise)


class TestConventions:
    """A peer's time and velocity, and what `denoise` makes of them, are ours."""

    data, noise, time = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0.1, 0.5, 0.9])

    @pytest.mark.parametrize("name", ["SiT", "LightningDiT"])
    def test_of_a_path_from_noise(self, load: Load, hosts: Path, name: str) -> None:
        peer = peer_of(load, name, hosts)
        checkout = hosts / peer.checkouts[0]
        with load("peers.original_dit").importable(
            checkout, instead=load("peers.original_dit").unused("torchdiffeq")
        ):
            path = importlib.import_module("transport.path").ICPlan()
        _, x_t, velocity = path.plan(1 - self.time, self.noise, self.data)
        ours = ours_of(self.data, self.noise, self.time)
        assert_close(x_t, ours.x_t)
        seen = []

        def model(x: torch.Tensor, t: torch.Tensor, labels: None) -> torch.Tensor:
            seen.append(t)
            return velocity

        assert_close(load("race.hosts")._denoise_from_noise(model, x_t, ours.timestep, None), ours.target)
        assert_close(seen[0], 1 - self.time)

    def test_of_repa(self, load: Load, hosts: Path) -> None:
        peer = peer_of(load, "REPA", hosts)
        with load("peers.original_dit").importable(hosts / peer.checkouts[0]):
            alpha, sigma, d_alpha, d_sigma = importlib.import_module("loss").SILoss().interpolant(0.3)
        ours = ours_of(self.data, self.noise, torch.full((3,), 0.3))
        assert_close(alpha * self.data + sigma * self.noise, ours.x_t)
        assert_close(d_alpha * self.data + d_sigma * self.noise, ours.target)

    def test_of_mdt(self, load: Load, hosts: Path) -> None:
        peer = peer_of(load, "MDT", hosts)
        training = load("race.training")
        net = training.Net(8, 1, 10, width=16, depth=2, num_heads=2, patch_size=4)
        contestant = peer.train(hosts, net, load("image_sets").load_image_set("digits", 8), training.Terms())
        theirs = torch.from_numpy(contestant._loop.diffusion.alphas_cumprod)
        assert_close(theirs, contestant.process.schedule.alphas_cumprod, rtol=1e-12, atol=0)


def test_the_teacher_has_a_feature_for_each_token(load: Load, hosts: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    found = load("race.hosts").Teacher(4, "cpu")(torch.rand(2, 1, 32, 32) * 2 - 1)
    assert found.shape == (2, 16, load("race.hosts").TEACHER_WIDTH)
