"""The launcher on scripts of trainers whose draw and loss are apart: the hosts' folders, in small."""

import os
import shutil
from pathlib import Path

import pytest
from warm_python import WarmPython

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
STANDINS = TESTS / "standins"
FOLDERS = os.pathsep.join(map(str, (ROOT, TESTS, STANDINS)))
PYTHON = WarmPython({**os.environ, "PYTHONPATH": FOLDERS, "OMP_NUM_THREADS": "1"})
HEAD = """
import torch
from types import SimpleNamespace
factor = torch.nn.Parameter(torch.tensor(0.3))
optimizer = torch.optim.SGD([factor], lr=1e-3)
x = torch.randn(64, 4, 2, 2)
"""
END = """
loss.backward()
optimizer.step()
"""
MIXINS = "modules/modelSetup/mixin"


def one_trainer(folder: Path) -> Path:
    """Its scripts put their parent folder on sys.path by a module."""
    for name in ("ModelSetupNoiseMixin", "ModelSetupDiffusionLossMixin"):
        _write(folder / MIXINS / f"{name}.py", f"from one_trainer_standin import {name}\n")
    parent = "str(pathlib.Path(__file__).parents[2])"
    up = f"import sys, pathlib\ndef script_imports():\n    sys.path.insert(0, {parent})\n"
    _write(folder / "scripts" / "util" / "import_util.py", up)
    text = f"""
from util.import_util import script_imports
script_imports()
{HEAD}
from modules.modelSetup.mixin.ModelSetupNoiseMixin import ModelSetupNoiseMixin
from modules.modelSetup.mixin.ModelSetupDiffusionLossMixin import ModelSetupDiffusionLossMixin
from one_trainer_standin import ModelSetupFlowMatchingMixin, config
class Setup(ModelSetupNoiseMixin, ModelSetupDiffusionLossMixin, ModelSetupFlowMatchingMixin):
    def predict(self, model, batch, config, progress):
        generator = torch.Generator()
        noise = self._create_noise(batch["latent_image"], config, generator)
        t = self._get_timestep_discrete(1000, False, generator, 64, config)
        return {{"timestep": t, "predicted": factor * noise, "target": noise}}
setup, batch = Setup(), {{"latent_image": x, "loss_weight": torch.ones(64)}}
model = SimpleNamespace(noise_scheduler=SimpleNamespace(config={{"num_train_timesteps": 1000}}))
loss = setup._flow_matching_losses(batch, setup.predict(model, batch, config(), None), config()).mean()
{END}
"""
    return _write(folder / "scripts" / "train.py", text)


def simple_tuner(folder: Path) -> Path:
    """Its package is installed; its script is in it."""
    home = folder / "simpletuner"
    for package in (home, home / "helpers", home / "helpers" / "models", home / "helpers" / "training"):
        _write(package / "__init__.py", "")
    shutil.copy(STANDINS / "simple_tuner_standin.py", home / "helpers" / "models" / "common.py")
    _write(home / "helpers" / "training" / "trainer.py", "from simpletuner.helpers.models import common\n")
    text = f"""
import sys
sys.path.insert(0, {str(folder)!r})
{HEAD}
from simpletuner.helpers.training.trainer import common
options = SimpleNamespace(flow_schedule_shift=3.0)
model = common.Boogu(options)
batch = model.prepare_batch({{"latent_batch": x}}, {{}})
loss = model.loss(batch, {{"model_prediction": factor * batch["noisy_latents"]}})
{END}
"""
    return _write(home / "train.py", text)


def diffsynth(folder: Path) -> Path:
    """Its package takes the names of the losses when it is imported."""
    home = folder / "diffsynth" / "diffusion"
    _write(folder / "diffsynth" / "__init__.py", "")
    _write(home / "__init__.py", "from .loss import *\n")
    shutil.copy(STANDINS / "diffsynth_standin.py", home / "loss.py")
    text = f"""
import sys
sys.path.insert(0, {str(folder)!r})
{HEAD}
from diffsynth.diffusion import *
pipe = SimpleNamespace(scheduler=FlowMatchScheduler(), torch_dtype=torch.float32)
pipe.model_fn = lambda latents, **_: factor * latents
loss = FlowMatchSFTLoss(pipe, input_latents=x[:1])
{END}
"""
    return _write(folder / "examples" / "train.py", text)


def ai_toolkit(folder: Path) -> Path:
    """Its extension is imported when a job asks for it."""
    home = folder / "extensions_built_in" / "sd_trainer"
    _write(home / "__init__.py", "")
    shutil.copy(STANDINS / "ai_toolkit_standin.py", home / "SDTrainer.py")
    text = f"""
{HEAD}
from importlib import import_module
module = import_module("extensions_built_in.sd_trainer.SDTrainer")
sd = SimpleNamespace(noise_scheduler=module.Scheduler(), is_flow_matching=True)
sd.add_noise = lambda latents, noise, timesteps: latents + noise
trainer = module.SDTrainer(sd, module.options())
batch = SimpleNamespace(latents=x, file_items=[None] * 64)
noisy, noise, timesteps, *_ = trainer.process_general_training_batch(batch)
loss = trainer.calculate_loss(factor * noisy, noise, noisy, timesteps, batch)
{END}
"""
    return _write(folder / "run.py", text)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("layout", "host"),
    [
        (one_trainer, "OneTrainer"),
        (simple_tuner, "SimpleTuner"),
        (diffsynth, "DiffSynth-Studio"),
        (ai_toolkit, "ai-toolkit"),
    ],
)
def test_a_trainers_script(tmp_path: Path, layout: object, host: str) -> None:
    assert callable(layout)
    script = layout(tmp_path)
    state = tmp_path / "policy.pt"
    command = ("--policy", "speed", "--state", str(state), str(script))
    done = PYTHON.run("speedit_plugins.launch", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"speedit-launch: {host}, seam F, policy speed: boundary 923 of 1000 timesteps" in done.stderr
    assert state.is_file()
    contrary = PYTHON.run("speedit_plugins.launch", "--prediction-type", "v", *command, cwd=tmp_path)
    assert contrary.returncode == 2
    assert f"{host} predicts flow: leave out --prediction-type v" in contrary.stderr
