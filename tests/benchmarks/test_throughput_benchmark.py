"""The benchmark against peers: loading hosts, arithmetic for known times, its parts at small shapes."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

Load = Callable[[str], ModuleType]


@pytest.fixture
def hosts() -> Path:
    return Path(os.environ["SPEEDIT_HOSTS"])


def host_of(load: Load, name: str, hosts: Path) -> Any:
    module = load("peers.training")
    hosts_of = (*module.IMAGE_HOSTS, *module.FLOW_HOSTS, *module.VIDEO_HOSTS)
    host = next(each for each in hosts_of if each.name == name)
    if not host.is_in(hosts):
        pytest.skip(f"no checkout {host.checkout}")
    return host


class TestLoading:
    def test_a_missing_checkout_is_named(self, load: Load, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match="no checkout of facebookresearch/DiT: .*models.py is not a file"
        ):
            load("peers.original_dit").load_original(tmp_path)

    def test_the_stand_in_layers_equal_torch_modules(self, load: Load) -> None:
        original = load("peers.original_dit")
        x = torch.randn(2, 5, 12)
        ours = original.Attention(12, num_heads=3, qkv_bias=True)
        theirs = nn.MultiheadAttention(12, 3, batch_first=True)
        theirs.load_state_dict(
            {
                "in_proj_weight": ours.qkv.weight,
                "in_proj_bias": ours.qkv.bias,
                "out_proj.weight": ours.proj.weight,
                "out_proj.bias": ours.proj.bias,
            }
        )
        # Float32 sums of 12 products, in another order.
        assert_close(ours(x), theirs(x, x, x)[0], atol=1e-6, rtol=0)
        mlp = original.Mlp(12, 20, act_layer=nn.ReLU, drop=0.0)
        assert torch.equal(mlp(x), nn.Sequential(mlp.fc1, nn.ReLU(), mlp.fc2)(x))
        patches = original.PatchEmbed(4, 2, 3, 12)
        assert patches.num_patches == 4
        image = torch.randn(1, 3, 4, 4)
        assert torch.equal(patches(image)[0, 3], patches.proj(image)[0, :, 1, 1])

    def test_a_hosts_modules_leave_with_the_block_and_others_come_back(
        self, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "hostpart"
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('not to be run')")
        (package / "numbers_of_it.py").write_text("ONE = 1")
        other = ModuleType("hostpart")
        monkeypatch.setitem(sys.modules, "hostpart", other)
        with load("peers.original_dit").importable(tmp_path, bare=("hostpart",)):
            assert importlib.import_module("hostpart.numbers_of_it").ONE == 1
        assert sys.modules["hostpart"] is other
        assert "hostpart.numbers_of_it" not in sys.modules
        assert str(tmp_path) not in sys.path

    def test_one_function_of_a_script_runs_without_its_imports(self, load: Load, tmp_path: Path) -> None:
        script = tmp_path / "train.py"
        script.write_text("import absent_package\ndef double(x: absent_package.Number):\n    return 2 * x\n")
        load_function = load("peers.original_dit").script_function
        assert load_function(script, "double")(4) == 8
        with pytest.raises(ValueError, match="train.py needs a function halve, got none"):
            load_function(script, "halve")


class TestArithmetic:
    @pytest.fixture
    def found(self, load: Load) -> Any:
        """Ours takes 2 s, 1 s of it forward. The host takes 3 s in one round and 5 s in the other."""
        steps = load("speed.training_steps")
        nothing = dict.fromkeys(steps.PHASES, (0.0, 0.0))
        ours = steps.Steps((2.0, 2.0), {**nothing, "forward": (1.0, 1.0), "draw": (0.01, 0.01)})
        host = steps.Steps((3.0, 5.0), {**nothing, "backward": (2.0, 2.0)})
        return steps.Comparison(steps.Case("DiT-S/8", 4, 8), {"ours": ours, "host": host})

    def test_a_ratio_is_the_peers_seconds_over_ours(self, found: Any) -> None:
        # The ratios are 3 / 2 and 5 / 2.
        assert found.ratio("host").median == 2.0
        assert found.ratio("ours").median == 1.0

    def test_rest_is_what_the_phases_leave(self, found: Any) -> None:
        assert found.sides["host"].split()["rest"] == 2.0  # the median of 1 and 3

    def test_the_table_says_whether_the_floor_holds(self, load: Load, found: Any) -> None:
        bench = load("speed.throughput")
        assert "Floor 1.1: held by ours, 2.000 against host." in bench.steps_table(found, 1.1)
        assert "Floor 2.5: missed by ours, 2.000 against host." in bench.steps_table(found, 2.5)
        # 4 samples in 2 s.
        assert "| ours | 2.000 s | 2.00 | 1.000 (1.000, 1.000) |" in bench.steps_table(found, None)

    def test_compiled_is_a_side_of_ours_not_a_peer(self, load: Load, found: Any) -> None:
        steps = load("speed.training_steps")
        twice_as_fast = steps.Steps((1.0, 1.0), found.sides["ours"].phases)
        both = steps.Comparison(found.case, {**found.sides, steps.COMPILED: twice_as_fast})
        text = load("speed.throughput").steps_table(both, 3.0)
        assert "Floor 3.0: missed by ours, 2.000 against host." in text
        # The ratios are 3 / 1 and 5 / 1.
        assert "Floor 3.0: held by ours, compiled, 4.000 against host." in text
        assert "| host | 4.000 s | 1.00 | 2.000 (1.750, 2.250) | 4.000 (3.500, 4.500) |" in text

    def test_the_draws_share_is_of_our_step(self, load: Load, found: Any) -> None:
        bench = load("speed.throughput")
        assert bench.draw_shares({"DiT-S/8": bench.steps_values(found)}) == {"DiT-S/8": 0.005}

    def test_the_fewest_calls_reach_mean_and_deviation_of_the_reference(self, load: Load) -> None:
        # Mean 2, standard deviation 1.
        distances = load("speed.sampling_calls").Distances(
            (1.0, 2.0, 3.0), {"ddim": {50: (2.0, 2.0), 10: (3.0, 3.0), 5: (3.1, 3.1)}, "dpm": {4: (9.0, 9.0)}}
        )
        assert distances.level == 3.0
        assert distances.fewest("ddim") == 10
        assert distances.fewest("dpm") is None
        assert "10 calls, 25.0 times fewer" in load("speed.throughput").sampling_table(distances)

    def test_the_pace_of_samples_is_told_with_the_ratio(self, load: Load) -> None:
        pace = load("speed.sampling_pace")
        found = load("speed.wrapper_overhead").Timings((3.0, 5.0), (2.0, 2.0))
        text = pace.told(pace.Samples("DiT-S/8", 4, 8, 25), found)
        assert "facebookresearch/DiT 4.000 s, ours 2.000 s (2.00 samples/s), ratio 2.000" in text

    def test_phases_add_up_by_the_clock_until_they_are_taken(self, load: Load) -> None:
        steps = load("speed.training_steps")
        times = iter(range(100))
        watch = steps.Stopwatch(lambda: float(next(times)), steps.PHASES)
        for name in (*steps.PHASES, "draw", "data"):
            with watch.phase(name):
                pass
        assert watch.take() == {**dict.fromkeys(steps.PHASES, 1.0), "draw": 2.0}


class TestParts:
    def test_our_side_is_a_step_of_the_trainer(self, load: Load) -> None:
        steps = load("speed.training_steps")
        x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
        step = steps.OurStep(steps.Case("DiT-S/8", 2, 8), x, y, iter(range(10_000)).__next__)
        before = step.trainer.model.final_layer.linear.weight.detach().clone()
        seconds, split = step()
        assert step.trainer.step == 1
        assert not torch.equal(before, step.trainer.model.final_layer.linear.weight)
        # The clock moves by 1 each time it is read. A phase lasts 1, the draw 2, since its random numbers are
        # made before the batch is there. The step lasts at least as long as all phases.
        assert split == {**dict.fromkeys(steps.PHASES, 1), "draw": 2}
        assert seconds > len(steps.PHASES)

    def test_a_compiled_side_has_the_weights_of_the_other(self, load: Load) -> None:
        steps = load("speed.training_steps")
        x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
        case = steps.Case("DiT-S/8", 2, 8)
        plain, compiled = (steps.latent_trainer(case, x, y, is_compiled=each).model for each in (False, True))
        # `Module.compile` sets this attribute. Nothing is compiled before the first call.
        assert plain._compiled_call_impl is None
        assert compiled._compiled_call_impl is not None
        weights = compiled.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())

    def test_our_draws_are_there_without_any_checkout(self, load: Load, tmp_path: Path) -> None:
        draw_cost = load("speed.draw_cost")
        found = draw_cost.measure(tmp_path, [4], 2)
        learning = [f"ours: {name}, drawn and taught" for name in draw_cost.LEARNING]
        assert list(found[4]) == [*(f"ours: {name}" for name in draw_cost.POLICIES), *learning]
        assert load("speed.throughput").draw_table(found).splitlines()[3].endswith("| 1.00 |")

    def test_latents_are_read_from_images_and_from_their_cache(self, load: Load) -> None:
        reading = load("speed.latent_reading").measure(image_size=16, batch=2, rounds=1, channels=(32, 32))
        assert len(reading.timings.host) == len(reading.timings.ours) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--rounds", "0"], "wanted rounds and threads >= 1, got --rounds 0"),
            (["--clock", "cpu"], "wanted --threads 1, got 2"),
            (["--json", "absent/out.json"], "--json needs an existing folder, got absent"),
        ],
    )
    def test_what_cannot_be_measured_is_refused_at_once(
        self, load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
    ) -> None:
        with pytest.raises(SystemExit):
            load("speed.throughput").main(["--hosts", str(tmp_path), *options])
        assert message in capsys.readouterr().err

    def test_peers_without_a_checkout_are_named(
        self, load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench = load("speed.throughput")
        monkeypatch.setattr(bench, "BATCH_SIZES", (2,))
        out, threads = tmp_path / "out.json", torch.get_num_threads()
        try:
            bench.main(
                ["--hosts", str(tmp_path), "--only", "draw", "sampling", "--threads", "1", "--json", str(out)]
            )
        finally:
            torch.set_num_threads(threads)
        printed = capsys.readouterr().out
        assert f"left out: Latte, no checkout Vchitect+Latte in {tmp_path}" in printed
        assert "sampling: left out, no checkout NUS-HPC-AI-Lab+SpeeD" in printed
        assert list(json.loads(out.read_text())["draw"]["seconds"]) == ["2"]


def assert_same_predictions(steps: ModuleType, parts: Any, case: Any) -> None:
    """With our weights a host's model predicts what ours predicts, so their steps do the same work."""
    x, y, t = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 700])
    ours = steps.OurStep(case, x, y, iter(range(10_000)).__next__).trainer.model.eval()
    parts.model.load_state_dict(ours.state_dict())
    with torch.no_grad():
        # float32, twelve blocks whose weights have a standard deviation of 0.02.
        assert_close(parts.model.eval()(x, t, y), ours(x, t, y), atol=1e-4, rtol=0)


