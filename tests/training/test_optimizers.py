"""Optimizers by name: each goes on from a checkpoint to the bit, and says what it does not work with."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import OPTIMIZER_PACKAGES, need_optimizer, small_config, small_trainer
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.registry import OPTIMIZERS
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.optimizers import OPTIMIZER_FACTS
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.parallel import optimizers
from speedit_plugins.trainer.parallel.master_weights import TRAINING_POINT
from speedit_plugins.trainer.training.dry_run import describe
from speedit_plugins.trainer.training.trainer import Trainer


class Halving(torch.optim.Optimizer):
    """SGD with what a state can hold besides moments, and a rate in its group that halves by itself."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, damping: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "damping": damping, "share": 1.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["share"] /= 2
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(
                        count=0, kind="sgd", means=[0.0, 0.0], whole=torch.zeros(3, dtype=torch.int64)
                    )
                state["count"] += 1
                state["means"][0] += float(parameter.grad.mean())
                state["whole"] += state["count"]
                rate = group["lr"] * group["share"] + 1e-4 * state["means"][0] / state["count"]
                parameter.data.add_(parameter.grad, alpha=-rate)


@pytest.fixture
def own_optimizer() -> Iterator[None]:
    OPTIMIZERS.register_module(name="Halving", module=Halving)
    yield
    OPTIMIZERS.module_dict.pop("Halving")


def steps(trainer: Trainer, count: int) -> Trainer:
    trainer.engine.model.train()
    for _ in range(count):
        trainer.optimizer_step()
    return trainer


def everything(trainer: Trainer) -> dict[str, Any]:
    """What decides the next step, apart from words and the learning rate, which the next step sets."""
    engine = trainer.engine
    names = {id(p): name for name, p in trainer.model.named_parameters()}

    def numbers(values: dict[str, Any]) -> dict[str, Any]:
        left_out = ("params", "lr")
        return {k: v for k, v in values.items() if k not in left_out and not isinstance(v, str)}

    return {
        "model": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "evaluated": trainer.weights(),
        "ema": trainer.averaged_weights(),
        "state": {names[id(p)]: numbers(state) for p, state in engine.optimizer.state.items()},
        "groups": [numbers(group) for group in engine.optimizer.param_groups],
    }


def options_of(name: str) -> dict[str, Any]:
    need_optimizer(name)
    # A width at which AdamW8bit has moments in 8 bits, of 4096 elements and more.
    return {"optimizer__type": name, "model__hidden_size": 64, "optimizer__warmup_steps": 4}


@pytest.mark.parametrize("name", [*OPTIMIZER_FACTS, "Halving"])
def test_six_steps_equal_three_and_a_resumed_three_bit_for_bit(
    tmp_path: Path, name: str, own_optimizer: None
) -> None:
    options = options_of(name) | ({"optimizer__lr": 1e-2} if name == "Halving" else {})
    whole = everything(steps(small_trainer(tmp_path, **options), 6))

    first = steps(small_trainer(tmp_path, **options), 3)
    path = first.save()
    # What is saved is what is evaluated.
    assert_close(dict(checkpoints.load(path).model), {**first.engine.untrained(), **first.weights()})
    resumed = small_trainer(tmp_path, **options)
    resumed.restore(path)
    assert_close(everything(resumed), everything(first), rtol=0, atol=0)
    if name == "Halving":
        assert {state["kind"] for state in resumed.engine.optimizer.state.values()} == {"sgd"}
    assert_close(everything(steps(resumed, 3)), whole, rtol=0, atol=0)


