"""The contract: on stand-ins with the hosts' signatures, and on real checkouts if there are any.

The contract is what the plugin keeps in every host; conformance/points.py lists its eight points.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import check_hosts
import pytest
import torch
from conformance.diffusion_object import ObjectSeam
from conformance.points import check
from host_standins import IMAGES, SEAMS, MaskedDiffusion, SpacedDiffusion, create

TOOL = Path(check_hosts.__file__)
ALL_POINTS = list(range(1, 12))


@pytest.mark.filterwarnings("ignore:host_standins weighs its mse already")
@pytest.mark.parametrize("name", SEAMS)
def test_the_contract_holds_on_stand_ins(name: str) -> None:
    assert check(SEAMS[name]) == ALL_POINTS


class TestTheContractCanFail:
    """Hosts in which the plugin would not keep a point."""

    def test_a_host_that_draws_again_breaks_point_1(self) -> None:
        class Redrawing(SpacedDiffusion):
            def training_losses(self, model: Any, x_start: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
                return super().training_losses(model, x_start, torch.full_like(t, 3), *args, **kwargs)

        with pytest.raises(AssertionError, match="point 1, draws_are_seen: drew .* the model saw"):
            check(ObjectSeam(lambda r: create(Redrawing, r), IMAGES))

    def test_a_scaled_mse_breaks_point_2(self) -> None:
        class Doubled(SpacedDiffusion):
            """Trains on twice the error that it reports."""

            def terms(self, answer: Any, noise: Any, t: Any) -> Any:
                terms = super().terms(answer, noise, t)
                return {**terms, "loss": 2 * terms["loss"]}

        with pytest.raises(AssertionError, match=r"point 2, loss_is_weighted: loss misses w \* mse \+ vb"):
            check(ObjectSeam(lambda r: create(Doubled, r), IMAGES))


@pytest.mark.hosts
@pytest.mark.parametrize("host", check_hosts.HOSTS, ids=lambda host: host.name)
def test_the_contract_holds_on_the_checkout(host: check_hosts.Host) -> None:
    hosts = Path(os.environ["SPEEDIT_HOSTS"])
    if not (hosts / host.folder).is_dir():
        pytest.skip(f"no checkout {host.folder}")
    result = check_hosts.check_in_process(host, hosts)
    assert not result["error"]
    assert result["points"] == ALL_POINTS
    found = result["launcher"].split(", seam ")[0]
    assert (host.name.split()[0] in found) == bool(host.factory_call)
    assert bool(result["warnings"]) == (host.name == "MDT")


class TestCheckHosts:
    def test_an_empty_folder_is_an_error(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert check_hosts.main(["--hosts", str(tmp_path)]) == 2
        assert "none of facebookresearch+DiT" in capsys.readouterr().err

    def test_an_unknown_name_lists_the_known_ones(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="unknown host 'DTI'; known: DiT, fast-DiT"):
            check_hosts.main(["--hosts", str(tmp_path), "--only", "DTI"])

    def test_a_checkout_that_cannot_be_imported_fails_the_run(self, tmp_path: Path) -> None:
        (tmp_path / "facebookresearch+DiT").mkdir()
        report = tmp_path / "out.json"
        command = [sys.executable, str(TOOL), "--hosts", str(tmp_path), "--json", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "FAILED: ModuleNotFoundError: No module named 'diffusion'" in done.stdout
        assert "not found: MDT" in done.stdout
        assert json.loads(report.read_text())[0]["points"] == []

    def test_a_host_is_reported_before_the_next_starts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for folder in ("facebookresearch+DiT", "sail-sg+MDT"):
            (tmp_path / folder).mkdir()
        # Like a pipe, this keeps what is printed until it is flushed.
        printed, report = io.BytesIO(), tmp_path / "out.json"
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed))
        before: list[str] = []

        def checked(host: check_hosts.Host, hosts: Path) -> dict[str, Any]:
            before.append(printed.getvalue().decode() + (report.read_text() if report.exists() else ""))
            return {**check_hosts.nothing_known(host), "points": ALL_POINTS}

        monkeypatch.setattr(check_hosts, "check_in_process", checked)
        assert check_hosts.main(["--hosts", str(tmp_path), "--json", str(report)]) == 0
        first, second = before
        assert first.splitlines() == [check_hosts.HEADER]
        assert second.splitlines()[1].split() == ["DiT", "B", *map(str, ALL_POINTS), "-", "none"]
        assert '"host": "DiT"' in second
        assert "MDT" not in second
        assert [result["host"] for result in json.loads(report.read_text())] == ["DiT", "MDT"]

    def test_a_host_that_hangs_fails_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def hanging(command: list[str], **options: Any) -> None:
            raise subprocess.TimeoutExpired(command, options["timeout"])

        monkeypatch.setattr(check_hosts.subprocess, "run", hanging)
        result = check_hosts.check_in_process(check_hosts.HOSTS[0], tmp_path)
        assert result["error"] == f"no answer in {check_hosts.LIMIT_SECONDS} seconds"

    def test_stand_ins_answer_for_named_packages_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_ins = check_hosts.StandIns(["absent_package"])
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, stand_ins])
        import absent_package.layers as layers

        class Derived(layers.Base):
            pass

        @layers.registry.register_module()
        class Registered:
            pass

        assert Derived(1, key=2) is not None
        assert Registered.__name__ == "Registered"
        assert stand_ins.used == ["absent_package"]
        with pytest.raises(ModuleNotFoundError):
            __import__("another_absent_package")
        for name in [name for name in sys.modules if name.startswith("absent_package")]:
            monkeypatch.delitem(sys.modules, name)


def test_the_mdt_stand_in_carries_min_snr() -> None:
    diffusion = create(MaskedDiffusion)
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    error = torch.ones(2)
    assert torch.allclose(
        diffusion.mse(error, torch.tensor([0, 999])),
        torch.tensor([5 / snr[0], 1.0], dtype=torch.float32),
        # 1 - alpha-bar is 1e-4 at t = 0: float32 keeps 6e-8 / 1e-4 of it.
        rtol=1e-3,
    )
