"""The wrappers' benchmark: its arithmetic for known times, its small hosts in closed form, one tiny run."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, with_policy
from speedit_plugins.hosts.attachment import attachment_of


@pytest.fixture
def bench(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("speed.wrapper_overhead")


@pytest.fixture
def results(bench: ModuleType) -> Any:
    """A host's step takes 2 s, and a seam adds 1, 3 and 5 ms to calls of 10 ms."""
    seam = bench.Timings((0.010,) * 3, (0.011, 0.015, 0.013))
    return bench.Results(
        steps=bench.Timings((2.0, 2.0, 2.0), (2.0, 2.2, 1.9)),
        control=bench.Timings((0.010,) * 3, (0.010,) * 3),
        seams={"known": seam},
    )


@pytest.fixture
def options(bench: ModuleType) -> Any:
    return bench.Options(rounds=3, repetitions=4, threads=1, batch=2, edge=8)


class TestArithmetic:
    def test_quartiles_lie_between_the_values(self, bench: ModuleType) -> None:
        assert bench.Spread.of([4.0, 1.0, 3.0, 2.0]) == bench.Spread(1.75, 2.5, 3.25)
        assert bench.Spread.of([7.0]) == bench.Spread(7.0, 7.0, 7.0)

    def test_sides_alternate_and_the_first_round_is_not_counted(self, bench: ModuleType) -> None:
        now, order = [0.0], []

        def step(name: str, seconds: float) -> Callable[[], None]:
            def run() -> None:
                order.append(name)
                # The warm-up is slow on both sides.
                now[0] += 64.0 if len(order) <= 2 else seconds

            return run

        timings = bench.interleaved(step("host", 2.0), step("ours", 3.0), 3, clock=lambda: now[0])
        assert order == ["host", "ours", "ours", "host", "host", "ours", "ours", "host"]
        # Small integers are exact in float64.
        assert timings == bench.Timings((2.0,) * 3, (3.0,) * 3)
        assert timings.added_seconds == bench.Spread(1.0, 1.0, 1.0)
        assert timings.ratios == bench.Spread(1.5, 1.5, 1.5)

    def test_differences_are_taken_within_a_round(self, bench: ModuleType) -> None:
        # The machine slows down. The difference of the medians would be 4 - 2 = 2 here.
        timings = bench.Timings((1.0, 2.0, 4.0), (2.0, 4.0, 5.0))
        assert timings.added_seconds.median == 1.0
        assert timings.ratios.median == 2.0

    def test_a_share_is_a_part_of_the_hosts_step(self, results: Any) -> None:
        share = results.share(results.seams["known"])
        # 2, 3 and 4 ms of 2 s. Differences of times near 0.01 have a rounding error of 2e-18 / 1e-3.
        assert_close((share.low, share.median, share.high), (0.001, 0.0015, 0.002), rtol=1e-12, atol=0)


class TestReport:
    def test_numbers_stand_in_their_units(self, bench: ModuleType, results: Any) -> None:
        written = bench.tables(results)
        assert "| 2.0000 s | 2.0000 s | 1.0000 | 0.9750, 1.0500 |" in written
        assert "| known | 10000 us | 3000.0 us | 2000.0, 4000.0 us | 0.1500 % | 0.2000 % |" in written
        assert "| control: host against itself | 10000 us | 0.0 us |" in written

    def test_the_answer_is_that_of_the_upper_quartile(self, bench: ModuleType, results: Any) -> None:
        assert "less than 1 % to a DiT-S/8 step? Yes: the costliest adds 0.1500 %, 0.2000 %" in bench.answer(
            results
        )
        # 15 ms of 2 s in the median, and 20.5 ms at the upper quartile.
        slow = bench.Timings((0.0, 0.0, 0.0), (0.010, 0.015, 0.026))
        told = bench.answer(replace(results, seams={**results.seams, "slow": slow}))
        assert "No: the costliest adds 0.7500 %, 1.0250 % at its upper quartile" in told

    def test_it_names_date_sizes_and_command(self, bench: ModuleType, results: Any, options: Any) -> None:
        written = bench.report(results, options, date(2026, 2, 3))
        assert "Date: 2026-02-03." in written
        assert "2 x 4 x 8 x 8 latents" in written
        assert f"torch {torch.__version__}" in written
        assert "--rounds 3 --repetitions 4 --threads 1 --batch 2 --edge 8\n" in written
        assert bench.tables(results) in written

    def test_a_checkout_is_named_without_its_place(
        self, bench: ModuleType, results: Any, options: Any, tmp_path: Path
    ) -> None:
        chosen = replace(options, checkout=tmp_path / "facebookresearch+DiT")
        written = bench.report(results, chosen, date(2026, 2, 3))
        assert "--checkout DIR/facebookresearch+DiT\n" in written
        assert str(tmp_path) not in written


