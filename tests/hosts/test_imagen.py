"""imagen-pytorch from PyPI: the contract, cascades, policies; torchvision, kornia, datasets are stand-ins."""

from collections.abc import Iterator

import pytest
import torch
from conformance.imagen import IMAGES, STAND_INS, TEXT, ImagenSeam, installed
from conformance.points import check

from speedit_plugins import NoiseSchedule, build_policy, policy_of, with_policy
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.objects.imagen import schedule_of_unet


@pytest.fixture(scope="module")
def host() -> Iterator[ImagenSeam]:
    with installed() as (host, used):
        assert set(used) <= set(STAND_INS)
        yield host


@pytest.mark.parametrize("point", ImagenSeam.contract)
def test_the_contract_holds(point: int, host: ImagenSeam) -> None:
    assert check(host, {point: ImagenSeam.contract[point]}) == [point]


class TestSchedule:
    def test_the_cosine_is_the_papers(self, host: ImagenSeam) -> None:
        schedule = schedule_of_unet(host.make().noise_schedulers[0])
        # alpha-bar = cos^2((t + s) / (1 + s) pi / 2) at bin midpoints; the host clamps log-SNR far below it.
        t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        expected = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
        assert torch.allclose(schedule.alpha[50:950] ** 2, expected[50:950], rtol=1e-6)

    def test_each_unet_has_its_own(self, host: ImagenSeam) -> None:
        imagen = host.make(
            unets=[host.make().unets[0] for _ in range(2)],
            image_sizes=(8, 16),
            noise_schedules=("cosine", "linear"),
            pred_objectives="noise",
        )
        with_policy(imagen)
        first, second = (part.policy.schedule.alpha for part in attachment_of(imagen).parts)
        assert not torch.allclose(first, second)
        imagen(torch.rand(2, 3, 16, 16), text_embeds=torch.randn(2, *TEXT[1:]), unet_number=2)
        assert [part.num_calls for part in attachment_of(imagen).parts] == [0, 1]


class TestPolicies:
    def test_a_built_policy_takes_any_number_of_timesteps(self, host: ImagenSeam) -> None:
        policy = build_policy("uniform", NoiseSchedule.cosine(100))
        assert attachment_of(with_policy(host.make(), policy)).parts[0].policy is policy

    def test_a_built_policy_for_several_unets_is_refused(self, host: ImagenSeam) -> None:
        imagen = host.make(unets=[host.make().unets[0] for _ in range(2)], image_sizes=(8, 16))
        with pytest.raises(ValueError, match="one for all 2 unets, and their noise schedules differ"):
            with_policy(imagen, build_policy("uniform", NoiseSchedule.cosine()))

    def test_a_learning_policy_is_told_the_unweighted_losses(self, host: ImagenSeam) -> None:
        imagen = host.attached("loss_second_moment")
        told: list[tuple[torch.Tensor, torch.Tensor]] = []
        policy = attachment_of(imagen).parts[0].policy
        policy.update = lambda index, loss: told.append((index, loss))
        loss = imagen(torch.rand(IMAGES), text_embeds=torch.randn(TEXT))
        # The history is empty, so every weight 1 / (T p) is 1.
        assert torch.allclose(told[0][1].mean(), loss.detach())

    @pytest.mark.parametrize("objective", ["noise", "v", "x_start"])
    def test_the_loss_that_is_minimised_is_normalised(self, host: ImagenSeam, objective: str) -> None:
        # The host multiplies the errors by 1, SNR / (1 + SNR) or SNR after its loss function.
        imagen = with_policy(host.make(pred_objectives=objective), {"type": "uniform", "normalize": "loss"})
        policy = policy_of(imagen)

        def loss_of_a_step() -> float:
            return float(imagen(torch.rand(IMAGES), text_embeds=torch.randn(TEXT)).detach())

        divisor = loss_of_a_step()
        assert policy.state_dict()["mean_loss"] == pytest.approx(divisor, rel=1e-5)
        # The loss is the minimised one over the divisor.
        divisor += 0.05 * (loss_of_a_step() * divisor - divisor)
        assert policy.state_dict()["mean_loss"] == pytest.approx(divisor, rel=1e-5)

    def test_min_snr_beside_a_policy_that_only_draws(self, host: ImagenSeam) -> None:
        policy = dict(density="logit_normal", weighting="constant")
        imagen = with_policy(host.make(min_snr_loss_weight=True), policy)
        assert torch.isfinite(imagen(torch.rand(IMAGES), text_embeds=torch.randn(TEXT)))

    def test_a_version_that_weighs_otherwise_is_refused(self, host: ImagenSeam) -> None:
        imagen = host.make()
        del imagen.min_snr_gamma
        with pytest.raises(ValueError, match=r"known to work are imagen-pytorch 2\.0 and 2\.1"):
            with_policy(imagen)
