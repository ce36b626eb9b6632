"""Seam D: the contract with diffusers' own schedulers, and what the two edits find and refuse."""

import ast
import copy
import pickle
from typing import Any

import diffusers
import pytest
import torch
from conformance.points import check
from conformance.script import SCRIPT, SEAMS, ScriptSeam, step_of
from conformance.seam import new_process
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from speedit_plugins.hosts.edits.script_edits import CALLS, ScriptCalls, edited
from speedit_plugins.hosts.schedules import from_diffusers
from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy

DRAW = "timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (bsz,), device=device)\n"
LOSS = "loss = F.mse_loss(prediction.float(), target.float(), reduction='mean')\n"


def seam(policy: Any = "speedit") -> ScriptPolicy:
    return ScriptPolicy(policy, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("each", SEAMS, ids=lambda each: each.name)
def test_the_contract_holds(each: ScriptSeam) -> None:
    assert check(each) == list(range(1, 12))


class TestEdits:
    def test_lines_stay_where_they_are(self) -> None:
        changed, sites = edited(ast.parse("\n\n" + DRAW + "\n" + LOSS))
        assert (sites.draws, sites.losses) == ([3], [5])
        calls = [node for node in ast.walk(changed) if isinstance(node, ast.Call)]
        assert {call.lineno for call in calls} == {3, 5}

    def test_nothing_else_changes(self) -> None:
        changed, _ = edited(ast.parse(SCRIPT))
        before, after = (ast.unparse(tree).splitlines() for tree in (ast.parse(SCRIPT), changed))
        different = [new for old, new in zip(before, after, strict=True) if old != new]
        assert len(different) == 4  # the draw, two losses, compute_snr
        assert all(CALLS in line for line in different)

    @pytest.mark.parametrize(
        "text",
        [
            DRAW,
            LOSS,
            DRAW.replace("num_train_timesteps", "num_classes") + LOSS,
            DRAW.replace("torch.randint", "np.random.randint") + LOSS,
        ],
    )
    def test_a_script_without_both_stays_as_it_is(self, text: str) -> None:
        tree = ast.parse(text)
        changed, sites = edited(tree)
        assert changed is tree
        assert not sites.are_a_seam

    def test_a_scheduler_without_config(self) -> None:
        changed, _ = edited(ast.parse(DRAW.replace(".config", "") + LOSS))
        assert f"{CALLS}.randint(noise_scheduler, 0," in ast.unparse(changed)

    def test_part_of_the_timesteps_is_refused(self) -> None:
        calls, scheduler = ScriptCalls(seam()), diffusers.DDPMScheduler()
        with pytest.raises(ValueError, match=r"draws from \[0, 500\) in shape \(2,\), wanted all 1000"):
            calls.randint(scheduler, 0, 500, (2,))
        with pytest.raises(ValueError, match=r"in shape \(2, 3\), wanted all 1000 timesteps in shape \(B,\)"):
            calls.randint(scheduler, 0, 1000, (2, 3))
        with pytest.raises(ValueError, match=r"draws its timesteps with \['pin_memory'\]"):
            calls.randint(scheduler, 0, 1000, (2,), pin_memory=True)
        with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod"):
            calls.randint(diffusers.EDMEulerScheduler(), 0, 1000, (2,))
        assert calls.randint(scheduler, 0, 1000, (2,), dtype=torch.int64).shape == (2,)

    def test_every_form_of_the_call(self) -> None:
        calls, scheduler = ScriptCalls(seam()), diffusers.DDPMScheduler()
        forms: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
            ((0, 1000, (2,)), {}),
            ((1000, (2,)), {}),
            ((0,), {"high": 1000, "size": (2,)}),
            ((1000,), {"size": (2,)}),
            ((), {"low": 0, "high": 1000, "size": [2]}),
        )
        for drawn, named in forms:
            assert torch.randint(*drawn, **named).shape == (2,)
            assert calls.randint(scheduler, *drawn, **named).shape == (2,)

    def test_the_seed_of_the_scripts_generator_is_that_of_the_draws(self) -> None:
        scheduler, drawn = diffusers.DDPMScheduler(), []
        for seed in (3, 3, 4):
            generator, own = (torch.Generator().manual_seed(seed) for _ in range(2))
            calls = ScriptCalls(ScriptPolicy("speed"))
            new_process()
            drawn.append(calls.randint(scheduler, 0, 1000, (64,), generator=generator))
            torch.randint(0, 1000, (64,), generator=own)
            assert torch.equal(generator.get_state(), own.get_state())
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    @pytest.mark.parametrize(
        "draw",
        [
            "i: Tensor = torch.randint(0, s.config.num_train_timesteps, (2,))\nt = s.timesteps[i]\n",
            "i = torch.randint(0, s.config.num_train_timesteps, (2,))\nx = self.sigmas[i.long()]\n",
        ],
    )
    def test_an_index_is_told_by_its_use(self, draw: str) -> None:
        assert "refused_index" in ast.unparse(edited(ast.parse(draw + LOSS))[0])

    def test_any_other_name_is_a_timestep(self) -> None:
        draw = "t = torch.randint(low=0, high=s.config.num_train_timesteps, size=(2,))\n"
        assert f"{CALLS}.randint(s, low=0, high=" in ast.unparse(edited(ast.parse(draw + LOSS))[0])

    @pytest.mark.parametrize(
        ("loss", "method"),
        [
            ("loss = w * F.mse_loss(a, b, reduction='none')", "scaled_mse_loss"),
            ("loss = F.mse_loss(a, b, reduction='none').mean([1, 2]) * w", "scaled_mse_loss"),
            ("loss = 0.5 * F.mse_loss(a, b)", "mse_loss"),
            ("loss = F.mse_loss(a, b, reduction='none') / n", "mse_loss"),
        ],
    )
    def test_weights_of_the_script(self, loss: str, method: str) -> None:
        assert f"{CALLS}.{method}(" in ast.unparse(edited(ast.parse(DRAW + loss))[0])

    def test_weights_of_the_script_beside_the_policys(self) -> None:
        ones = torch.ones(2, 3)
        for policy in ("speedit", "uniform"):
            own = seam(policy)
            own.timesteps(diffusers.DDPMScheduler(), 2)
            if policy == "uniform":
                assert torch.equal(ScriptCalls(own).scaled_mse_loss(ones, 0 * ones, "none"), ones)
                continue
            with pytest.raises(ValueError, match="multiplies its squared error by weights already"):
                ScriptCalls(own).scaled_mse_loss(ones, 0 * ones, "none")

    def test_an_unknown_option_of_the_loss_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"mse_loss with \['weight'\] is not known"):
            ScriptCalls(seam()).mse_loss(torch.ones(1), torch.ones(1), weight=torch.ones(1))


