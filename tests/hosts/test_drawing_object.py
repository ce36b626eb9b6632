"""A diffusion object that draws t inside of its training call: what it refuses. The contract is in
test_conformance.py.
"""

from typing import Any

import pytest
import torch
from conformance.models import KeyedModel
from host_standins import HunyuanDiffusion, SpacedDiffusion, create
from torch import Tensor

from speedit_plugins import policy_of, with_policy
from speedit_plugins.hosts.entry import launched_seam
from speedit_plugins.hosts.objects import drawing_object

X = torch.zeros(6, 4, 4, 4)


class Redrawing(HunyuanDiffusion):
    """Draws again after it has noised the data."""

    def _drawn_losses(self, model: Any, x_start: Tensor, model_kwargs: Any = None, noise: Any = None) -> Any:
        noise = torch.randn_like(x_start)
        t = torch.randint(0, 1000, (len(x_start),))
        x_t = self.q_sample(x_start, t, noise=noise)
        return self.terms(model(x_t, torch.randint(0, 1000, (len(x_start),)))["x"], noise, t)


class Elsewhere(HunyuanDiffusion):
    """Noises the data by a method of its own."""

    def _drawn_losses(self, model: Any, x_start: Tensor, model_kwargs: Any = None, noise: Any = None) -> Any:
        return {"loss": x_start.mean((1, 2, 3)), "mse": x_start.mean((1, 2, 3))}


@pytest.mark.parametrize(
    ("host_class", "message"),
    [
        (Redrawing, "the model gets another t than the policy drew: .* known to work: HunyuanDiT d2cb9cd"),
        (Elsewhere, "did not call q_sample and then the model"),
    ],
)
def test_a_host_whose_t_is_not_ours(host_class: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_policy(create(host_class), "speed").training_losses(KeyedModel(1), x_start=X)


def test_the_seam_is_that_of_objects_without_an_argument_for_t() -> None:
    assert launched_seam(create(HunyuanDiffusion)) is drawing_object
    assert not drawing_object.fits(create(SpacedDiffusion))
    host = create(HunyuanDiffusion)
    del host.alphas_cumprod
    with pytest.raises(ValueError, match=r"q_sample and _wrap_model \(HunyuanDiT\)"):
        with_policy(host)


def test_a_controlnet_is_passed_on() -> None:
    host, model = with_policy(create(HunyuanDiffusion), "speed"), KeyedModel(1)
    host.training_losses(model=model, controlnet=None, x_start=X)["loss"].sum().backward()
    assert policy_of(host).num_steps == len(model.seen) == 1