def test_the_state_beside_adamws_moments_is_empty_and_may_be_absent(tmp_path: Path) -> None:
    trainer = steps(small_trainer(tmp_path), 2)
    saved = checkpoints.load(trainer.save())
    assert {name.partition("/")[0] for name in saved.moments} == {"exp_avg", "exp_avg_sq", "step"}
    empty = {"layout": {"shapes": {}, "on_cpu": [], "values": {}}, "groups": [{}]}
    assert saved.state["optimizer"] == empty
    # Earlier versions saved neither this nor these keys of the config.
    path = trainer.saves.last
    assert path is not None
    state = torch.load(path / checkpoints.STATE, weights_only=True)
    del state["optimizer"]
    torch.save(state, path / checkpoints.STATE)
    config = (path / "config.yaml").read_text()
    kept = [
        line for line in config.splitlines() if line.strip().split(":")[0] not in ("power", "decay_steps")
    ]
    (path / "config.yaml").write_text("\n".join(kept))
    again = small_trainer(tmp_path)
    again.restore(path)
    assert_close(everything(steps(again, 1)), everything(steps(trainer, 1)), rtol=0, atol=0)


def test_a_schedule_free_run_saves_and_averages_the_point_at_which_it_is_evaluated(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    # An average of half-life 1e-3 is the newest weights.
    options = options_of("AdamWScheduleFree") | {"ema__halflife_steps": 1e-3, "ema__ramp": False}
    trainer = steps(small_trainer(tmp_path, **options), 3)
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    saved = checkpoints.load(trainer.save())
    assert_close(dict(trainer.model.named_parameters()), trained, rtol=0, atol=0)

    trainer.engine.optimizer.eval()  # type: ignore[attr-defined]  # schedulefree's own way to that point
    evaluated = {name: p.detach() for name, p in trainer.model.named_parameters()}
    weight = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(trained[weight], evaluated[weight])
    for found in (saved.model, saved.ema):
        assert_close({name: found[name] for name in evaluated}, evaluated, rtol=0, atol=0)
    assert_close(saved.moments[f"{TRAINING_POINT}/{weight}"].view_as(trained[weight]), trained[weight])


def test_a_grid_of_a_schedule_free_run_leaves_its_training_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    trainer = steps(small_trainer(tmp_path, **options_of("AdamWScheduleFree")), 2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.averaged_weights()
    trainer.weights()
    assert_close(dict(trainer.model.named_parameters()), before, rtol=0, atol=0)
    assert trainer.engine.optimizer.param_groups[0]["train_mode"]


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, **options_of("Muon"))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    matrices, others = (
        {names[id(p)] for p in group["params"]} for group in trainer.engine.optimizer.param_groups
    )
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert matrices == {name for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2}
    assert {
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
    } <= others
    assert matrices | others == set(named)


def test_muon_without_a_matrix_and_an_optimizer_that_forgets_one_are_refused(tmp_path: Path) -> None:
    if hasattr(torch.optim, "Muon"):
        with pytest.raises(ValueError, match=r"'Muon' found no trained matrix: wanted a 2-D parameter below"):
            optimizers.build_optimizer(nn.Linear(2, 2), small_config(tmp_path, optimizer__type="Muon"))

    def first_only(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params[:1], lr=lr)

    OPTIMIZERS.register_module(name="FirstOnly", module=first_only)
    OPTIMIZERS.register_module(name="Words", module=lambda params: "no optimizer")
    try:
        config = small_config(tmp_path, optimizer__type="FirstOnly", optimizer__lr=1.0)
        with pytest.raises(ValueError, match="'FirstOnly' leaves out the trained parameter bias"):
            optimizers.build_optimizer(nn.Linear(2, 2), config)
        config = small_config(tmp_path, optimizer__type="Words", optimizer__lr=1.0)
        with pytest.raises(ValueError, match=r"'Words' needs to be a torch\.optim\.Optimizer, got str"):
            optimizers.build_optimizer(nn.Linear(2, 2), config)
    finally:
        OPTIMIZERS.module_dict.pop("FirstOnly")
        OPTIMIZERS.module_dict.pop("Words")


@pytest.mark.parametrize("name", OPTIMIZER_FACTS)
def test_the_config_knows_the_parameters_and_defaults_of_each_optimizer(name: str) -> None:
    builder = OPTIMIZERS.get(name)
    assert builder is not None
    parameters = inspect.signature(builder).parameters
    own = {key: p.default for key, p in parameters.items() if key not in ("params", "lr", "model")}
    assert own == OPTIMIZER_FACTS[name].parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "Muon", "momentun": 0.9}, r"optimizer\.momentun: .*mean 'optimizer\.momentum'.* Muon:"),
        (
            {"type": "Adafactor", "betas": "[0.9, 0.99]"},
            r"optimizer\.betas: has no effect with type Adafactor",
        ),
        (
            {"type": "AdamWScheduleFree", "schedule": "cosine"},
            r"optimizer\.schedule: .* needs none; wanted con",
        ),
        (
            {"type": "Mine"},
            r"optimizer\.type: wanted one of .*got 'Mine'; one of your own needs optimizer\.lr",
        ),
        ({"type": "AdamV"}, r"optimizer\.type: wanted one of AdamW, .*got 'AdamV'; did you mean 'AdamW'\?"),
        ({"parameters": "{eps: 1}"}, r"optimizer\.parameters: unknown key"),
    ],
)
def test_keys_that_an_optimizer_does_not_take_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, **{f"optimizer__{key}": value for key, value in changes.items()})


