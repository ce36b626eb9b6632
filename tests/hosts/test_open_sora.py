"""Open-Sora 1.0 to 1.3: the contract on stand-ins of each version, and hosts that break it."""

import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from conformance.models import SmallModel
from conformance.open_sora import OpenSoraSeam
from conformance.open_sora_flow import SpeeDFlowSeam, policy_seam
from conformance.points import check
from open_sora_standin import VERSIONS, installed


@pytest.fixture(params=VERSIONS)
def host(request: pytest.FixtureRequest) -> Iterator[OpenSoraSeam]:
    with installed(request.param):
        yield OpenSoraSeam(request.param)


@pytest.fixture(params=VERSIONS[2:])
def flow_host(request: pytest.FixtureRequest) -> Iterator[OpenSoraSeam]:
    with installed(request.param):
        yield OpenSoraSeam(request.param)


CHECKS = [each for checks in OpenSoraSeam.contract.values() for each in checks]
FLOW_CHECKS = [each for checks in SpeeDFlowSeam.contract.values() for each in checks]


@pytest.mark.parametrize("holds", CHECKS, ids=lambda each: each.__name__)
def test_contract(holds: Any, host: OpenSoraSeam) -> None:
    holds(host)


@pytest.mark.parametrize("holds", FLOW_CHECKS, ids=lambda each: each.__name__)
def test_flow_contract(holds: Any, flow_host: OpenSoraSeam) -> None:
    holds(SpeeDFlowSeam(flow_host))


def test_flow_contract_with_a_policy(flow_host: OpenSoraSeam) -> None:
    assert check(policy_seam(flow_host)) == list(range(1, 12))


def test_needs_an_open_sora_with_schedulers(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("1.2.0"):
        monkeypatch.delitem(sys.modules, "opensora.schedulers.iddpm")
        with pytest.raises(ImportError, match=r"needs Open-Sora 1\.0, 1\.1, 1\.2 or 1\.3"):
            import_module("speedit_plugins.hosts.open_sora")


@pytest.mark.parametrize("when", ["after", "instead of"])
def test_a_t_drawn_past_q_sample_raises(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    # A later version might do this. The model must never train at a t that is not the policy's.
    with installed("1.2.0"):
        host = OpenSoraSeam("1.2.0")
        scheduler = host.build()
        gaussian = import_module("opensora.schedulers.iddpm.gaussian_diffusion").GaussianDiffusion

        def redrawing(self: Any, model: Any, x_start: Any, *_: Any, **__: Any) -> Any:
            t = torch.zeros(len(x_start), dtype=torch.int64)
            if when == "after":
                self.q_sample(x_start, t)
                t = t.add_(1).remainder_(1000)
            return {"loss": model(x_start, t)}

        monkeypatch.setattr(gaussian, "training_losses", redrawing)
        with pytest.raises(ValueError, match="another t than the policy drew"):
            host.train(scheduler, SmallModel(1), host.batch())


def test_a_model_that_is_not_called_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("1.2.0"):
        host = OpenSoraSeam("1.2.0")
        scheduler = host.build()
        gaussian = import_module("opensora.schedulers.iddpm.gaussian_diffusion").GaussianDiffusion
        monkeypatch.setattr(gaussian, "training_losses", lambda *_, **__: {"loss": torch.zeros(1)})
        with pytest.raises(ValueError, match="did not call q_sample and then the model"):
            host.train(scheduler, SmallModel(1), host.batch())


def test_a_transform_that_leaves_t_at_0_is_told(flow_host: OpenSoraSeam) -> None:
    seam = SpeeDFlowSeam(flow_host)
    scheduler = seam.attached(use_timestep_transform=True)
    for num_frames, is_told in ((16, True), (17, False), (1, False)):
        frames = {**seam.pixels(6)}
        arguments = next(iter(frames.values()))
        arguments["num_frames"] = torch.full((6,), float(num_frames))
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            seam.step(scheduler, **frames)
        assert any("draws t = 0 alone" in str(note.message) for note in notes) == is_told, num_frames


def test_a_flow_that_does_not_add_noise_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("1.2.0"):
        scheduler = OpenSoraSeam("1.2.0").build("SpeeDFlow")
        monkeypatch.setattr(type(scheduler.scheduler), "training_losses", lambda *_, **__: {})
        with pytest.raises(ValueError, match="did not pass its t to add_noise"):
            scheduler.training_losses(None, torch.zeros(2, 4, 1, 1, 1))
