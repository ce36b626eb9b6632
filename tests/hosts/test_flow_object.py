"""Flow objects: the contract on stand-ins, and what is refused."""

from typing import Any

import conformance.flow as flow_seams
import pytest
import torch
from conformance.models import SmallModel
from conformance.points import check
from flow_standins import (
    SEAMS,
    ModelType,
    RectifiedFlow,
    Transport,
    VPCPlan,
    WeightType,
)
from open_sora_standin import RFlowScheduler

from speedit_plugins import NoiseSchedule, build_policy, with_policy
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.flow import draw_by_rejection
from speedit_plugins.hosts.flow_object import flow_prediction_type, policy_for

IMAGES = torch.zeros(6, 4, 4, 4)
VIDEOS = torch.zeros(6, 4, 2, 4, 4)


@pytest.mark.parametrize("name", SEAMS)
def test_the_contract_holds_on_stand_ins(name: str) -> None:
    assert check(SEAMS[name]) == list(range(1, 12))


class TestTheContractCanFail:
    def test_a_host_that_draws_past_sample(self) -> None:
        class Redrawing(Transport):
            def training_losses(self, model: Any, x1: Any, *args: Any, **kwargs: Any) -> Any:
                model(x1, torch.rand(len(x1)))
                return super().training_losses(model, x1)

        with pytest.raises(AssertionError, match="point 1, weighed_t_is_seen: 2 draws, the model .* 4 times"):
            check(flow_seams.transport(Redrawing, SEAMS["transport"].sampler))

    def test_a_host_that_never_asks_for_a_draw(self) -> None:
        class Elsewhere(Transport):
            def training_losses(self, model: Any, x1: Any, *args: Any, **kwargs: Any) -> Any:
                return {"loss": torch.zeros(len(x1))}

        with pytest.raises(ValueError, match="draws its t elsewhere"):
            with_policy(Elsewhere()).training_losses(None, IMAGES)

    def test_a_rectified_flow_that_adds_no_noise(self) -> None:
        class Silent(RFlowScheduler):
            def training_losses(self, *args: Any, **kwargs: Any) -> Any:
                return {}

        flow = with_policy(RectifiedFlow())
        flow.scheduler = Silent()
        with pytest.raises(ValueError, match="did not pass its t to add_noise"):
            flow.training_losses(None, VIDEOS)


class TestWhatTheHostKeeps:
    def test_a_t_that_is_passed_is_trained_on_unweighted(self) -> None:
        model, t = SmallModel(1), torch.full((6,), 990.0)
        noise = torch.ones_like(VIDEOS)
        ours = with_policy(RectifiedFlow()).training_losses(model, VIDEOS, noise=noise, t=t)
        theirs = RectifiedFlow().training_losses(model, VIDEOS, noise=noise, t=t)
        assert torch.equal(ours["loss"], theirs["loss"])

    def test_a_validation_interval_is_the_hosts(self) -> None:
        losses = []
        for host in (Transport(), with_policy(Transport())):
            torch.manual_seed(0)
            losses.append(host.training_losses(SmallModel(None), IMAGES, sp_timesteps=(0.0, 1.0))["loss"])
        assert torch.equal(*losses)

    @pytest.mark.parametrize("host_class", [Transport, RectifiedFlow])
    def test_an_evaluation_is_the_hosts(self, host_class: Any) -> None:
        losses, x = [], IMAGES if host_class is Transport else VIDEOS
        model = SmallModel(None if host_class is Transport else 1)
        for host in (host_class(), with_policy(host_class(), "speed")):
            torch.manual_seed(0)
            with torch.no_grad():
                losses.append(host.training_losses(model, x)["loss"])
        assert torch.equal(*losses)
        assert attachment_of(host).num_calls == 0

    def test_a_curriculum_advances_with_the_calls(self) -> None:
        host = with_policy(Transport(), dict(type="clts", curriculum_steps=2))
        before = attachment_of(host).policy.density
        for _ in range(3):
            host.training_losses(SmallModel(None), IMAGES)
        assert not torch.allclose(before, attachment_of(host).policy.density)

    def test_weights_are_the_policys_at_the_noise_level(self) -> None:
        # `speed` weighs from 0.4 at both ends to 0.6 at t = 1/2, where half of the variance is noise.
        host, model = with_policy(RectifiedFlow(), "speed"), SmallModel(1)
        noise = torch.ones(2000, 4, 1, 1, 1)
        ours = host.training_losses(model, noise, noise=noise)["loss"]
        theirs = RectifiedFlow().training_losses(model, noise, noise=noise, t=model.seen[0])["loss"]
        weight, time = (ours / theirs).detach(), model.seen[0] / 1000
        # The slope of the weight is at most 0.43 per unit of time, and a bin is 0.001 wide.
        assert float((weight[(time - 0.5).abs() < 0.01] - 0.6).abs().max()) < 0.01
        assert float(weight[time < 0.01].max()) < 0.41


class TestPredictionType:
    @pytest.mark.parametrize(
        ("host", "predicted"),
        [
            (Transport(), "flow"),
            (Transport(ModelType.NOISE), "epsilon"),
            (Transport(ModelType.NOISE, path_sampler=VPCPlan()), "epsilon"),
            (RectifiedFlow(), "flow"),
        ],
    )
    def test_it_is_read_from_the_host(self, host: Any, predicted: str) -> None:
        assert flow_prediction_type(host) == predicted

    def test_weights_that_are_not_converted_need_none(self) -> None:
        assert attachment_of(with_policy(Transport(path_sampler=VPCPlan()), "speed")).policy.name == "speed"

    def test_a_velocity_without_a_closed_form_is_asked_for(self) -> None:
        host = Transport(path_sampler=VPCPlan())
        with pytest.raises(ValueError, match="on the path VPCPlan, .* pass prediction_type"):
            with_policy(host, "min_snr")
        with_policy(host, "min_snr", prediction_type="v")
        # Both tables are the same up to the rounding of 1 - t.
        assert torch.allclose(
            attachment_of(host).policy.weight,
            build_policy("min_snr", NoiseSchedule.rectified_flow(1000), "v").weight,
        )


class TestRefusals:
    def test_weights_of_the_host_beside_the_policys(self) -> None:
        weighted = Transport(ModelType.NOISE, WeightType.VELOCITY)
        with pytest.raises(ValueError, match="weighs its loss by velocity already, .* drop loss_weight"):
            with_policy(weighted)
        # A policy that only draws adds no second weight.
        with_policy(weighted, dict(density="logit_normal", weighting="constant"))

    def test_weights_of_a_velocity_loss_have_no_effect_in_the_host(self) -> None:
        host = with_policy(Transport(ModelType.VELOCITY, WeightType.VELOCITY))
        assert attachment_of(host).policy.name == "speedit"

    def test_weights_passed_to_a_rectified_flow(self) -> None:
        with pytest.raises(ValueError, match="got weights, and the policy weighs already"):
            with_policy(RectifiedFlow()).training_losses(None, VIDEOS, weights=torch.ones(1000))

    def test_a_built_policy_that_draws_pairs(self) -> None:
        policy = build_policy("speedit_reference", NoiseSchedule.rectified_flow(1000), "flow")
        with pytest.raises(ValueError, match="'speedit_reference' draws in pairs"):
            policy_for(Transport(), policy)

    def test_a_density_of_zero_where_the_host_draws(self) -> None:
        with pytest.raises(ValueError, match="no t that the host drew in 10000 passes was kept"):
            draw_by_rejection(lambda: torch.zeros(2), lambda t: torch.zeros(2))
