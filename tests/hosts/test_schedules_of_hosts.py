"""What is read from a host's own object: its noise schedule and its prediction type."""

import enum
import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from host_standins import create, create_points

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.hosts.schedules import from_diffusers, prediction_type_of, schedule_of


class TestScheduleOf:
    def test_numpy_tables_are_read_exactly(self) -> None:
        diffusion = create()
        schedule = schedule_of(diffusion)
        assert schedule.num_timesteps == schedule.num_original == 1000
        assert np.allclose(schedule.alphas_cumprod.numpy(), diffusion.alphas_cumprod, rtol=1e-14, atol=0)

    def test_a_respaced_object_keeps_its_original_timesteps(self) -> None:
        diffusion = create(respacing="50")
        schedule = schedule_of(diffusion)
        assert schedule.num_timesteps == 50
        assert schedule.num_original == 1000
        assert schedule.timesteps.tolist() == diffusion.timestep_map

    def test_torch_float32_tables(self) -> None:
        diffusion = create_points()
        assert torch.equal(schedule_of(diffusion).alphas_cumprod.float(), diffusion.alphas_cumprod)

    def test_an_object_without_tables(self) -> None:
        with pytest.raises(ValueError, match="types.SimpleNamespace has no alphas_cumprod"):
            schedule_of(SimpleNamespace(betas=[0.1]))


class TestFromDiffusers:
    @pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
    def test_schedulers_of_the_ddpm_family(self, name: str) -> None:
        scheduler = getattr(diffusers, name)(
            num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        schedule = from_diffusers(scheduler)
        # diffusers multiplies 1000 float32 factors.
        expected = NoiseSchedule.scaled_linear()
        assert torch.allclose(schedule.alphas_cumprod, expected.alphas_cumprod, rtol=1e-4)
        assert schedule.timesteps.tolist() == list(range(1000))

    def test_flow_matching_counts_from_data_to_noise(self) -> None:
        schedule = from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000))
        # sigma = (i + 1) / T without a shift.
        expected = torch.arange(1, 1001, dtype=torch.float64) / 1000
        assert torch.allclose(schedule.sigma, expected, atol=1e-6)
        assert torch.equal(schedule.alpha, 1 - schedule.sigma)

    def test_the_resolution_shift_is_kept(self) -> None:
        schedule = from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        t = torch.arange(1, 1001, dtype=torch.float64) / 1000
        assert torch.allclose(schedule.sigma, 3 * t / (1 + 2 * t), atol=1e-6)

    def test_a_scheduler_set_to_inference(self) -> None:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(20)
        with pytest.raises(ValueError, match="has 20 sigmas, wanted the 1000 of training: read .* before"):
            from_diffusers(scheduler)

    @pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
    def test_noise_that_is_added_to_data_of_scale_one_half(self, name: str) -> None:
        schedule = from_diffusers(getattr(diffusers, name)())
        # Karras' ramp from 0.002 to 80 with rho = 7, in float32.
        ramp = torch.linspace(0, 1, schedule.num_timesteps, dtype=torch.float64)
        expected = (0.002 ** (1 / 7) + ramp * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        assert torch.allclose(schedule.sigma, expected, rtol=1e-4)
        # EDM's sigma_data.
        assert bool((schedule.alpha == 0.5).all())

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' own numpy calls
    @pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
    def test_a_terminal_snr_of_zero(self, betas: str) -> None:
        options = {"beta_schedule": betas, "rescale_betas_zero_snr": True}
        kinds = (getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers))
        read = set()
        for kind in kinds:
            # The other options of these schedulers concern their inference steps.
            if "rescale_betas_zero_snr" in inspect.signature(getattr(kind, "__init__", kind)).parameters:
                scheduler = kind(**options)
                expected = torch.as_tensor(scheduler.alphas_cumprod).double()
                schedule = from_diffusers(scheduler)
                # Rounding of alpha^2 / (alpha^2 + sigma^2).
                assert torch.allclose(schedule.alphas_cumprod[:-1], expected[:-1], rtol=1e-12, atol=0)
                assert float(schedule.snr[-1]) == 0
                assert torch.isfinite(build_policy("min_snr", schedule, "v").weight).all()
                read.add(kind.__name__)
        # These four have 2^-24 in place of 0.
        stems = ("EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep")
        assert {f"{stem}Scheduler" for stem in stems} < read

    def test_a_sampler_of_flows_does_not_have_the_schedule_of_the_training(self) -> None:
        scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        with pytest.raises(ValueError, match="use_flow_sigmas .* pass the scheduler of the training"):
            from_diffusers(scheduler)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' own numpy calls
    def test_every_scheduler_with_a_table_of_noise_levels(self) -> None:
        read, refused = [], []
        for name in (name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")):
            try:
                scheduler = getattr(diffusers.schedulers, name)()
            except (ImportError, TypeError):  # another package, or arguments without a default
                continue
            if getattr(scheduler, "alphas_cumprod", None) is None:
                refused.append(name)
                continue
            schedule = from_diffusers(scheduler)
            assert torch.allclose(
                schedule.alphas_cumprod.float(), torch.as_tensor(scheduler.alphas_cumprod).float()
            )
            read.append(name)
        assert {
            "DDPMScheduler",
            "PNDMScheduler",
            "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler",
        } <= set(read)
        assert {"DDPMWuerstchenScheduler", "SCMScheduler"} <= set(refused)

    def test_a_scheduler_without_noise_levels(self) -> None:
        for name in ("DDPMWuerstchenScheduler", "SCMScheduler"):
            with pytest.raises(ValueError, match=f"{name} has neither alphas_cumprod nor a table of sigmas"):
                from_diffusers(getattr(diffusers.schedulers, name)())


class MeanType(enum.Enum):
    PREVIOUS_X = 1
    START_X = 2
    EPSILON = 3
    VELOCITY = 4


class TestPredictionTypeOf:
    @pytest.mark.parametrize(
        ("host", "expected"),
        [
            (SimpleNamespace(model_mean_type=MeanType.EPSILON), "epsilon"),
            (SimpleNamespace(model_mean_type=MeanType.START_X), "x0"),
            (SimpleNamespace(model_mean_type=MeanType.VELOCITY), "v"),
            (SimpleNamespace(model_mean_type="eps"), "epsilon"),
            (SimpleNamespace(parameterization="x0"), "x0"),
            (SimpleNamespace(parameterization="v"), "v"),
            (SimpleNamespace(config={"prediction_type": "epsilon"}), "epsilon"),
            (SimpleNamespace(config={"prediction_type": "sample"}), "x0"),
            (SimpleNamespace(config={"prediction_type": "v_prediction"}), "v"),
            (SimpleNamespace(config={"prediction_type": "flow_prediction"}), "flow"),
        ],
    )
    def test_what_hosts_state(self, host: Any, expected: str) -> None:
        assert prediction_type_of(host) == expected

    def test_diffusers(self) -> None:
        assert prediction_type_of(diffusers.DDPMScheduler(prediction_type="v_prediction")) == "v"

    def test_a_target_that_no_policy_knows(self) -> None:
        with pytest.raises(ValueError, match="predicts 'previous_x'; wanted one of epsilon"):
            prediction_type_of(SimpleNamespace(model_mean_type=MeanType.PREVIOUS_X))

    def test_a_host_that_does_not_say(self) -> None:
        with pytest.raises(ValueError, match="does not say what its model predicts: pass prediction_type"):
            prediction_type_of(SimpleNamespace())
