"""The launcher with hosts whose modules an adapter changes: what it finds, and that it draws there."""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from conformance.host_imports import checkout
from warm_python import WarmPython

from speedit_plugins.launch import parsed
from speedit_plugins.launch_options import NoSeamError

ROOT = Path(__file__).parents[2]
FOLDERS = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "standins")))
PYTHON = WarmPython({**os.environ, "PYTHONPATH": FOLDERS, "OMP_NUM_THREADS": "1"})

# The module of a host, the module that takes its place here, and a script that trains one step.
HOSTS = {
    "LTX-2, seam F": (
        "ltx_trainer.training_strategies",
        "from modality_draw_standin import *",
        """
from types import SimpleNamespace as N
from ltx_trainer import training_strategies as module
config = N(video=N(is_generated=True), audio=None)
strategy = module.FlexibleStrategy(config)
sampler = N(sample_for=lambda tokens: torch.full((len(tokens),), 0.125))
inputs = strategy.prepare_training_inputs({"video_latents": {"latents": torch.randn(4, 3, 2, 2, 2)}}, sampler)
strategy.compute_loss(scale * inputs.video.latent, None, inputs).mean().backward()
print("seen", inputs.video.sigma.tolist())
""",
    ),
    "torchtitan Flux, seam F": (
        "torchtitan.models.flux.trainer",
        "from inline_draw_standin import *",
        """
from torchtitan.models.flux.trainer import FluxTrainer
def model(x, t):
    print("seen", t.tolist())
    return scale * x
def loss_fn(output, target, count):
    return ((output - target) ** 2).sum() / count, {}
FluxTrainer(model, loss_fn).forward_backward_step(input_dict={}, labels=torch.randn(4, 3, 4, 4))
""",
    ),
    "NeMo Automodel, seam F": (
        "nemo_automodel.components.flow_matching.pipeline",
        "from flow_pipeline_standin import *",
        """
from nemo_automodel.components.flow_matching.pipeline import FlowMatchingPipeline
def model(x, t):
    print("seen", t.tolist())
    return scale * x
host = FlowMatchingPipeline(None, use_loss_weighting=False)
host.step(model, {"video_latents": torch.randn(4, 3, 2, 4, 4)})[1].backward()
""",
    ),
    "diffusion-pipe, seam F": (
        "models.base",
        "from prepared_input_standin import *",
        """
import models.base
from prepared_input_models import FlowPipeline
model = FlowPipeline()
model.model_config = {}
(x, t), (target, mask) = model.prepare_inputs({"latents": torch.randn(4, 3, 4, 4), "mask": None})
model.get_loss_fn()(scale * x, (target, mask)).backward()
print("seen", t.tolist(), "mask", tuple(mask.shape))
""",
    ),
    "CogVideoX, seam D": (
        "finetune.models.utils",
        "from scheduler_draw_standin import *",
        """
from diffusers import CogVideoXDPMScheduler
from finetune.models.utils import get_model_cls
def model(x, t):
    print("seen", t.tolist())
    return scale * x
trainer = get_model_cls("cogvideox-t2v", "lora")(CogVideoXDPMScheduler(prediction_type="v_prediction"), model)
trainer.compute_loss({"encoded_videos": torch.randn(4, 3, 2, 4, 4)}).backward()
""",
    ),
}
SCRIPT = """
import torch
torch.manual_seed(0)
scale = torch.nn.Parameter(torch.tensor(0.5))
{step}
optimizer = torch.optim.SGD([scale], lr=0.1)
optimizer.step()
"""


@pytest.mark.parametrize("host", HOSTS)
def test_a_step_is_drawn_by_the_policy(tmp_path: Path, host: str) -> None:
    module, text, step = HOSTS[host]
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    script, state = tmp_path / "train.py", tmp_path / "state"
    script.write_text(SCRIPT.format(step=step))
    options = ["--policy", "logit_normal", "--set", "weighting=min_snr", "--state", str(state)]
    runs = [PYTHON.run("speedit_plugins.launch", *options, str(script)) for _ in range(2)]
    for done in runs:
        assert done.returncode == 0, done.stderr
        assert f"{host}, policy logit_normal" in done.stderr
    # The second run goes on from the state of the first: with the draws of its next step.
    first, second = ([line for line in done.stdout.splitlines() if "seen" in line] for done in runs)
    assert len(first) == 1
    assert first != second
    if host.startswith("diffusion-pipe"):
        assert "mask (4, 1, 1, 1)" in first[0]


@pytest.mark.hosts
@pytest.mark.parametrize(
    ("name", "script", "installed"),
    [
        ("Lightricks+LTX-2", "packages/ltx-trainer/scripts/train.py", "packages/ltx-trainer/src"),
        ("tdrussell+diffusion-pipe", "train.py", ""),
        ("pytorch+torchtitan", "torchtitan/train.py", "."),
        ("Tencent-Hunyuan+HunyuanVideo-1.5", "train.py", ""),
        ("genmoai+mochi", "demos/fine_tuner/train.py", ""),
        ("zai-org+CogVideo", "finetune/train.py", ""),
        ("MCG-NJU+DDT", "main.py", ""),
        ("NVIDIA-NeMo+Automodel", "examples/diffusion/finetune/finetune.py", "."),
    ],
)
def test_the_hosts_own_script_has_a_seam(
    monkeypatch: pytest.MonkeyPatch, name: str, script: str, installed: str
) -> None:
    folder = checkout(name)
    if installed:
        # The first entry is the launcher's own, and gives way to the script's.
        monkeypatch.setattr(sys, "path", [sys.path[0], str(folder / installed), *sys.path[1:]])
    assert parsed(str(folder / script)).body


class Hook:
    """An import hook as `pip install -e` leaves it for a flat project: it knows one top-level package."""

    def __init__(self, package: Path) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        place = self.package / "__init__.py"
        return spec_from_file_location(name, place) if name == self.package.name else None


def test_a_host_that_an_import_hook_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tmp_path / "clone/nemo_automodel/components/flow_matching/pipeline.py"
    pipeline.parent.mkdir(parents=True)
    for folder in (pipeline.parent, *list(pipeline.parents)[1:3]):
        (folder / "__init__.py").write_text("")
    pipeline.write_text("class FlowMatchingPipeline: ...\n")
    script = tmp_path / "finetune.py"
    script.write_text("from nemo_automodel import recipe\n")
    with pytest.raises(NoSeamError):
        parsed(str(script))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, object(), Hook(tmp_path / "clone/nemo_automodel")])
    assert parsed(str(script)).body
