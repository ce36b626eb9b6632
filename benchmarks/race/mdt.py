"""MDT as a contestant of benchmarks/race: the checkout's own `TrainLoop`, on one process.

Its constructor needs MPI, CUDA and a downloaded autoencoder, so the loop's attributes are set here instead.
Each step is the loop's own `run_step`. Its optimizer Adan is of the checkout `sail-sg+Adan`, without the CUDA
kernel that the loop asks for; the optimizer's state is not sharded, as there is one process.
"""

import contextlib
import importlib
import importlib.util
import io
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.image_sets import ImageSet
from benchmarks.peers.original_dit import importable, unused
from benchmarks.race.training import (
    Batches,
    Denoiser,
    RandomState,
    Terms,
    build_process,
    count_parameters,
    on_cpu,
)

MDT, ADAN = "sail-sg+MDT", "sail-sg+Adan"
# The rate is that of scripts/image_train.py, the mask ratio that of the README.
LR, MASK_RATIO = 3e-4, 0.3


def mdt_model(hosts: Path, options: dict[str, Any]) -> nn.Module:
    """MDTv2 of this size. A sixth of its blocks decode, as about one in seven does in the published XL."""
    depth = options["depth"]
    # The encoder's blocks come in pairs.
    decode_layer = max(1, depth // 6) + (depth - max(1, depth // 6)) % 2
    # The constructor prints its mask ratio.
    with _imported(hosts) as package, contextlib.redirect_stdout(io.StringIO()):
        models = importlib.import_module(f"{package}.models")
        return models.MDTv2(**options, mask_ratio=MASK_RATIO, decode_layer=decode_layer)


class MdtTraining:
    """MDT's training; see `race.training.Training`. A step passes all tokens, then those not masked."""

    num_training_only = 0

    def __init__(self, hosts: Path, options: dict[str, Any], data: ImageSet, terms: Terms) -> None:
        self.process = build_process(is_flow=False)
        self._terms = terms
        self._model = mdt_model(hosts, options).to(terms.device).train()
        self._shown = deepcopy(self._model).requires_grad_(False).eval()
        self.num_parameters, _ = count_parameters(self._model)
        self._batches = Batches(data, terms.batch_size, terms.seed, terms.device)
        self._random = RandomState(terms.seed)
        with _imported(hosts) as package:
            self._loop = self._build_loop(package)

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return self._random.used()

    def step(self) -> None:
        x, y = self._batches.at(self._loop.step)
        self._loop.run_step(x, {"y": y})
        self._loop.step += 1

    def denoiser(self) -> Denoiser:
        loop = self._loop
        self._shown.load_state_dict(loop.mp_trainer.master_params_to_state_dict(loop.ema_params[0]))
        return lambda x, timestep, labels: self._shown(x, timestep, labels)

    def save(self, folder: Path) -> None:
        loop = self._loop
        state = {
            "model": self._model.state_dict(),
            "averages": [[value.detach() for value in average] for average in loop.ema_params],
            "optimizer": loop.opt.state_dict(),
            "step": loop.step,
            "random": self._random.values,
        }
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True, map_location=self._terms.device)
        self._model.load_state_dict(state["model"])
        self._loop.ema_params, self._loop.step = state["averages"], state["step"]
        self._loop.opt.load_state_dict(state["optimizer"])
        self._random.values = on_cpu(state["random"])

    def _build_loop(self, package: str) -> Any:
        train_util = importlib.import_module(f"{package}.train_util")
        diffusion = importlib.import_module(package).create_diffusion(timestep_respacing="")
        resample = importlib.import_module(f"{package}.resample")
        device, terms = torch.device(self._terms.device), self._terms
        train_util.dist_util.dev = lambda: device
        # Without formats it writes nowhere.
        train_util.logger.Logger.CURRENT = train_util.logger.Logger(dir=None, output_formats=[])
        loop = train_util.TrainLoop.__new__(train_util.TrainLoop)
        trainer = train_util.MixedPrecisionTrainer(model=self._model)
        optimizer = train_util.Adan(trainer.master_params, lr=LR * terms.lr_factor, max_grad_norm=1)
        attributes = {
            "model": self._model,
            "ddp_model": self._model,
            "use_ddp": False,
            "diffusion": diffusion,
            "schedule_sampler": resample.create_named_schedule_sampler("uniform", diffusion),
            "mp_trainer": trainer,
            "opt": optimizer,
            "ema_rate": [terms.ema_decay],
            "ema_params": [deepcopy(trainer.master_params)],
            "microbatch": terms.batch_size,
            "global_batch": terms.batch_size,
            "lr_anneal_steps": 0,
            "step": 0,
            "resume_step": 0,
            "get_first_stage_encoding": _unchanged,
        }
        vars(loop).update(attributes)
        return loop


def _unchanged(images: Tensor) -> Tensor:
    return images


@contextlib.contextmanager
def _imported(hosts: Path) -> Any:
    """Within the block MDT's package can be imported; gives its name."""
    absent = unused("blobfile", "mpi4py", "diffusers.models")
    with importable(hosts / MDT, instead={**absent, "adan": _adan(hosts)}):
        yield "masked_diffusion"


def _adan(hosts: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("adan", hosts / ADAN / "adan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