class TestLoss:
    def test_without_reduction_each_element_is_weighted(self) -> None:
        own, scheduler = seam(), diffusers.DDPMScheduler()
        index = own.timesteps(scheduler, 4)
        error = torch.arange(1.0, 25.0).view(4, 2, 3)
        loss = own.mse_loss(error, torch.zeros_like(error), "none")
        weight = build_policy("speedit", from_diffusers(scheduler)).weight.float()[index]
        assert torch.equal(loss, weight.view(4, 1, 1) * error**2)

    def test_a_split_batch_names_its_part(self) -> None:
        own = seam()
        index = own.timesteps(diffusers.DDPMScheduler(), 4)
        ones = torch.ones(2, 3)
        halves = [own.mse_loss(ones, 0 * ones, part=(number, 2)) for number in (0, 1)]
        weight = own.policy.weight[index].float()
        assert torch.allclose(torch.stack(halves), weight.view(2, 2).mean(1))
        with pytest.raises(ValueError, match=r"2 rows, and 4 timesteps were drawn: .* part=\(0, 2\)"):
            own.mse_loss(ones, 0 * ones)

    def test_parts_of_a_batch_are_weighted_alike_by_weights_that_follow_the_loss(self) -> None:
        own, scheduler = seam({"type": "uniform", "normalize": "loss"}), diffusers.DDPMScheduler()
        own.timesteps(scheduler, 4)
        halves = [own.mse_loss(torch.full((2, 3), 0.2), torch.zeros(2, 3), part=(n, 2)) for n in (0, 1)]
        # 0.2 squared times the weight at the draw, 1. After it the weight is the inverse of that.
        assert_close(torch.stack(halves), torch.full((2,), 0.04))
        own.timesteps(scheduler, 4)
        assert_close(own.mse_loss(torch.full((4, 3), 0.2), torch.zeros(4, 3)), torch.tensor(1.0))

    def test_pairs_for_a_split_batch_are_refused(self) -> None:
        own = seam("speedit_reference")
        own.timesteps(diffusers.DDPMScheduler(), 4)
        with pytest.raises(ValueError, match=r"'speedit_reference' draws pairs, .* \(prior preservation\)"):
            own.mse_loss(torch.ones(2, 3), torch.zeros(2, 3), part=(0, 2))
        # A batch that is not split takes pairs.
        assert own.mse_loss(torch.ones(4, 3), torch.zeros(4, 3)) > 0

    def test_a_wrong_name_is_told_at_once(self) -> None:
        with pytest.raises(ValueError, match="unknown policy 'speeddit'; did you mean 'speedit'"):
            ScriptPolicy("speeddit")

    def test_a_loss_before_any_draw(self) -> None:
        with pytest.raises(ValueError, match="before the policy drew timesteps"):
            seam().mse_loss(torch.ones(2), torch.ones(2))

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"reduction": "sum"}, "'mean' or 'none', got 'sum'"), ({"part": (2, 2)}, r"got \(2, 2\)")],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        own = seam()
        own.timesteps(diffusers.DDPMScheduler(), 2)
        with pytest.raises(ValueError, match=message):
            own.mse_loss(torch.ones(2), torch.ones(2), **options)

    def test_a_learning_policy_is_told_the_unweighted_losses(self) -> None:
        own = seam("loss_second_moment")
        index = own.timesteps(diffusers.DDPMScheduler(), 4)
        told: list[tuple[torch.Tensor, torch.Tensor]] = []
        own.policy.update = lambda index, loss: told.append((index, loss))
        error = torch.arange(8.0).view(4, 2)
        own.mse_loss(error, torch.zeros_like(error))
        assert torch.equal(told[0][0], index)
        assert torch.equal(told[0][1], (error**2).mean(1))