class TestSmallHosts:
    def test_the_diffusion_object_has_ddpms_terms(self, bench: ModuleType) -> None:
        x, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([1, 500, 999])
        seen = []

        def model(x_t: Any, t: Any, *, variance: float) -> Any:
            seen.append(x_t)
            return torch.cat([noise + 0.5, torch.full_like(noise, variance)], dim=1)

        def terms(variance: float) -> Any:
            return bench.SmallDiffusion().training_losses(model, x, t, {"variance": variance}, noise)

        alpha_bar = NoiseSchedule.linear().alphas_cumprod
        row = alpha_bar[t].view(-1, 1, 1, 1)
        posterior = terms(-1.0)
        # float32 against float64, for values around 1.
        assert_close(seen[0].double(), row.sqrt() * x + (1 - row).sqrt() * noise, atol=1e-6, rtol=0)
        assert_close(posterior["mse"], torch.full((3,), 0.25), atol=1e-6, rtol=0)
        # With the posterior's own variance the divergence is zero.
        assert torch.equal(posterior["vb"], torch.zeros(3))
        # KL of variances beta-tilde and beta: (r - 1 - ln r) / 2 with r = beta-tilde / beta.
        r = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        upper = terms(1.0)
        assert_close(upper["vb"].double(), (r - 1 - r.log()) / 2, atol=1e-6, rtol=0)
        assert torch.equal(upper["loss"], upper["mse"] + upper["vb"])

    def test_the_transports_velocity_is_data_minus_noise(self, bench: ModuleType) -> None:
        x1 = torch.randn(4, 4, 2, 2, dtype=torch.float64)

        def exact(x_t: Any, t: Any) -> Any:
            return (x1 - x_t) / (1 - t.view(-1, 1, 1, 1))

        # x_t has a rounding error of 2e-16. The loss divides it by 1 - t and squares it.
        assert bench.SmallTransport().training_losses(exact, x1)["loss"].max() < 1e-20

    def test_steps_keep_to_their_device(self, bench: ModuleType) -> None:
        # As on a card: a tensor on the meta device that meets one on the CPU is an error.
        x, narrow = torch.empty(2, 2, 4, 2, 2, device="meta").unbind()
        wide = torch.empty(2, 8, 2, 2, device="meta", requires_grad=True)
        narrow = narrow.detach().requires_grad_()
        label, answers = {"condition": torch.zeros(2, device="meta")}, bench.costless(wide)
        for diffusion in (bench.SmallDiffusion(), with_policy(bench.SmallDiffusion(), "speedit")):
            bench.diffusion_step(diffusion, answers, x, label, bench.to_prediction(wide))()
        loss = bench.SmallTransport().training_losses(bench.costless(narrow), x)["loss"]
        assert loss.is_meta
        for step in bench.script_steps(narrow, x):
            step()

    def test_both_take_a_policy(self, bench: ModuleType) -> None:
        """A wrapper that is not called would seem to cost nothing."""
        x, wide = torch.randn(8, 4, 2, 2), torch.randn(8, 8, 2, 2)
        diffusion = with_policy(bench.SmallDiffusion(), "speedit")
        terms = diffusion.training_losses(bench.costless(wide), x, torch.zeros(8, dtype=torch.long))
        # P2's weight 1 / (1 + SNR) is below 1.
        assert (terms["loss"] < terms["mse"] + terms["vb"]).all()
        transport = with_policy(bench.SmallTransport(), "speed")
        torch.manual_seed(1)
        unweighted = torch.randn_like(x).square().flatten(1).mean(1)
        torch.manual_seed(1)
        # With zero data and prediction the error is the noise, and the host draws the noise first.
        loss = transport.training_losses(bench.costless(0 * x), 0 * x)["loss"]
        # SpeeD's weights are in [0.4, 0.6]. 1e-6 allows float32 rounding.
        assert ((loss / unweighted - 0.5).abs() <= 0.1 + 1e-6).all()
        assert attachment_of(diffusion).num_calls == attachment_of(transport).num_calls == 1

    def test_the_scripts_two_sides_reach_the_prediction(
        self, bench: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prediction = torch.zeros(4, 4, 2, 2, requires_grad=True)
        losses: list[float] = []
        monkeypatch.setattr(bench, "to_prediction", lambda _: lambda loss: losses.append(loss.item()))
        host, ours = bench.script_steps(prediction, torch.ones(4, 4, 2, 2))
        host()
        ours()
        # The squared error is 1 everywhere, so our loss is the draw's mean weight. P2's is in (0, 1).
        assert losses[0] == 1.0
        assert 0 < losses[1] < 1


class TestRun:
    def test_a_tiny_run_writes_what_it_prints(
        self, bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, threads = tmp_path / "report.md", torch.get_num_threads()
        before = date.today()
        tiny = ["--rounds=1", "--repetitions=2", "--threads=1", "--batch=1", "--edge=8"]
        try:
            bench.main([*tiny, "--report", str(path)])
        finally:
            torch.set_num_threads(threads)
        printed, written = capsys.readouterr().out, path.read_text()
        rows = [line for line in printed.splitlines() if line.startswith("|")]
        # Heading, rule and one row; then heading, rule, the control and three seams.
        assert len(rows) == 9
        assert all(row in written for row in rows)
        # Two days are possible, because midnight may pass during the test.
        assert any(f"Date: {day.isoformat()}." in written for day in (before, date.today()))

    @pytest.mark.parametrize(
        ("argument", "value", "message"),
        [
            ("--rounds", "0", "wanted numbers >= 1, got --rounds 0"),
            ("--repetitions", "-1", "wanted numbers >= 1, got --repetitions -1"),
            ("--report", "absent/report.md", "--report needs an existing folder, got absent"),
        ],
    )
    def test_what_cannot_be_measured_is_refused_at_once(
        self,
        bench: ModuleType,
        capsys: pytest.CaptureFixture[str],
        argument: str,
        value: str,
        message: str,
    ) -> None:
        with pytest.raises(SystemExit):
            bench.main([argument, value])
        assert message in capsys.readouterr().err

    def test_another_folder_is_no_checkout(self, bench: ModuleType, options: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="needs a folder named facebookresearch"):
            bench.load(replace(options, checkout=tmp_path))

    @pytest.mark.hosts
    def test_the_checkouts_model_and_diffusion_are_measured(self, bench: ModuleType, options: Any) -> None:
        checkout = Path(os.environ["SPEEDIT_HOSTS"]) / "facebookresearch+DiT"
        if not checkout.is_dir():
            pytest.skip("no checkout facebookresearch+DiT")
        chosen = replace(options, checkout=checkout, rounds=1, repetitions=1)
        try:
            diffusion = bench.load(chosen)[1]()
            measured = bench.measure(chosen)
        finally:
            # The host's package has a common name, so the test removes it.
            for name in [name for name in sys.modules if name.split(".")[0] == "diffusion"]:
                del sys.modules[name]
        assert (type(diffusion).__module__, diffusion.num_timesteps) == ("diffusion.respace", 1000)
        assert len(measured.steps.host) == len(measured.seams["diffusion object, speedit"].ours) == 1
        assert min(measured.steps.host + measured.steps.ours) > 0
