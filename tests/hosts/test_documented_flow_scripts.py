"""The edit of integrations/diffusers_flow for SD3 and Flux, made in the four scripts' own training steps.

The scripts' lines from the noise to the loss run here with a model of one line, at every option that changes
them, beside the formulas of what they should give.
"""

import ast
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from markdown_blocks import ROOT, blocks
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule

SCRIPTS = ("dreambooth_sd3", "dreambooth_lora_sd3", "dreambooth_flux", "dreambooth_lora_flux")
PRIOR_WEIGHT = 0.7
SHAPE = (4, 6, 6)
MIN_SNR = {"density": "logit_normal", "weighting": "min_snr"}


def readme_block() -> str:
    """The block of the README that is about these scripts."""
    page = ROOT / "integrations/diffusers_flow/README.md"
    (block,) = (each.text for each in blocks(page) if "FlowScript" in each.text)
    return block


@dataclass(frozen=True)
class Edit:
    """The README's lines: those that run once, and those of a step, by what they assign and where they go."""

    once: str
    after: dict[str, str]
    in_place_of: dict[str, str]

    @classmethod
    def of_readme(cls) -> "Edit":
        """Reads the comments at the end of the lines."""
        text = readme_block()
        once: list[str] = []
        places: dict[str, dict[str, str]] = {"after": {}, "in place of": {}}
        for statement in ast.parse(text).body:
            line = ast.get_source_segment(text, statement) or ""
            comment = text.splitlines()[statement.lineno - 1].partition("  # ")[2]
            place = next((place for place in places if comment.startswith(f"{place} ")), None)
            if place is None:
                once.append(line)
                continue
            name = line.split(" = ")[0]
            assert comment.startswith(f"{place} {name} = "), comment
            places[place][name] = line
        return cls("\n".join(once), places["after"], places["in place of"])


class Edited(ast.NodeTransformer):
    """A script's step with the README's lines in it. `made` has the names that were found."""

    def __init__(self, edit: Edit) -> None:
        self.edit, self.made = edit, []

    def visit_Assign(self, node: ast.Assign) -> Any:
        name, value = ast.unparse(node.targets[0]), ast.unparse(node.value)
        if name in self.edit.after:
            self.made.append(name)
            return [node, *ast.parse(self.edit.after[name]).body]
        if name in self.edit.in_place_of and value.startswith("torch.mean("):
            self.made.append(name)
            return ast.parse(self.edit.in_place_of[name]).body
        return node