def test_a_curriculum_advances_with_the_draws() -> None:
    own, scheduler = seam(dict(type="clts", curriculum_steps=2)), diffusers.DDPMScheduler()
    own.timesteps(scheduler, 2)
    before = own.policy.density
    for _ in range(2):
        own.timesteps(scheduler, 2)
    assert not torch.allclose(before, own.policy.density)


def test_another_scheduler_has_another_policy() -> None:
    own = seam("speed")
    boundaries = []
    for options in ({}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}):
        own.timesteps(diffusers.DDPMScheduler(**options), 2)
        boundaries.append(own.policy.boundary_index)
    # SNR 1/143 is at 700 on the linear schedule and at 0.966 T on Stable Diffusion's.
    assert boundaries == [700, 966]


def test_the_two_documented_lines() -> None:
    own, scheduler = seam(), diffusers.DDPMScheduler()
    latents = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = own.timesteps(scheduler, len(latents), latents.device)
    loss = own.mse_loss(latents, torch.zeros_like(latents))
    mse = functional.mse_loss(latents, torch.zeros_like(latents), reduction="none").mean((1, 2, 3))
    assert torch.allclose(loss, (own.policy.weight.float()[timesteps] * mse).mean())


def test_the_policy_is_told_of_once() -> None:
    used: list[str] = []
    step = step_of(ScriptPolicy("speed", on_use=lambda policy: used.append(policy.name)))
    for _ in range(2):
        step(diffusers.DDPMScheduler(), lambda x, t: x, torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1))
    assert used == ["speed"]