@pytest.mark.parametrize("name", [name for name in OPTIMIZER_FACTS if name != "AdamW"])
def test_sharded_plugins_name_the_plugins_an_optimizer_works_with(tmp_path: Path, name: str) -> None:
    message = (
        rf"optimizer\.type: {name} does not work with plugin zero2; wanted plugin ddp, or the optimizer AdamW"
    )
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, optimizer__type=name, plugin="zero2")


def test_ones_own_optimizer_says_what_it_works_with(tmp_path: Path, own_optimizer: None) -> None:
    options = {"optimizer__type": "Halving", "optimizer__lr": 1.0}
    config = small_config(tmp_path, plugin="zero1", **options)
    with pytest.raises(ValueError, match="Halving does not work with plugin zero1; wanted plugin ddp"):
        optimizers.check_optimizer(config)
    Halving.plugins = ("ddp", "zero1")  # type: ignore[attr-defined]  # as a user sets it
    try:
        optimizers.check_optimizer(config)
    finally:
        del Halving.plugins  # type: ignore[attr-defined]  # as above
    with pytest.raises(ValueError, match=r"'Halving' has no parameter 'dampin'; did you mean 'damping'\?"):
        optimizers.check_optimizer(small_config(tmp_path, optimizer__dampin=1, **options))
    with pytest.raises(ValueError, match="unknown optimizer 'Halvin'; did you mean 'Halving'"):
        optimizers.check_optimizer(small_config(tmp_path, optimizer__type="Halvin", optimizer__lr=1.0))


def test_a_state_that_cannot_be_saved_is_named(tmp_path: Path, own_optimizer: None) -> None:
    trainer = steps(small_trainer(tmp_path, optimizer__type="Halving", optimizer__lr=1e-2), 1)
    next(iter(trainer.engine.optimizer.state.values()))["kind"] = object()
    with pytest.raises(
        ValueError, match=r"state kind/.* cannot be saved: wanted tensors, numbers .*got object"
    ):
        trainer.save()


def test_another_optimizer_goes_on_with_the_weights_alone_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = steps(small_trainer(tmp_path), 2).save()
    changed = small_trainer(tmp_path, optimizer__type="Adafactor")
    changed.restore(path)
    assert "the optimizer was AdamW and is Adafactor: its state begins anew" in capsys.readouterr().out
    assert not changed.engine.optimizer.state
    assert_close(
        changed.weights()["blocks.0.mlp.fc1.weight"], checkpoints.load(path).model["blocks.0.mlp.fc1.weight"]
    )
    steps(changed, 1)


