"""Scripts that draw and make their losses in another order than one after the other."""

import ast

import diffusers
import pytest
import torch
from torch.testing import assert_close

from speedit_plugins.hosts.edits.script_edits import CALLS, ScriptCalls, edited
from speedit_plugins.hosts.script import ScriptPolicy


def test_two_draws_before_two_losses() -> None:
    own, scheduler, x = ScriptPolicy(), diffusers.DDPMScheduler(), torch.ones(4, 3)
    first, second = (own.timesteps(scheduler, 4) for _ in range(2))
    for index in (first, second):
        scheduler.add_noise(x, x, index)
    assert type(scheduler) is diffusers.DDPMScheduler
    weight = own.policy.weight.float()
    for index in (first, second.clone()):
        assert_close(own.mse_loss(x, 0 * x, timesteps=index), weight[index].mean())
    with pytest.raises(ValueError, match="did not draw the timesteps"):
        own.mse_loss(x, 0 * x, timesteps=torch.zeros(4, dtype=torch.int64))
    for _ in range(2):
        own.timesteps(scheduler, 4)
    # The second of two losses tells that the first draw was no step that ended early.
    own.mse_loss(x, 0 * x)
    with pytest.raises(ValueError, match="to which draw this loss belongs.*pass timesteps=timesteps"):
        own.mse_loss(x, 0 * x)


def test_a_step_that_ends_early() -> None:
    own, scheduler, x = ScriptPolicy(), diffusers.DDPMScheduler(), torch.ones(4, 3)
    for _ in range(3):
        own.timesteps(scheduler, 4)
        index = own.timesteps(scheduler, 4)
        assert_close(own.mse_loss(x, 0 * x), own.policy.weight.float()[index].mean())


def test_draws_with_several_names_are_told_by_no_name() -> None:
    draw, loss = "torch.randint(0, s.config.num_train_timesteps, (4,))", "F.mse_loss(x, 0 * x)"
    branches = f"def step(c):\n if c:\n  t = {draw}\n else:\n  u = {draw}\n return {loss}\n"
    tree, _ = edited(ast.parse(f"t = {draw}\n{branches}loss = {loss}\n"))
    lines = ast.unparse(tree).splitlines()
    assert [("drawn" in line) for line in lines if "mse_loss" in line] == [False, True]
    one = f"def step(c):\n if c:\n  t = {draw}\n return {loss}\n"
    names = {CALLS: ScriptCalls(ScriptPolicy()), "s": diffusers.DDPMScheduler(), "x": torch.ones(4, 3)}
    exec(compile(edited(ast.parse(one))[0], "script", "exec"), names)
    assert names["step"](c=True) > 0


def test_a_script_that_is_edited_tells_its_draws() -> None:
    calls, scheduler = ScriptCalls(ScriptPolicy()), diffusers.DDPMScheduler()
    x, source = torch.ones(4, 3), "t = torch.randint(0, s.config.num_train_timesteps, (4,))\n" * 2
    tree, sites = edited(ast.parse(source + "x = s.add_noise(x, x, t)\nloss = F.mse_loss(x, 0 * x)\n"))
    names = {CALLS: calls, "s": scheduler, "x": x}
    exec(compile(tree, "script", "exec"), names)
    assert sites.draws == [1, 2]
    assert "drawn=lambda: t" in ast.unparse(tree)