class TestWatchedScheduler:
    def test_a_policy_that_needs_data_and_sees_none_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TimestepPolicy, "needs_data", True)
        drawing, scheduler = seam("uniform"), diffusers.DDPMScheduler()
        x = torch.zeros(4, 2)
        for _ in range(10):
            t = drawing.timesteps(scheduler, 4)
            scheduler.add_noise(x, x, t)
        for _ in range(8):
            drawing.timesteps(scheduler, 4)
        with pytest.raises(ValueError, match="8 draws passed without a call of .*add_noise"):
            drawing.timesteps(scheduler, 4)

    def test_a_copy_made_between_draw_and_noising_is_the_hosts(self) -> None:
        scheduler = diffusers.DDPMScheduler()
        index = seam().timesteps(scheduler, 4)
        for each in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):  # noqa: S301 - made here
            assert type(each) is diffusers.DDPMScheduler
        x = torch.zeros(4, 1)
        scheduler.add_noise(x, x, index)
        assert type(scheduler) is diffusers.DDPMScheduler
        assert "add_noise" not in vars(scheduler)

    def test_timesteps_changed_in_place_are_refused(self) -> None:
        scheduler, x = diffusers.DDPMScheduler(), torch.zeros(4, 1)
        index = seam().timesteps(scheduler, 4)
        index //= 2
        with pytest.raises(ValueError, match="writes to the timesteps that the policy drew"):
            scheduler.add_noise(x, x, index)

    def test_without_gradients_a_draw_is_the_scripts_own(self) -> None:
        calls, scheduler = ScriptCalls(seam()), diffusers.DDPMScheduler()
        with torch.no_grad():
            drawn = calls.randint(scheduler, 0, 500, (2, 3), generator=torch.Generator().manual_seed(1))
        assert torch.equal(drawn, torch.randint(0, 500, (2, 3), generator=torch.Generator().manual_seed(1)))

    def test_a_policy_for_each_scheduler(self) -> None:
        own, x = seam("p2"), torch.ones(4, 3)
        schedulers = (
            diffusers.DDPMScheduler(),
            diffusers.DDPMScheduler(500, beta_schedule="squaredcos_cap_v2"),
        )
        drawn = [own.timesteps(scheduler, 4) for scheduler in schedulers]
        for scheduler, index in zip(schedulers, drawn, strict=True):
            weight = build_policy("p2", from_diffusers(scheduler)).weight.float()[index]
            assert_close(own.mse_loss(x, 0 * x, timesteps=index), weight.mean())

    def test_a_loss_inside_a_checkpoint_is_refused(self) -> None:
        own, scheduler = seam(), diffusers.DDPMScheduler()
        x = torch.ones(4, 3, requires_grad=True)
        own.timesteps(scheduler, 4)
        loss = checkpoint(lambda x: own.mse_loss(x, 0 * x), x, use_reentrant=False)
        with pytest.raises(ValueError, match="runs this twice"):
            loss.backward()
        with pytest.raises(ValueError, match="runs this twice"):
            checkpoint(lambda x: own.mse_loss(x, 0 * x), x, use_reentrant=True)

    def test_min_snr_beside_a_policy_that_learns_is_refused(self) -> None:
        own = seam({"type": "uniform", "normalize": "loss"})
        own.timesteps(diffusers.DDPMScheduler(), 4)
        with pytest.raises(ValueError, match="not the loss that is minimised: drop --snr_gamma"):
            ScriptCalls(own).compute_snr(lambda *_: None, None, None)

    def test_a_validation_between_draw_and_loss(self) -> None:
        own, scheduler, x = seam(), diffusers.DDPMScheduler(), torch.ones(4, 3)
        index = own.timesteps(scheduler, 4)
        with torch.no_grad():
            own.timesteps(scheduler, 2)
            assert own.mse_loss(x[:2], 0 * x[:2]) == 1
        weight = build_policy("speedit", from_diffusers(scheduler)).weight.float()[index]
        assert_close(own.mse_loss(x, 0 * x), weight.mean())
        assert own.policy.num_steps == 1

    def test_a_draw_without_gradients_for_a_loss_with_them_is_refused(self) -> None:
        own, x = seam(), torch.ones(4, 3)
        with torch.no_grad():
            own.timesteps(diffusers.DDPMScheduler(), 4)
        with pytest.raises(ValueError, match=r"or under torch\.no_grad"):
            own.mse_loss(x, 0 * x)

    def test_a_later_draw_without_gradients_for_a_loss_with_them_is_refused(self) -> None:
        own, scheduler, x = seam(), diffusers.DDPMScheduler(), torch.ones(4, 3)
        own.timesteps(scheduler, 4)
        own.mse_loss(x, 0 * x)
        with torch.no_grad():
            own.timesteps(scheduler, 4)
        with pytest.raises(ValueError, match=r"drawn under torch\.no_grad\(\)"):
            own.mse_loss(x, 0 * x)

    def test_noising_without_gradients_in_a_training_step(self) -> None:
        own, scheduler, x = seam(), diffusers.DDPMScheduler(), torch.ones(4, 3)
        for change in (0, 1):
            index = own.timesteps(scheduler, 4)
            with torch.no_grad():
                scheduler.add_noise(x, x, index // (1 + change))
            if not change:
                own.mse_loss(x, 0 * x)
        with pytest.raises(ValueError, match="noises at other timesteps"):
            own.mse_loss(x, 0 * x)

    def test_a_noising_of_the_scripts_own_is_watched(self) -> None:
        own, scheduler, x, given = seam(), diffusers.DDPMScheduler(), torch.ones(4, 3), []
        scheduler.add_noise = lambda *args, **options: given.append(options)
        scheduler.add_noise(x, x, own.timesteps(scheduler, 4), offset=0.1)
        assert given == [{"offset": 0.1}]
        own.timesteps(scheduler, 4)
        with pytest.raises(ValueError, match="noises at other timesteps"):
            scheduler.add_noise(x, x, torch.full((4,), 3))

    def test_min_snr_without_gradients_in_a_training_step(self) -> None:
        own, scheduler = seam(), diffusers.DDPMScheduler()
        index, calls = own.timesteps(scheduler, 4), ScriptCalls(own)
        with torch.no_grad():
            calls.compute_snr(lambda *_: index, scheduler, index.clone())
            with pytest.raises(ValueError, match="drop --snr_gamma"):
                calls.compute_snr(lambda *_: index, scheduler, index)

    def test_without_gradients_every_call_is_the_scripts_own(self) -> None:
        calls, x = ScriptCalls(seam()), torch.ones(4, 3)
        with torch.no_grad():
            assert calls.mse_loss(x, 0 * x, "sum") == 12
            assert calls.scaled_mse_loss(x, 0 * x, "sum") == 12
            assert calls.refused_index(diffusers.EDMEulerScheduler(), 0, 1, (2,)).tolist() == [0, 0]
