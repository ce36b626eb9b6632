"""LTX-2's trainer: a t for each modality, and a loss for each sample."""

import importlib
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

from speedit_plugins.hosts.trainers.modality_draws import adapt

Hosts = Callable[[], Any]


@contextmanager
def stand_in() -> Iterator[tuple[ModuleType, Any]]:
    module = importlib.reload(importlib.import_module("modality_draw_standin"))
    yield module, module.UniformTimestepSampler()


@contextmanager
def ltx_2() -> Iterator[tuple[ModuleType, Any]]:
    packages = checkout("Lightricks+LTX-2") / "packages"
    with imported(
        "ltx_trainer.training_strategies",
        [packages / "ltx-trainer" / "src", packages / "ltx-core" / "src"],
        unknown=("ltx_core", "safetensors", "peft", "wandb", "pydantic"),
    ) as module:
        samplers = importlib.import_module("ltx_trainer.timestep_samplers")
        yield module, samplers.SAMPLERS["shifted_logit_normal"]()


def batch() -> dict[str, Any]:
    """Video (4, C, F, H, W) and sound (4, C, F, W)."""
    generator = torch.Generator().manual_seed(1)
    sides = {name: torch.full((4,), 2) for name in ("num_frames", "height", "width")}
    text = {"video_prompt_embeds": None, "audio_prompt_embeds": None, "prompt_attention_mask": None}
    return {
        "video_latents": {"latents": torch.randn(4, 3, 2, 2, 2, generator=generator), **sides},
        "audio_latents": {"latents": torch.randn(4, 2, 5, 3, generator=generator)},
        "conditions": text,
    }


def inputs_and_loss(
    module: ModuleType, sampler: Any, **generated: bool
) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """What a FlexibleStrategy makes in a step: its inputs, its loss (B,), and the error of each modality."""
    torch.manual_seed(3)
    config = SimpleNamespace(video=None, audio=None)
    for name, is_generated in generated.items():
        setattr(config, name, SimpleNamespace(is_generated=is_generated, conditions=[]))
    strategy = module.FlexibleStrategy(config)
    inputs = strategy.prepare_training_inputs(batch(), sampler)
    scale = torch.tensor(0.5, requires_grad=True)
    made = {
        name: scale * each.latent
        for name in ("video", "audio")
        if (each := getattr(inputs, name, None)) is not None
    }
    loss = strategy.compute_loss(made.get("video"), made.get("audio"), inputs)
    errors = {
        name: ((each - target) ** 2).mean((1, 2)).detach()
        for name, each in made.items()
        if (target := getattr(inputs, f"{name}_targets")) is not None
    }
    return inputs, loss, errors


def host_of(made: Hosts, modality: str) -> Callable[[], Any]:
    """A host that generates one modality, from the other."""

    @contextmanager
    def fresh() -> Iterator[SplitHost]:
        with made() as (module, sampler):

            def step() -> Made:
                generated = {name: name == modality for name in ("video", "audio")}
                inputs, loss, errors = inputs_and_loss(module, sampler, **generated)
                return Made(getattr(inputs, modality).sigma, loss.mean().detach(), errors[modality])

            def forced(t: Tensor) -> Any:
                return mock.patch.object(sampler, "sample_for", side_effect=lambda _: t.clone())

            def data() -> Tensor:
                found: Tensor = batch()[f"{modality}_latents"]["latents"]
                return found

            yield SplitHost(partial(adapt, module), step, forced, observed=data)

    return fresh


@pytest.mark.parametrize("modality", ["video", "audio"])
class TestOneModality:
    def test_the_stand_in(self, modality: str) -> None:
        split_step.check(host_of(stand_in, modality))

    @pytest.mark.hosts
    def test_ltx_2(self, modality: str) -> None:
        split_step.check(host_of(ltx_2, modality))


def each_has_its_own_weights(made: Hosts) -> None:
    with made() as (module, sampler):
        recorded = Recorded(WEIGHING)
        adapt(module, recorded)
        inputs, loss, errors = inputs_and_loss(module, sampler, video=True, audio=True)
        policies = [draws.policy for draws in recorded.made]
        assert len(policies) == 2, "video and sound share a policy"
        direct = sum(
            policy.weight[(1000 * getattr(inputs, name).sigma).long()] * errors[name]
            for policy, name in zip(policies, ("video", "audio"), strict=True)
        )
        assert torch.allclose(loss, direct.float(), rtol=4e-7)
        assert not torch.equal(inputs.video.sigma, inputs.audio.sigma)


def test_both_modalities_of_the_stand_in() -> None:
    each_has_its_own_weights(stand_in)


@pytest.mark.hosts
def test_both_modalities_of_ltx_2() -> None:
    each_has_its_own_weights(ltx_2)


@pytest.mark.hosts
@pytest.mark.parametrize("with_audio", [False, True])
def test_text_to_video_of_ltx_2(with_audio: bool) -> None:
    """Its video and its sound share one sigma, and so one weight."""
    with ltx_2() as (module, sampler):
        recorded = Recorded(WEIGHING)
        adapt(module, recorded)
        torch.manual_seed(3)
        strategy = module.TextToVideoStrategy(
            SimpleNamespace(with_audio=with_audio, first_frame_conditioning_p=0.0)
        )
        given = batch()
        given["latents"] = given.pop("video_latents")
        inputs = strategy.prepare_training_inputs(given, sampler)
        video = inputs.video.latent.clone().requires_grad_()
        audio = inputs.audio.latent.clone() if with_audio else None
        loss = strategy.compute_loss(video, audio, inputs)
        errors = ((video - inputs.video_targets) ** 2).mean((1, 2))
        if audio is not None:
            errors = errors + ((audio - inputs.audio_targets) ** 2).mean((1, 2))
        weight = recorded.made[0].policy.weight[(1000 * inputs.video.sigma).long()]
        assert torch.allclose(loss, (weight * errors).float(), rtol=4e-7)
        assert len(recorded.made) == 1


def test_what_is_refused() -> None:
    with stand_in() as (module, sampler):
        adapt(module, Recorded("uniform"))
        with pytest.raises(ValueError, match=r"prepare_training_inputs has a policy already"):
            adapt(module, Recorded("uniform"))
        config = SimpleNamespace(video=SimpleNamespace(is_generated=True), audio=None)
        cut = batch()
        # Tokens that are cut from something else than the batch's latents.
        cut["video_latents"] = {"latents": SimpleNamespace(flatten=lambda _: torch.zeros(1, 1, 7))}
        with pytest.raises(ValueError, match="no latents of the 7 values that are noised"):
            module.FlexibleStrategy(config).prepare_training_inputs(cut, sampler)
    with pytest.raises(ValueError, match="has no FlexibleStrategy, a training strategy of LTX-2"):
        adapt(ModuleType("other"), Recorded("uniform"))