@pytest.mark.hosts
class TestHosts:
    @pytest.mark.parametrize("name", ["facebookresearch/DiT", "fast-DiT", "SpeeD reference", "SiT"])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_an_image_host_trains_from_our_weights(
        self, load: Load, hosts: Path, name: str, precision: str
    ) -> None:
        steps = load("speed.training_steps")
        host = host_of(load, name, hosts)
        case = steps.Case("DiT-S/8", 2, 8, is_flow=name == "SiT")
        if precision == "fp32":
            parts = host.build(hosts / host.checkout, case.model, case.model_options)
            assert_same_predictions(steps, parts, case)
        setting = load("speed.devices").Setting(precision=precision)
        found = steps.compare(case, [host], hosts, 1, setting=setting)
        assert list(found.sides) == ["ours", name]
        assert min(min(side.seconds) for side in found.sides.values()) > 0

    @pytest.mark.parametrize("name", ["facebookresearch/DiT", "SiT", "Latte"])
    def test_a_hosts_losses_keep_to_their_device(self, load: Load, hosts: Path, name: str) -> None:
        # As on a card: a tensor on the meta device that meets one on the CPU is an error.
        host = host_of(load, name, hosts)
        is_video = name == "Latte"
        case = load("speed.training_steps").Case(
            "Latte-S/8" if is_video else "DiT-S/8", 2, 8, num_frames=2 * is_video, is_flow=name == "SiT"
        )
        parts = host.build(hosts / host.checkout, case.model, case.model_options)
        model = parts.model.to("meta")
        x = torch.empty(2, *[2] * is_video, 4, 8, 8, device="meta")
        y = None if is_video else torch.zeros(2, dtype=torch.long, device="meta")
        loss = parts.losses(model, x, parts.draw(2, "meta"), y)
        loss.mean().backward()
        assert loss.is_meta
        assert loss.shape == (2,)

    def test_latte_trains_from_our_weights(self, load: Load, hosts: Path) -> None:
        steps = load("speed.training_steps")
        host = host_of(load, "Latte", hosts)
        found = steps.compare(steps.Case("Latte-S/8", 1, 8, num_frames=2), [host], hosts, 1)
        assert list(found.sides) == ["ours", "Latte"]

    def test_both_sides_draw_samples_of_equal_weights(self, load: Load, hosts: Path) -> None:
        host = host_of(load, "facebookresearch/DiT", hosts)
        pace, shapes = load("speed.sampling_pace"), []

        def see(module: nn.Module, given: Any, output: Any) -> None:
            if type(module).__name__ == "FinalLayer":
                shapes.append((type(module).__module__ == "models", tuple(output.shape)))

        handle = nn.modules.module.register_module_forward_hook(see)
        try:
            found = pace.measure(hosts / host.checkout, pace.Samples("DiT-S/8", 2, 8, 3), rounds=1)
        finally:
            handle.remove()
        assert len(found.host) == len(found.ours) == 1
        theirs, ours = ([shape for is_host, shape in shapes if is_host == side] for side in (True, False))
        # Each side calls its model for 2 samples and their unconditional twins, three steps in each of two
        # rounds. A sample is one token of 8 x 8 pixels with means and variances of 4 channels.
        assert theirs == ours == [(4, 1, 8 * 8 * 2 * 4)] * 6

    def test_the_learning_sampler_is_warm_and_of_equal_losses_uniform(self, load: Load, hosts: Path) -> None:
        module = load("peers.training")
        if not (hosts / module.GUIDED).is_dir():
            pytest.skip(f"no checkout {module.GUIDED}")
        draw = module.guided_draws(hosts / module.GUIDED)["loss-second-moment"]
        index, weight = draw(16)
        assert index.shape == (16,)
        # 1 / (T p) at p = 1 / T, in float32.
        assert_close(weight, torch.ones(16), atol=1e-6, rtol=0)

    def test_the_references_weights_lie_in_its_range(self, load: Load, hosts: Path) -> None:
        module = load("peers.training")
        if not (hosts / module.SPEED).is_dir():
            pytest.skip(f"no checkout {module.SPEED}")
        index, weight = module.speed_draw(hosts / module.SPEED)(64)
        # Change-aware weights are in [0.4, 0.6] below 700, and 1 from there. 1e-6 allows float32 rounding.
        assert ((weight[index < 700] - 0.5).abs() <= 0.1 + 1e-6).all()
        assert (weight[index >= 700] == 1).all()
