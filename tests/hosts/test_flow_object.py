"""Flow objects: the contract on stand-ins, and what is refused."""

import warnings
from typing import Any

import conformance.flow as flow_seams
import pytest
import torch
from conformance.flow import LAW
from conformance.image_lists import check_lists
from conformance.models import SmallModel
from conformance.points import check
from flow_standins import (
    SEAMS,
    ListTransport,
    ModelType,
    RectifiedFlow,
    ReversedTransport,
    Transport,
    VPCPlan,
    WeightType,
)
from open_sora_standin import RFlowScheduler

from speedit_plugins import NoiseSchedule, build_policy, with_policy
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.flow import draw_by_rejection
from speedit_plugins.hosts.objects.flow_object import flow_prediction_type
from speedit_plugins.policies.policy import TimestepPolicy

IMAGES = torch.zeros(6, 4, 4, 4)
VIDEOS = torch.zeros(6, 4, 2, 4, 4)


@pytest.mark.parametrize("name", SEAMS)
def test_the_contract_holds_on_stand_ins(name: str) -> None:
    assert check(SEAMS[name]) == list(range(1, 12))


def test_a_list_of_images() -> None:
    check_lists(SEAMS["transport of lists"])


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


class Clipped(Transport):
    """Trains on t in [0.1, 0.8], as a transport does where its loss is not finite at the ends."""

    train_eps, sample_eps = 0.1, None

    def check_interval(self, train_eps: float, sample_eps: Any) -> tuple[float, float]:
        return train_eps, 0.8

    def sample(self, x1: torch.Tensor, sp_timesteps: Any = None) -> Any:
        t, *others = super().sample(x1, sp_timesteps)
        return 0.1 + 0.7 * t, *others


class Shifted(Transport):
    """LightningDiT's shifted logit-normal draw, whose t = 1 is data."""

    shift_lg = use_lognorm = True
    mu = -2.0

    def sample(self, x1: torch.Tensor, sp_timesteps: Any = None, shifted_mu: float = 0.0) -> Any:
        return torch.sigmoid(torch.randn(len(x1)) + shifted_mu).to(x1), torch.randn_like(x1), x1

    def training_losses(self, model: Any, x1: torch.Tensor, *_: Any, **__: Any) -> Any:
        t, x0, x1 = self.sample(x1, None, self.mu)
        return {"loss": (model(x1, t) - x0).square().flatten(1).mean(1)}


class TestAPolicyWithALawOfItsOwn:
    def test_it_stays_in_the_interval_on_which_the_host_trains(self) -> None:
        host, model = with_policy(Clipped(ModelType.NOISE), LAW), SmallModel(None)
        host.training_losses(model, torch.zeros(20_000, 4, 1, 1))
        policy, t = attachment_of(host).policy, model.seen[0]
        assert 0.1 <= float(t.min()) < 0.11
        assert 0.79 < float(t.max()) <= 0.8
        # The rows of the policy are the noise levels of that interval, 0 is clean.
        assert policy.schedule.alpha[[0, -1]].tolist() == pytest.approx([0.79965, 0.10035])
        # 20,000 strata: the share of draws up to a row is exact to a draw or two.
        share = float((t > 0.8 - 0.7 * 0.4).double().mean())
        assert share == pytest.approx(float(policy.density[:400].sum()), abs=1e-3)

    def test_thinned_draws_have_the_same_clock(self) -> None:
        host, model = with_policy(Clipped(), "speed"), SmallModel(None)
        host.training_losses(model, torch.zeros(20_000, 4, 1, 1))
        # SNR 1/143 is t = 0.0772, which this host never draws: nothing is thinned.
        assert float((model.seen[0] < 0.2).double().mean()) == pytest.approx(1 / 7, abs=0.01)

    @pytest.mark.parametrize(
        ("host", "told"),
        [
            (RectifiedFlow(use_timestep_transform=True), r"resolution shift \(use_timestep_transform\)"),
            (RectifiedFlow(sample_method="logit-normal"), r"logit-normal draw \(sample_method\)"),
            (ReversedTransport(6.9), r"shift for the size of the data \(time_dist_shift\)"),
            (ListTransport(do_shift=True), r"resolution shift \(do_shift\)"),
            (Shifted(), r"logit-normal draw \(use_lognorm\) and the shift of it \(shift_lg\)"),
        ],
    )
    def test_one_warning_says_what_it_replaces(self, host: Any, told: str) -> None:
        with pytest.warns(
            UserWarning, match=f"law of 'logit_normal' replaces the {told} of.* shift="
        ) as notes:
            with_policy(host, "logit_normal")
        assert len(notes) == 1

    def test_a_uniform_host_is_not_warned_about(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with_policy(Transport(), LAW)
            with_policy(RectifiedFlow(), LAW)
            with_policy(RectifiedFlow(use_timestep_transform=True), "uniform")

    def test_bfloat16_data_get_a_t_of_their_dtype(self) -> None:
        host, model = with_policy(Transport(), LAW), SmallModel(None).bfloat16()
        host.training_losses(model, IMAGES.bfloat16())["loss"].sum().backward()
        assert model.seen[0].dtype == torch.bfloat16

    def test_data_that_a_policy_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TimestepPolicy, "needs_data", True)
        host = with_policy(Transport(), LAW)
        host.training_losses(SmallModel(None), IMAGES)
        with pytest.raises(
            ValueError, match="'spectral_flow' needs the data of each batch, and they are not"
        ):
            attachment_of(host).draw(torch.zeros(4))