def parts_of(path: Path) -> tuple[ast.stmt, list[ast.stmt]]:
    """The script's `get_sigmas`, and its lines from the noise to the loss of a step."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    get_sigmas = next(n for n in ast.walk(tree) if getattr(n, "name", "") == "get_sigmas")
    for node in ast.walk(tree):
        lines = [ast.unparse(each) for each in node.body] if isinstance(node, ast.With) else []
        if "noise = torch.randn_like(model_input)" in lines:
            first = lines.index("noise = torch.randn_like(model_input)")
            last = next(i for i, line in enumerate(lines) if line.startswith("accelerator.backward"))
            return get_sigmas, node.body[first:last]
    raise AssertionError(f"no training step in {path}")


@dataclass(frozen=True)
class Case:
    """Options of a script, and a policy."""

    scheme: str = "logit_normal"
    precondition: int | None = None
    batch: int = 4
    has_prior: bool = False
    policy: Any = "speed"


def cases(*, is_sd3: bool) -> Iterator[Case]:
    for precondition in (0, 1) if is_sd3 else (None,):
        for batch, has_prior in ((1, False), (4, False), (1, True), (4, True)):
            for policy in ("speed", MIN_SNR):
                yield Case("logit_normal", precondition, batch, has_prior, policy)
            for scheme in ("sigma_sqrt", "cosmap", "mode"):
                yield Case(scheme, precondition, batch, has_prior, "logit_normal")
    yield Case("mode", 1 if is_sd3 else None, 4, True, "speed")


def names_for(case: Case, timesteps: list[Tensor]) -> dict[str, Any]:
    """What a script has around the lines. The model's answer is half of its input."""
    rows = case.batch * (1 + case.has_prior)
    args = {
        **{"weighting_scheme": case.scheme, "with_prior_preservation": case.has_prior},
        **{"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "prior_loss_weight": PRIOR_WEIGHT},
        **{"train_text_encoder": False, "guidance_scale": 1.0},
        **({} if case.precondition is None else {"precondition_outputs": case.precondition}),
    }

    def transformer(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        timesteps.append(timestep)
        return (0.5 * hidden_states,)

    transformer.config = SimpleNamespace(guidance_embeds=True)
    embeddings = dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds", "text_ids", "latent_image_ids"))
    return {
        **embeddings,
        "torch": torch,
        "args": SimpleNamespace(**args),
        "accelerator": SimpleNamespace(device=torch.device("cpu")),
        "model_input": torch.randn(rows, *SHAPE),
        "noise_scheduler_copy": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": transformer,
        "unwrap_model": lambda model: model,
        "FluxPipeline": FluxPipeline,
        "vae_scale_factor": 8,
        "compute_density_for_timestep_sampling": compute_density_for_timestep_sampling,
        "compute_loss_weighting_for_sd3": compute_loss_weighting_for_sd3,
    }


def wanted_loss(case: Case, names: dict[str, Any], sigma: Tensor) -> Tensor:
    """The loss of a step from its formula in float64, at sigma (B,)."""
    x, noise = names["model_input"].double(), names["noise"].double()
    s = sigma.view(-1, 1, 1, 1)
    error = ((0.5 * ((1 - s) * x + s * noise) - (noise - x)) ** 2).flatten(1).mean(1)
    # x_0 is x_t - sigma v, so its error is sigma^2 times that of the flow.
    error = error * (sigma**2 if case.precondition else 1)
    if case.policy == MIN_SNR:
        # min(SNR, 5) on the error of x_0, whichever error the script takes.
        weight = ((1 - sigma) ** 2 / sigma**2).clamp(max=5.0) * (1 if case.precondition else sigma**2)
    elif case.policy == "speed":
        table = names["noise_scheduler_copy"].sigmas.flip(0).double()
        schedule = NoiseSchedule(1 - table, table, torch.arange(1000), 1000)
        nearest = (table - sigma.view(-1, 1)).abs().argmin(1)
        weight = build_policy("speed", schedule, "flow").weight[nearest]
    else:
        own = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))}
        weight = own.get(case.scheme, torch.ones_like(sigma))
    weighted = weight * error
    if not case.has_prior:
        return weighted.mean()
    instance, prior = weighted.chunk(2)
    return instance.mean() + PRIOR_WEIGHT * prior.mean()


@pytest.mark.hosts
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_edit_in_the_script_gives_its_formula(script: str) -> None:
    folder = Path(os.environ["SPEEDIT_HOSTS"]) / "huggingface+diffusers"
    if not folder.is_dir():
        pytest.skip(f"no checkout {folder.name}")
    path = folder / f"examples/dreambooth/train_{script}.py"
    get_sigmas, step = parts_of(path)
    edit = Edit.of_readme()
    edited = Edited(edit)
    module = ast.fix_missing_locations(edited.visit(ast.Module(step, [])))
    assert edited.made == ["indices", "prior_loss", "loss"]
    code = compile(module, script, "exec")
    for case in cases(is_sd3="sd3" in script):
        torch.manual_seed(0)
        timesteps: list[Tensor] = []
        names = names_for(case, timesteps)
        exec(compile(ast.Module([get_sigmas], []), script, "exec"), names)
        exec(edit.once.replace('"speed"', repr(case.policy)), names)
        exec(code, names)
        # A Flux model gets timesteps / 1000, an SD3 model timesteps; a timestep is 1000 sigma.
        sigma = timesteps[0].double() / (1000 if "sd3" in script else 1)
        assert torch.equal(names["sigmas"].flatten(), names["noise_scheduler_copy"].sigmas[names["indices"]])
        assert_close(names["sigmas"].flatten().double(), sigma, rtol=1e-6, atol=0)
        # float32: 1e-7 relative to the terms of a difference, in a mean of 144 of them.
        assert_close(
            names["loss"].double(), wanted_loss(case, names, sigma), rtol=2e-5, atol=0, msg=str(case)
        )
        assert names["seam"].policy.num_steps == 1
    # Without the edit the scripts without LoRA multiply 8 weights with 4 errors.
    names = names_for(Case(precondition=0, has_prior=True), [])
    exec(compile(ast.Module([get_sigmas], []), script, "exec"), names)
    unedited = compile(ast.Module(parts_of(path)[1], []), script, "exec")
    with nullcontext() if "lora" in script else pytest.raises(RuntimeError, match="size of tensor"):
        exec(unedited, names)
    for scheme in ("sigma_sqrt", "cosmap"):
        with pytest.raises(ValueError, match="the script's --weighting_scheme weighs the loss already"):
            exec(edit.once, names_for(Case(scheme), []))
