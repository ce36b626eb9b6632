"""Optimizers by name, and the one of a config.

A builder is a `torch.optim.Optimizer` class, or a function that returns one. It gets `params`, the trained
parameters, and `lr`. One with an argument `model` also gets the whole model. Its attribute `plugins` lists
the values of the config's `plugin` that it works with; without one it is ddp alone. bitsandbytes, prodigyopt
and schedulefree are imported here only.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from speedit_plugins.registry import OPTIMIZERS, build, check
from speedit_plugins.trainer.config.optimizers import OPTIMIZER_FACTS, WHOLE_PARAMETERS
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import REST, OptimizerConfig
from speedit_plugins.trainer.config.training_checks import check_plugin

INSTALLATION = "pip install 'speedit-plugins[optim]'"
# Keys of the section that are not passed on as parameters.
_OWN = tuple(
    name
    for name, entry in OptimizerConfig.__dataclass_fields__.items()
    if name not in ("betas", "weight_decay") and not entry.metadata.get(REST)
)


def check_optimizer(config: ExperimentConfig) -> None:
    """Nothing, if the config's optimizer is known, takes its parameters and works with its plugin.

    Raises:
        ValueError: says which of these fails, and what is known.
    """
    options = config.optimizer
    check(OPTIMIZERS, _section(options), also=_OWN, params=None, lr=None, model=None)
    if options.type not in OPTIMIZER_FACTS:
        plugins = getattr(OPTIMIZERS.get(options.type), "plugins", WHOLE_PARAMETERS)
        check_plugin(options.type, tuple(plugins), config.plugin)


def build_optimizer(model: nn.Module, config: ExperimentConfig) -> torch.optim.Optimizer:
    """The config's optimizer over the trained parameters of a model, in their order.

    Raises:
        ValueError: see `check_optimizer`; or it is not an optimizer of torch, or leaves a parameter out.
    """
    check_optimizer(config)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = config.optimizer
    given = {"params": list(named.values()), "lr": options.lr, "model": model}
    optimizer = build(OPTIMIZERS, _section(options), also=_OWN, **given)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer {options.type!r} needs to be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if left_out := [name for name, parameter in named.items() if id(parameter) not in held]:
        raise ValueError(f"optimizer {options.type!r} leaves out the trained parameter {left_out[0]}")
    return optimizer


def has_two_points(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it takes gradients at another point than that of evaluation; `train` and `eval` go between."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def adamw(
    params: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Fused AdamW. Source: Loshchilov and Hutter 2019, arXiv:1711.05101.

    Args:
        params: the trained parameters.
        lr: learning rate.
        betas: decay rates of the two moments.
        weight_decay: decoupled weight decay.
        eps: added to the root of the second moment.
    """
    return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=True)


