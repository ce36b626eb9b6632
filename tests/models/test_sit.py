"""SiT and LightningDiT: their time and sign, and their own code as the reference."""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.sampling import sample
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.sit import LightningDiT, SiT
from speedit_plugins.trainer.models.weights import load_weights

SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
# Options of ours, and of hustvl/LightningDiT.
LIGHTNING = {"released": ({}, {}), "with QK-norm": ({"qk_norm": True}, {"use_qknorm": True})}
OFFICIAL = [
    *(f"LightningDiT-{size}" for size in ("B/1", "B/2", "L/2", "XL/1", "XL/2")),
    *(f"LightningDiT-{size}" for size in ("1p0B/1", "1p0B/2", "1p6B/1", "1p6B/2")),
]
USED = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "in_channels": 4}
# With the norms of DiT.
LIGHTNING["layer norms"] = ({"qk_norm": True, "norm": "layer"}, {"use_qknorm": True, "use_rmsnorm": False})


def randomised(model: nn.Module, std: float = 0.1) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model.eval()


def test_the_time_and_the_sign_are_turned_and_nothing_else() -> None:
    ours = randomised(SiT(**SMALL))
    plain = DiT(**SMALL)
    plain.load_state_dict(ours.state_dict())
    x, timestep, label = torch.randn(2, 4, 8, 8), torch.tensor([250.0, 1000.0]), torch.tensor([3, 10])
    wanted = -plain.eval()(x, torch.tensor([0.75, 0.0]), label)[:, :4]
    assert torch.equal(ours(x, timestep, label), wanted)
    prediction, hidden = ours(x, timestep, label, hidden_after=1)
    assert torch.equal(prediction, wanted)
    assert hidden.shape == (2, 16, 48)


@pytest.mark.parametrize("name", ["SiT", "SiT-S/2", "LightningDiT", "LightningDiT-B/1"])
def test_a_variance_is_refused_by_name(name: str) -> None:
    sizes = {} if "/" in name else {"hidden_size": 48, "depth": 2, "num_heads": 4, "patch_size": 2}
    with pytest.raises(ValueError, match=r"predicts a velocity and no variance.*RectifiedFlow"):
        build(MODELS, {"type": name, "input_size": 4, "learn_sigma": True, **sizes})


def test_the_arguments_are_those_of_dit_with_their_own_defaults() -> None:
    dit, lightning = (inspect.signature(model).parameters for model in (DiT, LightningDiT))
    assert set(lightning) == {*dit, "variance_channels"}
    differing = {name for name in dit if dit[name].default != lightning[name].default}
    assert differing == {"in_channels", "learn_sigma", "norm", "rope", "perceptron"}
    with pytest.raises(ValueError, match="variance_channels needs bool"):
        build(MODELS, {"type": "SiT-S/2", "variance_channels": 1.5})


def checkout(name: str) -> Path:
    folder = Path(os.environ.get("SPEEDIT_HOSTS") or "") / name
    if not folder.is_dir():
        pytest.skip(f"needs $SPEEDIT_HOSTS with a checkout {name}")
    return folder


@contextmanager
def imported(folder: Path, *, bare: tuple[str, ...] = ()) -> Iterator[None]:
    """Inside the block the checkout is importable, without timm and fairscale, and nothing is compiled."""
    source = Path(__file__).parents[2] / "benchmarks" / "peers" / "original_dit.py"
    spec = importlib.util.spec_from_file_location("original_dit", source)
    standin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(standin)
    parallel = "fairscale.nn.model_parallel"
    layers = ModuleType(f"{parallel}.layers")
    for layer in ("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear"):
        setattr(layers, layer, nn.Linear)
    names = ("fairscale", "fairscale.nn", parallel, f"{parallel}.initialize")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        for module in (*map(ModuleType, names), layers):
            patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(
            sys.modules[parallel], "initialize", sys.modules[f"{parallel}.initialize"], raising=False
        )
        with standin.importable(folder, bare=bare):
            yield


@pytest.fixture(scope="module")
def sit() -> ModuleType:
    with imported(checkout("willisma+SiT")):
        return importlib.import_module("models")


