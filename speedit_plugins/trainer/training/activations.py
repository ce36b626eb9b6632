"""How much memory a forward pass leaves to the backward pass, counted without allocating it."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from speedit_plugins.trainer.accelerations.objective import Acceleration, asked_of
from speedit_plugins.trainer.models.interface import example_inputs
from speedit_plugins.trainer.models.layers.attention import SelfAttention
from speedit_plugins.trainer.parallel.units import units


@dataclass(frozen=True)
class Activations:
    """Bytes between the forward and the backward pass of one rank.

    Args:
        kept: bytes of the tensors that autograd keeps.
        largest_unit: those that it keeps of one block, at most.
        attended: bytes of the tokens that come out of the self-attentions among all tokens, which ranks that
            share samples exchange.
    """

    kept: int
    largest_unit: int
    attended: int = 0


def activations(
    model: nn.Module,
    num_samples: int,
    *,
    precision: str,
    is_cast: bool,
    accelerations: Sequence[Acceleration] = (),
) -> Activations:
    """Counts one forward pass of a rank.

    It runs on fake tensors of the CPU, whose attention keeps what the fused kernels keep: not the weights of
    the pairs of tokens, as torch's plain formula does on the meta device.

    Args:
        model: on the meta device. It is changed.
        num_samples: of the batch of the rank.
        precision: fp32, bf16 or fp16.
        is_cast: whether the model is in that precision. Otherwise it is in float32 under autocast, whose
            copies of weights are kept too.
        accelerations: of the training; the passes and layers that they add count too.
    """
    # Both half precisions take two bytes.
    half = torch.bfloat16 if precision != "fp32" else torch.float32
    dtype = half if is_cast else torch.float32
    model = model.to(dtype).train()
    inputs = example_inputs(model, num_samples, dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model.to_empty(device="cpu")
        inputs = tree_map_only(Tensor, lambda item: item.new_empty(item.shape, device="cpu"), inputs)
        storages = KeptStorages(model)
        with storages.kept(), torch.autocast("cpu", half, enabled=dtype != half):
            found = model(*inputs, **asked_of(accelerations))
            hidden = found[1] if isinstance(found, tuple) else None
            for each in accelerations:
                each.rehearse(partial(model, *inputs), inputs[0], hidden)
        return Activations(storages.num_bytes, storages.largest_unit, storages.attended)


class KeptStorages:
    """The storages that autograd keeps of a model's passes, without those of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._units = units(model)
        self._attentions = [m for m in model.modules() if isinstance(m, SelfAttention) and m.is_shared]
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        # Views share a storage. While the tensor is held, no other storage gets its address.
        self._held: dict[int, Tensor] = {}
        self.num_bytes = self.largest_unit = self.attended = 0
        self._before: dict[int, int] = {}

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """A context that counts what is kept by what runs in it."""
        hooks = [unit.register_forward_pre_hook(self._enter) for unit in self._units]
        hooks += [unit.register_forward_hook(self._leave) for unit in self._units]
        hooks += [module.register_forward_hook(self._attend) for module in self._attentions]
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
        for hook in hooks:
            hook.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held and storage._cdata not in self._parameters:
            self._held[storage._cdata] = tensor
            self.num_bytes += storage.nbytes()
        return tensor

    def _enter(self, unit: nn.Module, inputs: Any) -> None:
        self._before[id(unit)] = self.num_bytes

    def _leave(self, unit: nn.Module, inputs: Any, output: Any) -> None:
        self.largest_unit = max(self.largest_unit, self.num_bytes - self._before[id(unit)])

    def _attend(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.attended += output.nbytes