def test_another_type_drops_rate_and_parameters_and_keeps_what_the_trainer_does(tmp_path: Path) -> None:
    stated = {"optimizer__warmup_steps": 7, "optimizer__schedule": "linear", "optimizer__max_grad_norm": 1.0}
    options = small_config(tmp_path, **stated).optimizer
    assert (options.lr, options.betas, options.weight_decay) == (2e-3, (0.9, 0.999), 0.0)
    assert small_config(tmp_path, optimizer="Muon", ema="none").optimizer.type == "Muon"
    options = small_config(tmp_path, optimizer__type="Prodigy", **stated).optimizer
    assert (options.lr, options.warmup_steps, options.schedule, options.max_grad_norm) == (
        1.0,
        7,
        "linear",
        1.0,
    )


def test_a_parameter_that_shapes_the_state_stays_what_it_was(tmp_path: Path) -> None:
    path = steps(small_trainer(tmp_path, **options_of("Prodigy")), 1).save()
    changed = small_trainer(tmp_path, **options_of("Prodigy"), optimizer__slice_p=11)
    with pytest.raises(
        checkpoints.CheckpointError, match=r"optimizer\.slice_p was 1, got 11; it decides the shape"
    ):
        changed.restore(path)


def test_the_dry_run_counts_the_state_of_the_optimizer_and_the_averages(tmp_path: Path) -> None:
    weights = 4 * sum(p.numel() for p in small_trainer(tmp_path).model.parameters())

    def said(**changes: Any) -> str:
        return describe(small_config(tmp_path, **changes)).text

    # All but the table of positions, 4 x 32, is trained.
    trained = weights - 4 * 4 * 32
    for name, moments, averages, average in (
        ("AdamW", 2, 1, "halflife"),
        ("AdamW8bit", 0.5, 0, "none"),
        ("Adafactor", 0, 2, "power"),
    ):
        text = said(optimizer__type=name, ema=average)
        assert f"  weights          {weights / 2**20:.1f} MiB\n" in text
        assert f"  gradients        {trained / 2**20:.1f} MiB\n" in text
        assert (f"  moments          {moments * trained / 2**20:.1f} MiB, {name}\n" in text) == (moments > 0)
        assert (f"  averages         {averages * trained / 2**20:.1f} MiB" in text) == (averages > 0)


@pytest.mark.parametrize("name", OPTIMIZER_PACKAGES)
def test_an_optimizer_without_its_package_says_what_to_install(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(package: str) -> None:
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(optimizers, "import_module", absent)
    wanted = (
        rf"'{name}' needs the package {OPTIMIZER_PACKAGES[name]}, .*pip install 'speedit-plugins\[optim\]'"
    )
    with pytest.raises(ValueError, match=wanted):
        optimizers.build_optimizer(nn.Linear(2, 2), small_config(tmp_path, optimizer__type=name))


def test_8_bit_moments_that_cannot_step_on_the_device_are_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("bitsandbytes")

    def step(self: Any, closure: Any = None) -> None:
        raise RuntimeError("no kernel\nfor cpu")

    monkeypatch.setattr(library.optim.AdamW8bit, "step", step)
    wanted = "'AdamW8bit' cannot step on cpu: RuntimeError: no kernel for cpu; wanted device: cuda"
    with pytest.raises(ValueError, match=wanted):
        optimizers.build_optimizer(nn.Linear(2, 2), small_config(tmp_path, optimizer__type="AdamW8bit"))


def test_8_bit_moments_are_saved_in_8_bits(tmp_path: Path) -> None:
    trainer = steps(small_trainer(tmp_path, **options_of("AdamW8bit")), 1)
    moments = checkpoints.load(trainer.save()).moments
    assert moments["state1/blocks.0.mlp.fc1.weight"].dtype == torch.uint8
    assert moments["state1/blocks.0.mlp.fc1.bias"].dtype == torch.float32
