"""diffusion-pipe: its models prepare inputs and a label, whose mask brings the weights to the loss."""

import ast
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from conformance import split_step
from conformance.host_imports import checkout, imported
from conformance.split_step import WEIGHING, Made, Recorded, SplitHost
from torch import Tensor

from speedit_plugins.hosts.edits.function_edits import edit
from speedit_plugins.hosts.trainers.prepared_inputs import DRAW, adapt

HOST = "tdrussell+diffusion-pipe"
# Draws an index of DDPM; draws a noise level of EDM.
NOT_FLOWS = {"SDXLPipeline", "CosmosPipeline"}
# Where t is among the inputs of a model, and its scale.
T_OF_MODEL = {
    "FlowPipeline": (1, 1000),
    "FluxPipeline": (3, 1),
    "SD3Pipeline": (1, 1000),
    "WanPipeline": (2, 1000),
}
UNIFORM = {"timestep_sample_method": "uniform", "guidance": 1.0}


def latents(num_dims: int) -> Tensor:
    """Latents (4, C, [F,] H, W) of a batch."""
    shape = (4, 16, 4, 4) if num_dims == 4 else (4, 16, 1, 4, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Settings(dict[str, Any]):
    """A dict whose keys are attributes too."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class Inputs(dict[str, Any]):
    """What a model of the host gets. All its embeddings of texts are the same here."""

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros(4, 2, 3)


def inputs(num_dims: int, mask: Tensor | None = None) -> Inputs:
    """A batch with latents and a mask."""
    return Inputs(latents=latents(num_dims), mask=mask)


@contextmanager
def stand_in() -> Iterator[tuple[ModuleType, Any]]:
    base = importlib.reload(importlib.import_module("prepared_input_standin"))
    models = importlib.reload(importlib.import_module("prepared_input_models"))
    yield base, models.FlowPipeline


def diffusion_pipe(module: str, name: str) -> Callable[[], Any]:
    """A model class of the host, with stand-ins for what its module imports."""

    @contextmanager
    def made() -> Iterator[tuple[ModuleType, Any]]:
        with (
            warnings.catch_warnings(),
            # Wan's text encoder asks for it in a default.
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            imported(
                "models",
                [checkout(HOST)],
                replaced=(
                    "transformers",
                    "diffusers",
                    "peft",
                    "torchvision",
                    "torchaudio",
                    "comfy",
                    "deepspeed",
                ),
                unknown=("comfy_api", "folder_paths", "nodes", "av", "multiprocess", "toml", "bitsandbytes")
                + (
                    "flash_attn",
                    "accelerate",
                    "safetensors",
                    "optimum",
                    "ftfy",
                    "datasets",
                    "ltx_video",
                ),
                others={
                    "imageio": {"config": SimpleNamespace(video_extensions=[])},
                    "easydict": {"EasyDict": Settings},
                },
                tops=("utils",),
            ),
        ):
            # Autocast for a GPU warns on a CPU.
            warnings.simplefilter("ignore")
            base = importlib.import_module("models.base")
            yield base, getattr(importlib.import_module(f"models.{module}"), name)

    return made


def host_of(made: Callable[[], Any], num_dims: int = 4, **config: Any) -> Callable[[], Any]:
    @contextmanager
    def fresh() -> Iterator[SplitHost]:
        with made() as (base, model_class):
            model = object.__new__(model_class)
            vars(model).update(config={}, model_config={**UNIFORM, **config}, is_flex2=False)
            vars(model).update(t_dist=torch.linspace(0, 1, 1001)[:-1], cache_text_embeddings=True)
            vars(model).update(diffusers_pipeline=SimpleNamespace(_prepare_latent_image_ids=image_ids))
            model.model_type = "t2v"

            def step() -> Made:
                torch.manual_seed(3)
                features, (target, mask) = model.prepare_inputs(inputs(num_dims))
                noised = features[0]
                number, scale = T_OF_MODEL[model_class.__name__]
                output = torch.tensor(0.5, requires_grad=True) * noised
                errors = ((output - target) ** 2).detach().flatten(1).mean(1)
                # The host's dataloader passes an empty mask on for None.
                loss = model.get_loss_fn()(output, (target, torch.tensor([]) if mask is None else mask))
                return Made(features[number] / scale, loss.detach(), errors)

            def forced(t: Tensor) -> Any:
                shift = config.get("shift", 1.0)
                before = t / (shift - (shift - 1) * t)
                if hasattr(importlib.import_module(model_class.__module__), "sample_t"):
                    name = f"{model_class.__module__}.sample_t"
                    return mock.patch(name, side_effect=lambda *_, **__: t.clone())
                uniform = torch.distributions.uniform.Uniform
                return mock.patch.object(uniform, "sample", side_effect=lambda *_: before.clone())

            yield SplitHost(
                partial(adapt, base), step, forced, learns=False, observed=partial(latents, num_dims)
            )

    return fresh


def image_ids(*_: Any) -> Tensor:
    """Positions (4, 3) of the tokens, as diffusers' pipeline makes them."""
    return torch.zeros(4, 3)


def test_the_stand_in() -> None:
    split_step.check(host_of(stand_in, shift=3.0))


@pytest.mark.hosts
@pytest.mark.parametrize(
    ("module", "name", "num_dims"),
    [("flux", "FluxPipeline", 4), ("sd3", "SD3Pipeline", 4), ("wan.wan", "WanPipeline", 5)],
)
def test_models_of_diffusion_pipe(module: str, name: str, num_dims: int) -> None:
    split_step.check(host_of(diffusion_pipe(module, name), num_dims))


@pytest.mark.hosts
def test_every_flow_model_of_diffusion_pipe_can_be_edited() -> None:
    edited, refused = set(), set()
    for path in sorted((checkout(HOST) / "models").rglob("*.py")):
        for cls in ast.parse(path.read_text(encoding="utf-8")).body:
            for node in getattr(cls, "body", []):
                if getattr(node, "name", "") != "prepare_inputs" or path.stem == "base":
                    continue
                try:
                    edit(node, DRAW, "calls", cls.name)
                except ValueError:
                    refused.add(cls.name)
                    continue
                edited.add(cls.name)
                text = ast.unparse(node)
                # t is 1 at noise in each, the draw comes before the noise, and the model gets the new t.
                assert "(1 - t_expanded) * " in text, cls.name
                assert text.index("calls.times(") < text.index("t_expanded = t.view"), cls.name
    assert refused == NOT_FLOWS
    assert len(edited) == 21, sorted(edited)


def prepared(model_class: type, policy: Any, mask: Tensor | None = None, **options: Any) -> Any:
    """What a model prepares, in the stand-in with a policy."""
    with stand_in() as (base, _):
        recorded = Recorded(policy)
        adapt(base, recorded)
        cls = getattr(importlib.import_module("prepared_input_models"), model_class)
        model = cls()
        model.model_config = {}
        return model.prepare_inputs(inputs(4, mask), **options), recorded


def test_weights_multiply_the_hosts_mask() -> None:
    own = torch.zeros(4, 1, 4, 4)
    own[..., 2:] = 1
    ((_, t), (_, mask)), recorded = prepared("FlowPipeline", WEIGHING, own)
    weight = recorded.made[0].policy.weight[t.long()].float()
    assert torch.allclose(mask, weight.view(4, 1, 1, 1) * own)


def test_a_quantile_of_an_evaluation_is_the_hosts() -> None:
    ((_, t), (_, mask)), recorded = prepared("FlowPipeline", WEIGHING, timestep_quantile=0.25)
    assert t.tolist() == [250.0] * 4
    assert mask is None
    assert not recorded.made


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="known are diffusion-pipe's flow models, not SDXL and Cosmos 1"):
        prepared("ImagePipeline", "uniform")
    with pytest.raises(ValueError, match="not the mean of each sample's error times its mask"):
        prepared("NormalisedPipeline", WEIGHING)
    # It only draws.
    assert prepared("NormalisedPipeline", "logit_normal")[0][1][1] is None
    with stand_in() as (base, _):
        adapt(base, Recorded("uniform"))
        with pytest.raises(ValueError, match="have a policy already"):
            adapt(base, Recorded("uniform"))
    with pytest.raises(ValueError, match="has no CommonPipeline"):
        adapt(ModuleType("other"), Recorded("uniform"))