def test_speed_moves_its_boundary_with_a_shifted_logit_normal() -> None:
    # The mean of logit(time) is 2: logit(0.9228) = 2.481 is 0.481 above it, with 0.315 of the draws past it.
    # Thinned there, 0.0844 would be left; the moved boundary is at 4.481, past which nearly nothing is drawn.
    shares = []
    for policy in ("speed", {"type": "speed", "snr_boundary": 1 / 143}):
        host, model = with_policy(Shifted(), policy), SmallModel(None)
        host.training_losses(model, torch.zeros(20_000, 4, 1, 1))
        shares.append(float((model.seen[0] < 1 - 0.9228).double().mean()))
    # 4 sigma of a binomial frequency is 0.013.
    assert shares == pytest.approx([0.315, 0.0844], abs=0.014)


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

    def test_a_type_that_contradicts_the_host_is_refused(self) -> None:
        for host in (Transport(), RectifiedFlow()):
            # Whether the policy's weights depend on the type or not.
            for policy in ("min_snr", "edm"):
                with pytest.raises(
                    ValueError, match="model that predicts flow, got prediction_type='epsilon'"
                ):
                    with_policy(host, policy, prediction_type="epsilon")
            assert attachment_of(with_policy(host, "edm", prediction_type="flow")).policy.name == "edm"


class TestRefusals:
    def test_weights_of_the_host_beside_the_policys(self) -> None:
        weighted = Transport(ModelType.NOISE, WeightType.VELOCITY)
        with pytest.raises(ValueError, match="weighs its loss by velocity already, .* drop loss_weight"):
            with_policy(weighted)
        # A policy that only draws adds no second weight.
        with_policy(weighted, dict(density="logit_normal", weighting="constant"))

    def test_weights_of_a_velocity_loss_have_no_effect_in_the_host(self) -> None:
        host = with_policy(Transport(ModelType.VELOCITY, WeightType.VELOCITY), "jit")
        assert attachment_of(host).policy.name == "jit"

    def test_without_a_name_a_flow_measures_its_data(self) -> None:
        assert attachment_of(with_policy(Transport())).policy.name == "auto"

    def test_weights_passed_to_a_rectified_flow(self) -> None:
        with pytest.raises(ValueError, match="got weights, and the policy weighs already"):
            with_policy(RectifiedFlow()).training_losses(None, VIDEOS, weights=torch.ones(1000))

    def test_a_law_that_depends_on_what_an_unknown_path_predicts(self) -> None:
        # For a flow `auto` draws by another law than for a model of noise.
        with pytest.raises(ValueError, match="pass prediction_type"):
            with_policy(Transport(path_sampler=VPCPlan()), "auto")
        host = with_policy(Transport(path_sampler=VPCPlan()), "auto", prediction_type="flow")
        assert bool((attachment_of(host).policy.weight == 1).all())

    def test_a_built_policy_that_draws_pairs(self) -> None:
        policy = build_policy("speedit_reference", NoiseSchedule.rectified_flow(1000), "flow")
        with pytest.raises(ValueError, match="'speedit_reference' draws in pairs"):
            with_policy(Transport(), policy)

    def test_a_density_of_zero_where_the_host_draws(self) -> None:
        with pytest.raises(ValueError, match="no t that the host drew in 10000 passes was kept"):
            draw_by_rejection(lambda: torch.zeros(2), lambda t: torch.zeros(2))
