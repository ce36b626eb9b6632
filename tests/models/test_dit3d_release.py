"""The backbone of shapes against the release of DiT-3D, whose compiled functions are replaced by torch's."""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conformance import timm_layers
from exported_runs import EXPORT, trained
from safetensors.torch import load_file
from shapes_of_tests import POINTS, config_file
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.data.loader import IMAGE_STREAM, stream_seed
from speedit_plugins.trainer.data.shapes.normalization import Normalization
from speedit_plugins.trainer.diffusion.sampling import sample
from speedit_plugins.trainer.models.dit3d import SIZES_3D, DiT3D
from speedit_plugins.trainer.models.weights import load_weights
from speedit_plugins.trainer.sampling.exported_stages import load_stages

SMALL: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}


def randomised(model: nn.Module, *, std: float = 0.1) -> nn.Module:
    """The model with every trained parameter drawn from N(0, std^2)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def inputs(batch: int = 3, num_points: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    clouds = torch.randn(batch, 3, num_points)
    return clouds, torch.tensor([0, 500, 999])[:batch], torch.tensor([0, 3, 4])[:batch]


class Backend:
    """The two compiled functions of the release that the model calls, and their gradients, in torch.

    The release builds them for CUDA alone. They are written from its kernels, with their names and layouts.
    """

    @staticmethod
    def avg_voxelize_forward(features: Tensor, coords: Tensor, edge: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y, z = coords.long().unbind(1)
        index = x * edge**2 + y * edge + z
        found, counts = [], []
        for row, values in zip(index, features, strict=True):
            count = torch.bincount(row, minlength=edge**3)
            total = torch.zeros(len(values), edge**3).index_add(1, row, values)
            found.append(total / count.clamp(min=1))
            counts.append(count)
        return torch.stack(found), index, torch.stack(counts)

    @staticmethod
    def avg_voxelize_backward(gradient: Tensor, index: Tensor, counts: Tensor) -> Tensor:
        rows = zip(gradient, index, counts, strict=True)
        return torch.stack([(g[:, i] / c[i]) for g, i, c in rows])

    @staticmethod
    def trilinear_devoxelize_forward(
        edge: int, is_training: bool, coords: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        low = coords.floor()
        part = coords - low
        indices, weights = [], []
        for corner in itertools.product((0, 1), repeat=3):
            shift = torch.tensor(corner).view(1, 3, 1)
            # A point between two voxels alone has an upper neighbour.
            x, y, z = (low + shift * (part > 0)).long().unbind(1)
            indices.append(x * edge**2 + y * edge + z)
            weights.append(torch.where(shift.bool(), part, 1 - part).prod(dim=1))
        index, weight = torch.stack(indices, 1), torch.stack(weights, 1)  # (B, 8, N)
        rows = zip(features, index, weight, strict=True)
        return torch.stack([(f[:, i] * w).sum(dim=1) for f, i, w in rows]), index, weight

    @staticmethod
    def trilinear_devoxelize_backward(gradient: Tensor, index: Tensor, weight: Tensor, edge: int) -> Tensor:
        found = []
        for g, i, w in zip(gradient, index, weight, strict=True):
            spread = (g.unsqueeze(1) * w).flatten(1)  # (C, 8 N)
            found.append(torch.zeros(len(g), edge**3).index_add(1, i.flatten(), spread))
        return torch.stack(found)


@pytest.fixture(scope="module")
def release() -> Iterator[dict[str, ModuleType]]:
    """The two model files of the checkout, with `Backend` in place of its compiled functions."""
    hosts = os.environ.get("SPEEDIT_HOSTS")
    checkout = Path(hosts or "") / "DiT-3D+DiT-3D"
    if not hosts or not checkout.is_dir():
        pytest.skip("needs $SPEEDIT_HOSTS with a checkout DiT-3D+DiT-3D")
    before, path = dict(sys.modules), list(sys.path)
    if timm_layers.install():
        # The release's own, for where timm is: it has names of the parameters that ours stand-ins lack.
        layers = ModuleType("timm.models.layers")
        layers.to_2tuple = lambda value: value if isinstance(value, tuple) else (value, value)
        layers.DropPath, layers.trunc_normal_ = nn.Identity, nn.init.trunc_normal_
        sys.modules["timm.models.layers"] = layers
    backend = ModuleType("modules.functional.backend")
    backend._backend = Backend
    sys.modules["modules.functional.backend"] = backend
    sys.path[:0] = [str(checkout), str(checkout / "models")]
    own = import_module("utils_vit")
    # timm's own perceptron and attention have the names of these.
    transformer = sys.modules["timm.models.vision_transformer"]
    transformer.Mlp = own.Mlp
    yield {"plain": import_module("dit3d"), "windows": import_module("dit3d_window_attn")}
    sys.path[:] = path
    ours = ("modules", "utils_vit", "dit3d", "dit3d_window_attn", "timm")
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] in ours:
            del sys.modules[name]


@pytest.mark.hosts
def test_outputs_gradients_and_state_dicts_equal_the_release(release: dict[str, ModuleType]) -> None:
    torch.manual_seed(0)
    ours = randomised(DiT3D(**SMALL, num_points=50))
    theirs = [
        release["plain"].DiT(**SMALL),
        # The indexes as its command line makes them: no block gets a window.
        release["windows"].DiT(**SMALL, window_size=2, window_block_indexes=tuple("0,1")),
    ]
    for model in theirs:
        assert [(name, value.shape) for name, value in model.state_dict().items()] == [
            (name, value.shape) for name, value in ours.state_dict().items()
        ]
        model.load_state_dict(ours.state_dict())
    x, timestep, label = inputs()
    for training in (False, True):
        answers = []
        for model in (ours, *theirs):
            model.train(training)
            # The same draw of dropped labels in training.
            torch.manual_seed(5)
            answers.append(model(x, timestep, label))
        assert answers[0].std() > 0.05
        for answer in answers[1:]:
            assert_close(answer, answers[0], atol=1e-5, rtol=0)
    for answer in answers:
        answer.square().mean().backward()
    trained = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    for model in theirs:
        found = {name: parameter.grad for name, parameter in model.named_parameters() if name in trained}
        assert_close(found, trained, atol=1e-5, rtol=1e-4)


@pytest.mark.hosts
@pytest.mark.parametrize("has_ema", [False, True])
def test_a_checkpoint_of_the_release_loads(
    release: dict[str, ModuleType], tmp_path: Path, has_ema: bool
) -> None:
    theirs = randomised(release["plain"].DiT(**SMALL))
    # As its train.py writes it: the network is `model` of another module, in DistributedDataParallel.
    weights = theirs.state_dict()
    optimizer = torch.optim.AdamW(theirs.parameters()).state_dict()
    saved = {"epoch": 24, "optimizer_state": optimizer}
    saved["model_state"] = {f"model.module.{name}": tensor for name, tensor in weights.items()}
    if has_ema:
        saved["ema"] = {f"model.{name}": tensor + 1 for name, tensor in weights.items()}
    torch.save(saved, tmp_path / "epoch_24.pth")
    ours = DiT3D(**SMALL)
    report = load_weights(ours, tmp_path / "epoch_24.pth")
    assert (report.left_at_init, report.unused) == ((), ())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, weights[name] + has_ema), name


@pytest.mark.hosts
def test_exported_weights_load_into_the_release_which_draws_the_same(
    release: dict[str, ModuleType], tmp_path: Path
) -> None:
    sizes = "model={type: DiT3D, patch_size: 2, hidden_size: 48, depth: 2, num_heads: 4}"
    options = [sizes, "diffusion.learn_sigma=false", "guidance_scale=1", *POINTS]
    config, kept = str(config_file(tmp_path)), Normalization((10.0, 20.0, 30.0), 0.5)
    arguments = trained(tmp_path / "run", config, *options, spread=0.1, normalization=kept)
    assert EXPORT["main"](["-c", config, *arguments, "--for-loader", "--out", str(tmp_path / "out")]) == 0
    stages = load_stages(tmp_path / "out")
    (ours,), (found,) = stages.generators, stages([1, 0], seed=7)

    theirs = release["plain"].DiT(**{**SMALL, "num_classes": 2}).eval()
    theirs.load_state_dict(load_file(tmp_path / "out" / "stage_0" / "model.safetensors"))
    generator = torch.Generator().manual_seed(stream_seed(7, IMAGE_STREAM, 0))
    drawn = sample(
        theirs,
        ours.process,
        torch.randn(2, 3, 40, generator=generator),
        condition=torch.tensor([1, 0]),
        num_steps=4,
        generator=generator,
    )
    # Not only the noise: four steps of a random network change it.
    assert ours.model(drawn, torch.tensor([500, 500]), torch.tensor([1, 0])).std() > 0.05
    told = json.loads((tmp_path / "out" / "stage_0" / "normalization.json").read_text())
    assert told == {"mean": [10.0, 20.0, 30.0], "std": 0.5}
    in_units = drawn * kept.std + torch.tensor(kept.mean).unsqueeze(1)
    assert_close(found, in_units, atol=1e-4, rtol=1e-5)


@pytest.mark.hosts
def test_a_window_equals_attention_between_the_partitions_of_the_release(
    release: dict[str, ModuleType],
) -> None:
    torch.manual_seed(0)
    model = randomised(DiT3D(**SMALL, num_points=0, window_size=2, window_blocks=(1,)))
    attention, x = model.blocks[1].attn, torch.randn(2, 64, 48)
    theirs = release["windows"].Attention(48, num_heads=4)
    theirs.load_state_dict(attention.state_dict())
    cubes, padded = release["windows"].window_partition(x.view(2, 4, 4, 4, 48), 2)
    back = release["windows"].window_unpartition(theirs(cubes), 2, padded, (4, 4, 4))
    assert_close(attention(x), back.view(2, 64, 48), atol=1e-6, rtol=0)


@pytest.mark.hosts
def test_the_initial_weights_equal_the_release_at_the_same_seed(release: dict[str, ModuleType]) -> None:
    torch.manual_seed(7)
    ours = DiT3D(**SMALL).state_dict()
    torch.manual_seed(7)
    theirs = release["plain"].DiT(**SMALL).state_dict()
    # The release leaves the bias of the patches as a convolution draws it.
    assert ours["x_embedder.proj.bias"].abs().max() == 0
    for name, tensor in theirs.items():
        if name != "x_embedder.proj.bias":
            # Bit for bit; the sines of the positions may differ in the last place between libraries.
            assert_close(ours[name], tensor, atol=6e-8 if name == "pos_embed" else 0, rtol=0, msg=name)


@pytest.mark.hosts
@pytest.mark.parametrize("name", [f"{size}/{patch}" for size in SIZES_3D for patch in (2, 4, 8)])
def test_names_and_shapes_equal_the_release_for_every_size(release: dict[str, ModuleType], name: str) -> None:
    with torch.device("meta"):
        ours = build(MODELS, {"type": f"DiT3D-{name}"})
        sizes = {key: getattr(ours, key) for key in ("input_size", "num_classes", "num_points")}
        blocks = {"window_size": 2, "window_block_indexes": (0, 3)}
        made = [
            release["plain"].DiT3D_models[f"DiT-{name}"],
            release["windows"].DiT3D_models_WindAttn[f"DiT-{name}"],
        ]
    assert sizes == {"input_size": 32, "num_classes": 1, "num_points": 2048}
    ours = {key: value.shape for key, value in ours.state_dict().items()}
    for builder, options in zip(made, ({}, blocks), strict=True):
        # The release sets positions in place, and cannot be built on the meta device.
        assert {key: value.shape for key, value in shapes(builder, options).items()} == ours


def shapes(builder: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """State dict of a model of the release, on the meta device."""
    with torch.device("meta"):
        return builder(**options).state_dict()
