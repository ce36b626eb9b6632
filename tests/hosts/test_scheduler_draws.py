"""CogVideoX's trainers: an index of a noise scheduler, and the loss of each sample."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from conformance.host_imports import checkout, imported
from diffusers import CogVideoXDPMScheduler
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.hosts.trainers.scheduler_draws import adapt

Modules = Callable[[], Any]
SHAPE = (4, 3, 2, 4, 4)


@contextmanager
def stand_in() -> Iterator[ModuleType]:
    yield importlib.reload(importlib.import_module("scheduler_draw_standin"))


@contextmanager
def cog_video_x() -> Iterator[ModuleType]:
    with imported(
        "finetune.models.utils",
        [checkout("zai-org+CogVideo")],
        replaced=("transformers", "diffusers", "peft", "torchvision", "accelerate"),
        unknown=("wandb", "decord", "deepspeed", "bitsandbytes"),
    ) as module:
        yield module


class Step:
    """One training step of a trainer that a host's module returns. Keeps what the model saw and made."""

    def __init__(self, module: ModuleType, kind: str = "lora") -> None:
        self.scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", snr_shift_scale=1.0)
        self.scale = torch.tensor(0.5, requires_grad=True)
        trainer = object.__new__(module.get_model_cls("cogvideox-t2v", kind))
        config = SimpleNamespace(patch_size_t=None, use_rotary_positional_embeddings=False)
        vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(1,)))
        vars(trainer).update(
            components=SimpleNamespace(scheduler=self.scheduler, transformer=self.model, vae=vae),
            state=SimpleNamespace(transformer_config=config),
            accelerator=SimpleNamespace(device=torch.device("cpu")),
        )
        self.trainer = trainer

    def model(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """A velocity, in the form that the caller takes it."""
        self.seen, self.noised, self.made = timestep, hidden_states, hidden_states * self.scale
        return self.made if encoder_hidden_states is None else (self.made,)

    def loss(self) -> Tensor:
        """The host's loss."""
        torch.manual_seed(3)
        data = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        batch = {"encoded_videos": data.clone(), "prompt_embedding": torch.zeros(4, 2, 3)}
        loss: Tensor = self.trainer.compute_loss(batch)
        # The host trains (B, F, C, H, W).
        self.data = data if self.noised.shape == data.shape else data.transpose(1, 2)
        return loss

    def errors(self) -> Tensor:
        """The squared error (B,) of the velocity, in closed form: float64."""
        alpha_bar = self.scheduler.alphas_cumprod[self.seen].double().view(-1, 1, 1, 1, 1)
        noise = (self.noised - alpha_bar.sqrt() * self.data) / (1 - alpha_bar).sqrt()
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.data
        return ((self.made.detach() - target) ** 2).flatten(1).mean(1)


def seam(policy: Any, made: list[ScriptPolicy]) -> ScriptPolicy:
    made.append(ScriptPolicy(policy, generator=torch.Generator().manual_seed(5)))
    return made[-1]


def keeps_the_contract(modules: Modules) -> None:
    for policy in ("speedit", "uniform"):
        seams: list[ScriptPolicy] = []
        with modules() as module:
            adapt(module, partial(seam, policy, seams))
            step = Step(module)
            loss = step.loss()
        built = seams[0].policy
        weight = built.weight[step.seen]
        # What the host makes of the data's error is the velocity's, within the rounding of 1 - alpha_bar.
        assert_close(float(loss), float((weight * step.errors()).mean()), rtol=1e-5, atol=0)
        assert built.num_steps == 1
        state = torch.get_rng_state()
        with modules() as module:
            plain = Step(module)
            plain.loss()
            assert torch.equal(torch.get_rng_state(), state), "the host's random numbers are others"
        assert not torch.equal(plain.seen, step.seen), "the policy drew nothing"


def the_uniform_policy_is_the_host(modules: Modules) -> None:
    with modules() as module:
        adapt(module, partial(seam, "uniform", []))
        step = Step(module)
        ours = step.loss()
    randint = torch.randint

    def same(*args: Any, **kwargs: Any) -> Tensor:
        # The host's own draw is made, so its noise is the same.
        randint(*args, **kwargs)
        return step.seen.clone()

    with modules() as module, mock.patch.object(torch, "randint", side_effect=same):
        plain = Step(module)
        assert torch.equal(plain.loss(), ours)
    assert torch.equal(plain.noised, step.noised)


def evaluations_are_the_hosts(modules: Modules) -> None:
    seams: list[ScriptPolicy] = []
    with torch.no_grad():
        with modules() as module:
            plain = Step(module).loss()
        with modules() as module:
            adapt(module, partial(seam, "speedit", seams))
            ours = Step(module).loss()
    assert torch.equal(plain, ours)


def trainers_are_refused_a_second_policy(modules: Modules) -> None:
    with modules() as module:
        adapt(module, partial(seam, "speedit", []))
        with pytest.raises(ValueError, match="get_model_cls has a policy already"):
            adapt(module, partial(seam, "speedit", []))
        # Both trainers have one loss, which is edited once.
        assert Step(module, "sft").loss().requires_grad
        assert Step(module).loss().requires_grad


CHECKS = (
    keeps_the_contract,
    the_uniform_policy_is_the_host,
    evaluations_are_the_hosts,
    trainers_are_refused_a_second_policy,
)


@pytest.mark.parametrize("check", CHECKS)
def test_the_stand_in(check: Callable[[Modules], None]) -> None:
    check(stand_in)


@pytest.mark.hosts
@pytest.mark.parametrize("check", CHECKS)
def test_cog_video_x(check: Callable[[Modules], None]) -> None:
    check(cog_video_x)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="has no get_model_cls"):
        adapt(ModuleType("other"), partial(seam, "speedit", []))
