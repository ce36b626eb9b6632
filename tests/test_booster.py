import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config
from torch import nn

from speedit_plugins.engine.booster import build_engine
from speedit_plugins.engine.replica import Replica
from speedit_plugins.engine.runtime import Runtime, launch
from speedit_plugins.engine.train import build_trainer

WITHOUT_CUDA = not torch.cuda.is_available()


def test_a_lone_process_of_ddp_needs_no_colossalai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail(f"looked for {name}"))
    assert type(build_engine(nn.Linear(2, 2), config, Runtime())) is Replica


@pytest.mark.parametrize("plugin", ["zero1", "zero2", "gemini"])
def test_a_sharding_plugin_without_colossalai_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *options: Any) -> Any:
        return None if name == "colossalai" else find_spec(name, *options)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    wanted = rf"plugin: {plugin} needs ColossalAI; wanted ddp, or pip install '.*\[colossal\]' && pip install"
    with pytest.raises(ValueError, match=wanted):
        build_engine(nn.Linear(2, 2), small_config(tmp_path, plugin=plugin), Runtime())


@pytest.mark.skipif(not WITHOUT_CUDA, reason="this machine has a CUDA device")
def test_gemini_is_refused_without_cuda(tmp_path: Path) -> None:
    pytest.importorskip("colossalai")
    with pytest.raises(ValueError, match=r"plugin: gemini needs CUDA, got cpu: .*wanted ddp, zero1 or zero2"):
        build_engine(nn.Linear(2, 2), small_config(tmp_path, plugin="gemini"), Runtime())


@pytest.mark.gpu
@pytest.mark.skipif(WITHOUT_CUDA, reason="needs a CUDA device")
def test_gemini_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    config = small_config(tmp_path, plugin="gemini", precision="bf16", device="cuda")
    runtime = launch(config)
    trainer = build_trainer(config, runtime)
    for _ in range(3):
        assert not trainer.optimizer_step()[0].is_skipped
    path = trainer.save()
    expected = trainer.averaged_weights()
    again = build_trainer(config, runtime)
    again.restore(path)
    torch.testing.assert_close(again.averaged_weights(), expected, rtol=0, atol=0)
