"""Model FLOPs utilisation (MFU): the share of the devices' peak that a training uses.

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.interface import example_inputs, without_storage
from speedit_plugins.trainer.parallel.runtime import Runtime

# Device name without its maker, then dense peaks in TFLOP/s with fp32 sums. None: no unit for this format.
# Numbers "with sparsity" of a data sheet are halved.
_FORMATS = ("fp32", "tf32", "bf16", "fp16")
_PEAKS: tuple[tuple[str, float, float | None, float | None, float], ...] = (
    # NVIDIA V100 data sheet, January 2020.
    (r"V100-SXM[23].*", 15.7, None, None, 125),
    (r"V100-PCIE.*", 14, None, None, 112),
    (r"V100S-PCIE.*", 16.4, None, None, 130),
    # NVIDIA T4 data sheet.
    (r"T4", 8.1, None, None, 65),
    # NVIDIA A100 data sheet; the A800 differs in NVLink alone.
    (r"A[18]00-SXM4-[48]0GB|A[18]00-PCIE-40GB|A[18]00 80GB PCIe", 19.5, 156, 312, 312),
    # NVIDIA A30, A40 and A10 data sheets.
    (r"A30", 10.3, 82, 165, 165),
    (r"A40", 37.4, 74.8, 149.7, 149.7),
    (r"A10", 31.2, 62.5, 125, 125),
    # NVIDIA Ampere GA102 white paper: RTX A6000; GeForce RTX 3090.
    (r"RTX A6000", 38.7, 77.4, 154.8, 154.8),
    (r"RTX 3090", 35.6, 35.6, 71, 71),
    # NVIDIA Ada white paper: GeForce RTX 4090. NVIDIA RTX Blackwell white paper: GeForce RTX 5090.
    (r"RTX 4090", 82.6, 82.6, 165.2, 165.2),
    (r"RTX 5090", 104.8, 104.8, 209.5, 209.5),
    # NVIDIA L4, L40 and L40S data sheets.
    (r"L4", 30.3, 60, 121, 121),
    (r"L40", 90.5, 90.5, 181.05, 181.05),
    (r"L40S", 91.6, 183, 362.05, 362.05),
    # NVIDIA H100 data sheets of 2022 (SXM, PCIe) and 2024 (NVL); the H800 differs in NVLink and fp64.
    (r"H100 80GB HBM3|H800", 67, 494.5, 989.5, 989.5),
    (r"H[18]00 PCIe", 51, 378, 756.5, 756.5),
    (r"H100 NVL", 60, 417.5, 835.5, 835.5),
    # NVIDIA GH200 and H200 data sheets.
    (r"GH200 .*|H200", 67, 494.5, 989.5, 989.5),
    (r"H200 NVL", 60, 417.5, 835.5, 835.5),
    # NVIDIA Blackwell data sheet: HGX B200.
    (r"B200", 75, 1100, 2250, 2250),
)


def mfu_of(model: nn.Module, config: ExperimentConfig, runtime: Runtime) -> Callable[[float], float] | None:
    """A function from samples per second of all ranks to MFU; None if the device's peak is unknown.

    Args:
        model: as built: not yet wrapped, sharded or compiled.
    """
    if runtime.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(runtime.device)
    peak = peak_flops(name, config.precision, allow_tf32=config.allow_tf32)
    if peak is None:
        return None
    flops = training_flops(model, example_inputs(model, 1))
    return partial(mfu, flops_per_sample=flops, peak=peak, num_devices=runtime.world_size)


def mfu(samples_per_second: float, *, flops_per_sample: float, peak: float, num_devices: int) -> float:
    """Share in [0, 1] of the devices' peak: the model's own FLOPs over what they could compute.

    Args:
        samples_per_second: of all devices together.
        flops_per_sample: see `training_flops`.
        peak: FLOP/s of one device.
        num_devices: those that share the work.
    """
    return flops_per_sample * samples_per_second / (peak * num_devices)


def training_flops(model: nn.Module, inputs: Sequence[Any]) -> int:
    """FLOPs of one sample's forward and backward pass, a multiply-add counted as two.

    Matrix products and convolutions alone. Where all weights are trained they are about three times those of
    the forward pass, since each is differentiated by both its factors; nothing is differentiated by a weight
    that is not trained, or by an input in front of all that are. A block that gradient checkpointing computes
    again is not counted again: MFU is of what the model needs, not of what the device is made to do. Nor is a
    block counted for the tokens that pass it by.

    Args:
        model: called as `model(*inputs)`; neither computed with nor changed.
        inputs: of one sample, on the meta device.
    """
    twin = cast(Any, without_storage(model)).eval()
    if getattr(twin, "route", None) is not None:
        # Only training routes.
        twin.train().gradient_checkpointing = False
    counter = FlopCounterMode(display=False)
    with counter:
        twin(*inputs).sum().backward()
    return counter.get_total_flops()


def peak_flops(device_name: str, precision: str, *, allow_tf32: bool) -> float | None:
    """Dense peak of one device in FLOP/s; None for a device or number format that is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name` says it. A part of a device (MIG) and a laptop's variant
            are other devices.
        precision: fp32, bf16 or fp16.
        allow_tf32: fp32 is TF32 on a device that has it.
    """
    name = re.sub(r"^NVIDIA |Tesla |GeForce ", "", device_name)
    for pattern, *peaks in _PEAKS:
        if re.fullmatch(pattern, name):
            rates = dict(zip(_FORMATS, peaks, strict=True))
            is_tf32 = precision == "fp32" and allow_tf32 and rates["tf32"] is not None
            teraflops = rates["tf32" if is_tf32 else precision]
            return None if teraflops is None else teraflops * 1e12
    return None
