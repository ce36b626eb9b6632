import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config
from torch import nn

from speedit_plugins.trainer.parallel.booster import as_plain_tensor
from speedit_plugins.trainer.parallel.engines import build_engine
from speedit_plugins.trainer.parallel.replica import Replica
from speedit_plugins.trainer.parallel.runtime import Runtime


def test_a_lone_process_of_ddp_needs_no_colossalai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path)
    find_spec = importlib.util.find_spec

    def watched(name: str, *options: Any) -> Any:
        # Torch looks for modules of its own.
        return pytest.fail(f"looked for {name}") if name == "colossalai" else find_spec(name, *options)

    monkeypatch.setattr(importlib.util, "find_spec", watched)
    assert type(build_engine(nn.Linear(2, 2), config, Runtime())) is Replica


@pytest.mark.parametrize("plugin", ["zero1", "zero2", "gemini"])
def test_a_sharding_plugin_without_colossalai_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *options: Any) -> Any:
        return None if name == "colossalai" else find_spec(name, *options)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    install = r"pip install '.*\[colossal\]' && pip install"
    wanted = rf"plugin: {plugin} needs ColossalAI; wanted ddp or fsdp2, or {install}"
    with pytest.raises(ValueError, match=wanted):
        build_engine(nn.Linear(2, 2), small_config(tmp_path, plugin=plugin), Runtime())


def test_what_gemini_returns_is_a_plain_tensor_with_its_gradient() -> None:
    pytest.importorskip("colossalai")
    from colossalai.tensor.colo_tensor import ColoTensor

    class Gemini(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).as_subclass(ColoTensor)

    model, lost = Gemini(3, 1, bias=False), torch.zeros(2)
    view = lost[:1]
    view += model(torch.ones(1, 3)).detach().sum()
    assert lost.tolist() == [0, 0]
    model.register_forward_hook(as_plain_tensor)
    output, sums = model(torch.ones(1, 3)), torch.zeros(2)
    total = sums[:1]
    total += output.detach().sum()
    assert type(output) is torch.Tensor
    assert sums.tolist() == [output.item(), 0]
    output.sum().backward()
    assert model.weight.grad.tolist() == [[1, 1, 1]]


def test_gemini_is_refused_without_cuda(tmp_path: Path) -> None:
    pytest.importorskip("colossalai")
    with pytest.raises(
        ValueError, match=r"plugin: gemini needs CUDA, got cpu: .*wanted ddp, zero1, zero2 or fsdp2"
    ):
        build_engine(nn.Linear(2, 2), small_config(tmp_path, plugin="gemini"), Runtime())
