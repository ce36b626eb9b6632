"""Whole trainings with a policy: two ranks, states in checkpoints, draws of each rank's own."""

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import conformance.whole_training as whole
import flow_standins
import host_standins
import pytest
import torch
import torch.distributed as dist
from conformance.seam import new_process
from conformance.whole_training import whole_training
from processes import TORCHRUN

from speedit_plugins import (
    NoiseSchedule,
    build_policy,
    load_policy_state,
    policy_of,
    policy_state,
    with_policy,
)
from speedit_plugins.hosts.attachment import Attachment
from speedit_plugins.hosts.draws.draw_stream import DrawStream, Replica, replica
from speedit_plugins.hosts.flow_script import FlowScript
from speedit_plugins.hosts.script import ScriptPolicy

ROOT = Path(__file__).parents[2]
DIT = host_standins.SEAMS["dit"]


@pytest.mark.slow
def test_two_ranks_train_200_steps_as_computed_independently() -> None:
    tests = ROOT / "tests"
    folders = map(str, (ROOT, tests, tests / "standins", tests / "support"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    command = [*map(str, TORCHRUN), str(tests / "support" / "train_ranks.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    others = ["script", "open_sora 1.1.0", "open_sora 1.2.0", "mmagic", "DDPM", "LatentDiffusion", "imagen"]
    held = [line.removeprefix("holds: ") for line in done.stdout.splitlines() if line.startswith("holds: ")]
    of_objects = ["dit", "dit_3d", "guided_diffusion", "mdt", "transport", "rectified flow"]
    assert held == [*of_objects, *others]


class TestTheCheckCanFail:
    def test_another_curriculum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(whole, "CURRICULUM_STEPS", 151)
        with pytest.raises(AssertionError, match="another t|misses"):
            whole_training(DIT, 20)

    def test_another_stream(self) -> None:
        seam = copy.copy(DIT)
        object.__setattr__(seam, "part", 1)
        with pytest.raises(AssertionError, match="step 0: another t"):
            whole_training(seam, 20)

    def test_a_smaller_tolerance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(whole, "TOLERANCE", 1e-9)
        with pytest.raises(AssertionError, match="misses w"):
            whole_training(DIT, 20)

    def test_a_host_that_loses_its_state(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(whole, "load_policy_state", lambda *_: None)
        with pytest.raises(AssertionError, match="step 6: another t"):
            whole_training(DIT, 12)


class TestState:
    def test_one_policy_in_two_objects_has_one_count(self) -> None:
        policy = build_policy({"type": "clts", "curriculum_steps": 10}, DIT.policy().schedule)
        first, second = (with_policy(DIT.make(), policy) for _ in range(2))
        for host in (first, second, first):
            DIT.train(host, DIT.model(host), DIT.batch())
        assert policy_of(first) is policy_of(second)
        assert policy_of(first).state_dict()["density"] == {"step": 2}
        assert policy_of(first).num_steps == 3

    def test_a_state_of_another_policy_restores_nothing(self) -> None:
        host, other = DIT.attached("clts"), DIT.attached("speed")
        DIT.train(host, DIT.model(host), DIT.batch())
        before = policy_state(host)
        with pytest.raises(ValueError, match="needs policy 'clts' with T = 1000, got 'speed'"):
            load_policy_state(host, policy_state(other))
        assert policy_state(host) == before
        for state, message in (
            ({"policies": []}, "has 1 policies, got the state of 0"),
            ({"model": 1}, r"needs the key 'policies', got \['model'\]"),
        ):
            with pytest.raises(ValueError, match=message):
                load_policy_state(host, state)

    def test_a_bad_state_is_refused_at_every_use(self) -> None:
        attachment = Attachment(lambda: DIT.policy("clts"))
        attachment.load_state_dict(DIT.policy("speed").state_dict())
        for _ in range(2):
            with pytest.raises(ValueError, match="needs policy 'clts'"):
                attachment.draw(torch.zeros(4))
        host = DIT.attached("loss_second_moment")
        before, damaged = str(policy_state(host)), policy_state(host)
        damaged["policies"][0].update(num_steps=7, density={})
        with pytest.raises(ValueError, match="is of another density or weighting: 'losses'"):
            load_policy_state(host, damaged)
        assert str(policy_state(host)) == before

    def test_objects_without_a_policy(self) -> None:
        with pytest.raises(ValueError, match="has no policy: see with_policy"):
            policy_state(DIT.make())
        with pytest.raises(ValueError, match="has 1 policies, wanted number 2"):
            policy_of(DIT.attached(), 2)

    def test_a_script_restores_its_state_at_the_first_draw(self) -> None:
        import diffusers

        scheduler, trained, fresh = diffusers.DDPMScheduler(), ScriptPolicy("clts"), ScriptPolicy("clts")
        trained.load_state_dict({})
        x = torch.zeros(4, 1)
        for _ in range(3):
            scheduler.add_noise(x, x, trained.timesteps(scheduler, 4))
            trained.mse_loss(x, x)
        load_policy_state(fresh, policy_state(trained))
        assert policy_state(fresh) == policy_state(trained)
        drawn = []
        for each in (copy.deepcopy(trained), fresh):
            new_process()
            drawn.append(each.timesteps(scheduler, 4))
        assert len(drawn[0].unique()) > 1

    def test_a_flow_scripts_state(self) -> None:
        import diffusers

        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        trained, fresh = (FlowScript("clts", scheduler, prediction_type="flow") for _ in range(2))
        rows = torch.zeros(4, dtype=torch.int64)
        trained.indices(rows)
        load_policy_state(fresh, policy_state(trained))
        assert fresh.policy.num_steps == 1

    def test_accelerates_checkpoints_keep_a_script(self, tmp_path: Path) -> None:
        accelerate = pytest.importorskip("accelerate")
        import diffusers

        scheduler, states = diffusers.DDPMScheduler(), []
        for step in range(2):
            accelerator, seam = accelerate.Accelerator(cpu=True), ScriptPolicy("clts")
            accelerator.register_for_checkpointing(seam)
            if step:
                accelerator.load_state(str(tmp_path))
            else:
                seam.timesteps(scheduler, 4)
                accelerator.save_state(str(tmp_path))
            states.append(seam.state_dict())
        assert states[0] == states[1] != {}


class TestDrawStream:
    def test_micro_batches_share_strata(self) -> None:
        policy, stream = build_policy("uniform", NoiseSchedule.linear(1000)), DrawStream(num_strata=8)
        means = []
        for _ in range(200):
            drawn = []
            for _ in range(8):
                policy.advance()
                drawn.append(stream.draw(policy, 1).index)
            index = torch.cat(drawn)
            assert (index * 8 // 1000).sort().values.tolist() == list(range(8))
            means.append(index.double().mean())
        # The mean of 8 strata of width 125 has variance 125^2 / 12 / 8 = 163; independent draws have 10,417.
        assert 163 / 1.4 < float(torch.stack(means).var()) < 163 * 1.4

    def test_batches_that_do_not_divide_the_strata(self) -> None:
        policy, stream = build_policy("uniform", NoiseSchedule.linear(1000)), DrawStream(num_strata=4)
        drawn = []
        for _ in range(4):
            policy.advance()
            drawn.append(stream.draw(policy, 3).index)
        strata = (torch.cat(drawn) * 4 // 1000).view(3, 4)
        assert strata.sort(1).values.tolist() == [[0, 1, 2, 3]] * 3

    def test_batches_of_several_sizes_and_a_seed_of_the_host_in_between(self) -> None:
        policy, stream = build_policy("uniform", NoiseSchedule.linear(1000)), DrawStream(num_strata=8)
        drawn = []
        for seed, batch_size in enumerate((4, 4, 6, 2, 3, 5)):
            torch.manual_seed(seed)
            policy.advance()
            drawn.append(stream.draw(policy, batch_size).index)
        strata = (torch.cat(drawn) * 8 // 1000).view(3, 8)
        assert strata.sort(1).values.tolist() == [list(range(8))] * 3

    def test_strata_go_on_after_a_resume_within_a_block(self) -> None:
        def drawn(policy: Any, num_steps: int) -> list[list[int]]:
            new_process()
            torch.manual_seed(3)
            stream, rows = DrawStream(num_strata=12), []
            for _ in range(num_steps):
                policy.advance()
                rows.append(stream.draw(policy, 8).index.tolist())
            return rows

        whole, first, second = (build_policy("uniform", NoiseSchedule.linear(1000)) for _ in range(3))
        before = drawn(first, 2)
        load_policy_state(second, policy_state(first))
        assert before + drawn(second, 3) == drawn(whole, 5)

    def test_objects_of_one_training_draw_differently(self) -> None:
        seen = []
        # The third is made anew, as in each epoch.
        for host in [DIT.attached(), DIT.attached()] + [DIT.attached()]:
            model = DIT.model(host)
            DIT.train(host, model, DIT.batch())
            seen.append(tuple(model.seen[0].tolist()))
        assert len(set(seen)) == 3

    def test_draws_follow_the_density(self) -> None:
        policy = build_policy("speed", NoiseSchedule.cosine(10))
        for stream in (DrawStream(), DrawStream(num_strata=64)):
            counts = torch.zeros(10, dtype=torch.float64)
            for _ in range(2000):
                policy.advance()
                counts += stream.draw(policy, 16).index.bincount(minlength=10)
            error = (counts / counts.sum() - policy.density) / (policy.density / 32_000).sqrt()
            assert float(error.abs().max()) < 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ranks_alike": 0}, "ranks_alike needs a whole number >= 1, got 0"),
            ({"num_strata": True}, "num_strata needs a whole number >= 2, got True"),
            (
                {"num_strata": 4, "generator": torch.Generator()},
                "num_strata has no effect beside a generator",
            ),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            with_policy(DIT.make(), **options)

    @pytest.mark.parametrize("policy", [{"type": "speed", "stratified": True}, "speedit_reference"])
    def test_strata_need_independent_draws(self, policy: Any) -> None:
        with pytest.raises(ValueError, match="num_strata needs a policy with independent draws"):
            with_policy(DIT.make(), policy, num_strata=8)

    def test_a_flow_has_no_strata(self) -> None:
        with pytest.raises(ValueError, match="num_strata has no effect on a flow host"):
            with_policy(flow_standins.SEAMS["transport"].make(), "speed", num_strata=8)


@pytest.mark.gpu
def test_draws_leave_the_devices_generator_alone() -> None:
    device = torch.device("cuda")
    policy, stream = build_policy("speed", NoiseSchedule.linear(1000)), DrawStream()
    torch.manual_seed(3)
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    policy.advance()
    first = stream.draw(policy, 64, device).index
    assert first.device.type == "cuda"
    assert torch.equal(first, stream.draw(policy, 64, device).index)
    with stream.hosts_generators(0, device):
        drawn = torch.rand(8, device=device)
    with stream.hosts_generators(1, device):
        assert not torch.equal(drawn, torch.rand(8, device=device))
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], torch.cuda.get_rng_state(device))


class TestReplica:
    @pytest.fixture(autouse=True)
    def rank_5_of_8(self, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
        groups: dict[Any, dict[int, int]] = {"world": {rank: rank for rank in range(8)}}
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda group=None: 5 if group is None else group[0])
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 8 if group is None else group[1])
        world = type("World", (), {"pg_group_ranks": groups})
        monkeypatch.setattr(dist.distributed_c10d, "_world", world)
        return groups

    def test_consecutive_ranks_are_alike(self) -> None:
        assert replica() == replica(1) == Replica(5, 8)
        assert replica(2) == Replica(2, 4)
        assert replica(8) == Replica(0, 1)
        with pytest.raises(ValueError, match="ranks_alike needs to divide the 8 processes, got 3"):
            replica(3)

    def test_one_process_is_no_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dist, "is_initialized", lambda: False)
        assert replica() == replica(1) == Replica()
        with pytest.raises(ValueError, match="ranks_alike needs to divide the 1 processes, got 2"):
            replica(2)

    def test_a_known_hosts_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = type("States", (), {"get_data_parallel_group": staticmethod(lambda: (1, 4))})
        monkeypatch.setitem(__import__("sys").modules, "opensora.acceleration.parallel_states", module)
        assert replica() == Replica(1, 4)

    def test_unknown_groups_are_refused(self, rank_5_of_8: dict[Any, Any]) -> None:
        rank_5_of_8["sequence"] = {4: 0, 5: 1}
        with pytest.raises(ValueError, match="in groups of 2 of the 8 processes.*pass ranks_alike"):
            replica()
        assert replica(2) == Replica(2, 4)