def adamw_8bit(
    params: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    min_8bit_size: int = 4096,
) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits, by bitsandbytes. Source: Dettmers et al. 2022, arXiv:2110.02861.

    Args:
        min_8bit_size: parameters with fewer elements keep moments in 32 bits.

    Raises:
        ValueError: bitsandbytes is missing, or cannot step on the device of the parameters.
    """
    library = _imported("bitsandbytes", "AdamW8bit")

    def build_one(some: Sequence[Tensor]) -> torch.optim.Optimizer:
        options = {"betas": betas, "weight_decay": weight_decay, "eps": eps, "min_8bit_size": min_8bit_size}
        optimizer: torch.optim.Optimizer = library.optim.AdamW8bit(some, lr=lr, **options)
        return optimizer

    _check_steps(build_one, params[0].device, max(4096, min_8bit_size))
    return build_one(params)


def adafactor(
    params: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
) -> torch.optim.Optimizer:
    """Torch's Adafactor, with factored second moments. Source: Shazeer and Stern 2018, arXiv:1804.04235.

    Args:
        lr: bound of the step relative to the parameter's own size, and factor of the weight decay.
        beta2_decay: the second moment's decay rate is 1 - t^beta2_decay at step t.
        eps: least second moment (null is the smallest number of float32), and least size of a parameter.
        d: bound of the root mean square of a parameter's update.
    """
    # From YAML it is a list.
    first, second = eps
    options = {"beta2_decay": beta2_decay, "eps": (first, second), "d": d, "weight_decay": weight_decay}
    return torch.optim.Adafactor(params, lr=lr, **options)  # type: ignore[arg-type]  # one mapping for all


def prodigy(  # noqa: PLR0913 - one for each parameter of the config
    params: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    beta3: float | None = None,
    use_bias_correction: bool = True,
    safeguard_warmup: bool = True,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = float("inf"),
    slice_p: int = 1,
) -> torch.optim.Optimizer:
    """Adam that estimates its step size, by prodigyopt. Source: Mishchenko and Defazio, arXiv:2306.06101.

    Args:
        lr: factor of the estimate, usually 1.
        beta3: decay rate of what the estimate is made of; null is the root of the second of `betas`.
        use_bias_correction: Adam's correction of the first moments.
        safeguard_warmup: leaves the warm-up out of the estimate.
        d0: first estimate.
        d_coef: factor of later estimates.
        growth_rate: bound of the growth of the estimate in one step.
        slice_p: measures every so many elements of a parameter, which saves memory.
    """
    library = _imported("prodigyopt", "Prodigy")
    # It prints about its weight decay.
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer: torch.optim.Optimizer = library.Prodigy(
            params,
            lr=lr,
            betas=betas,
            beta3=beta3,
            eps=eps,
            weight_decay=weight_decay,
            use_bias_correction=use_bias_correction,
            safeguard_warmup=safeguard_warmup,
            d0=d0,
            d_coef=d_coef,
            growth_rate=growth_rate,
            slice_p=slice_p,
        )
    return optimizer


def adamw_schedule_free(
    params: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> torch.optim.Optimizer:
    """AdamW that averages its weights itself, by schedulefree. Source: Defazio et al. 2024, arXiv:2405.15682.

    The trainer's warm-up is that of the paper.

    Args:
        r: exponent of the step in the weight of its average.
        weight_lr_power: exponent of the learning rate in that weight.
    """
    library = _imported("schedulefree", "AdamWScheduleFree")
    options = {"betas": betas, "weight_decay": weight_decay, "eps": eps, "r": r}
    optimizer: torch.optim.Optimizer = library.AdamWScheduleFree(
        params, lr=lr, weight_lr_power=weight_lr_power, **options
    )
    return optimizer


class Muon(torch.optim.Optimizer):
    """torch's Muon for the matrices of a model's blocks, and fused AdamW for all other parameters.

    One learning rate is for both: Muon's updates are scaled to the root mean square of AdamW's. Sources:
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, and Liu et al. 2025, arXiv:2502.16982,
    section 2.2.

    Args:
        params: the trained parameters.
        model: tells which of them are matrices of its blocks, see `hidden_matrices`.
        lr: learning rate of both.
        betas, eps: of AdamW.
        momentum: of Muon.
        nesterov: whether Muon looks ahead by its momentum.
        ns_steps: steps of Muon's Newton-Schulz iteration.

    Raises:
        ValueError: the model has no such matrix, or this torch has no Muon.
    """

    def __init__(  # noqa: PLR0913 - one for each parameter of the config
        self,
        params: Sequence[Tensor],
        *,
        model: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer 'Muon' needs torch >= 2.9, got {torch.__version__}")
        hidden = {id(parameter) for parameter in hidden_matrices(model)}
        matrices = [parameter for parameter in params if id(parameter) in hidden]
        others = [parameter for parameter in params if id(parameter) not in hidden]
        if not matrices:
            raise ValueError(
                "optimizer 'Muon' found no trained matrix: wanted a 2-D parameter below an nn.ModuleList of"
                " the model, or the optimizer AdamW"
            )
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if others:
            self._parts.append(adamw(others, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps))
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no closure here
        """One step of both, with the learning rates and the state of this optimizer."""
        assert closure is None
        for part, groups in zip(self._parts, ([self.param_groups[0]], self.param_groups[1:]), strict=False):
            part.param_groups, part.state = groups, self.state
            part.step()


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The 2-D parameters of a model's blocks: below an `nn.ModuleList`, and not of an embedding.

    The first and last layers, and the embeddings of time and class, are not in such a list.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    blocks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    found = {id(p): p for block in blocks for p in block.parameters() if p.ndim == 2 and id(p) not in tables}
    return list(found.values())


def _section(options: OptimizerConfig) -> dict[str, Any]:
    """The optimizer's own part of the section: its type and parameters."""
    typed = {"betas": options.betas, "weight_decay": options.weight_decay}
    given = {name: value for name, value in typed.items() if value is not None}
    return {"type": options.type, **given, **options.parameters}


def _imported(package: str, name: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(
            f"optimizer {name!r} needs the package {package}, which cannot be imported ({error}); wanted"
            f" {INSTALLATION}"
        ) from error


def _check_steps(
    build_one: Callable[[Sequence[Tensor]], torch.optim.Optimizer], device: torch.device, size: int
) -> None:
    """Raises ValueError if the optimizer cannot step on the device, before the training has begun."""
    parameter = nn.Parameter(torch.ones(size, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        build_one([parameter]).step()
    # A library without kernels for the device raises what it likes.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"optimizer 'AdamW8bit' cannot step on {device.type}: {type(error).__name__}: {reason}; wanted"
            " device: cuda with a bitsandbytes for it, or the optimizer AdamW"
        ) from error


OPTIMIZERS.register_module(name="AdamW", module=adamw)
OPTIMIZERS.register_module(name="AdamW8bit", module=adamw_8bit)
OPTIMIZERS.register_module(name="Adafactor", module=adafactor)
OPTIMIZERS.register_module(name="Prodigy", module=prodigy)
OPTIMIZERS.register_module(name="AdamWScheduleFree", module=adamw_schedule_free)
OPTIMIZERS.register_module(name="Muon", module=Muon)