@pytest.fixture(scope="module")
def transport() -> ModuleType:
    """SiT's own loss and samplers, with a stand-in for torchdiffeq, whose solver it does not call here."""
    solver = ModuleType("torchdiffeq")
    solver.odeint = None
    with pytest.MonkeyPatch.context() as patch, imported(checkout("willisma+SiT")):
        patch.setitem(sys.modules, "torchdiffeq", solver)
        return importlib.import_module("transport")


@pytest.fixture(scope="module")
def lightning() -> ModuleType:
    with imported(checkout("hustvl+LightningDiT"), bare=("models",)):
        return importlib.import_module("models.lightningdit")


def pairs(sit: ModuleType, lightning: ModuleType) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Our model and the original's, freshly initialised at the same seed."""
    options = [(SiT, sit.SiT, {}, {})]
    for ours, theirs in LIGHTNING.values():
        options.append((LightningDiT, lightning.LightningDiT, {"in_channels": 4, **ours}, USED | theirs))
    for model, original, ours, theirs in options:
        torch.manual_seed(7)
        built = model(**SMALL, **ours)
        torch.manual_seed(7)
        yield built, original(**SMALL, **theirs)


@pytest.mark.hosts
def test_names_order_and_initial_weights_equal_the_originals(sit: ModuleType, lightning: ModuleType) -> None:
    for ours, theirs in pairs(sit, lightning):
        mine, original = ours.state_dict(), theirs.state_dict()
        assert list(mine) == list(original)
        for name, tensor in original.items():
            # Bit for bit; sines and cosines may differ in the last place between libraries, and those of
            # angles up to 3 in float32 by another one.
            atol = 3e-7 if name == "pos_embed" or "freqs" in name else 0
            assert_close(mine[name], tensor, atol=atol, rtol=0, msg=name)


@pytest.mark.hosts
def test_an_original_checkpoint_is_loaded_and_predicts_the_same_velocity(
    sit: ModuleType, lightning: ModuleType, transport: ModuleType, tmp_path: Path
) -> None:
    drift = transport.create_transport("Linear", "velocity").get_drift()
    for ours, theirs in pairs(sit, lightning):
        randomised(theirs)
        file = tmp_path / "original.safetensors"
        save_file(theirs.state_dict(), file)
        report = load_weights(ours.eval(), file)
        assert not report.left_at_init
        assert not report.unused
        x, time, label = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.37, 1.0]), torch.tensor([0, 3, 10])
        with torch.no_grad():
            # The original's time goes from noise to data, and its velocity with it.
            velocity = drift(x, time, theirs, y=label)
            assert_close(ours(x, 1000 * (1 - time), label), -velocity, atol=1e-5, rtol=1e-5)


@pytest.mark.hosts
def test_our_sampler_ends_where_eulers_method_on_the_originals_velocity_ends(
    sit: ModuleType, lightning: ModuleType
) -> None:
    for ours, theirs in pairs(sit, lightning):
        ours.load_state_dict(randomised(theirs, std=0.05).state_dict())
        noise, label = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
        x = noise
        with torch.no_grad():
            for step in range(4):
                x = x + theirs(x, torch.full((2,), step / 4), label) / 4
        found = sample(ours.eval(), RectifiedFlow(), noise, condition=label, sampler="euler", num_steps=4)
        assert_close(found, x, atol=1e-5, rtol=1e-5)


@pytest.mark.hosts
def test_gradients_equal_the_originals(sit: ModuleType, lightning: ModuleType) -> None:
    for ours, theirs in pairs(sit, lightning):
        ours.load_state_dict(randomised(theirs).state_dict())
        x, time, label = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 10])
        ours.eval()(x, 1000 * (1 - time), label).square().mean().backward()
        theirs(x, time, label).square().mean().backward()
        original = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                assert_close(parameter.grad, original[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.hosts
@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_equal_the_original_for_every_size(lightning: ModuleType, name: str) -> None:
    with torch.device("meta"):
        ours = build(MODELS, {"type": name, "input_size": 16}).state_dict()
    assert set(OFFICIAL) == set(lightning.LightningDiT_models)
    # The values of its tables are numpy's, which has no meta device.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning.LightningDiT, "initialize_weights", lambda self: None)
        with torch.device("meta"):
            theirs = lightning.LightningDiT_models[name](
                input_size=16, use_swiglu=True, use_rope=True, use_rmsnorm=True
            ).state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [
        (key, value.shape) for key, value in theirs.items()
    ]
