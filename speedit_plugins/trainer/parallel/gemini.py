"""What a training must be for `plugin: gemini`, checked without ColossalAI."""

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.runtime import Runtime


def check_gemini(config: ExperimentConfig, runtime: Runtime) -> None:
    """Nothing, if device, precision, process and model go with gemini.

    Raises:
        ValueError: one of them does not; the message says what does.
    """
    if runtime.device.type != "cuda":
        raise ValueError(
            f"plugin: gemini needs CUDA, got {runtime.device.type}: it manages chunks of GPU memory;"
            " wanted ddp, zero1, zero2 or fsdp2 here"
        )
    if config.precision == "fp32":
        raise ValueError("plugin: gemini trains in bf16 or fp16, got precision: fp32")
    if config.diffusion.is_flow:
        raise ValueError(
            "diffusion.type: RectifiedFlow does not go with plugin: gemini, which rounds continuous times to"
            " the model's precision; wanted ddp, zero1, zero2 or fsdp2"
        )
    if config.compile:
        raise ValueError("compile: true does not go with plugin: gemini, which moves weights; wanted false")
