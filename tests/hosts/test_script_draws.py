"""Which noise scheduler a draw of a script is for, as its text says."""

import ast

import pytest

from speedit_plugins.hosts.edits.script_draws import schedulers_of_draws
from speedit_plugins.hosts.edits.script_edits import CALLS, edited

LOSS = "loss = F.mse_loss(a, b)\n"
NOISED = "x = s.add_noise(x, noise, t)\n"


def schedulers(text: str) -> list[str | None]:
    """The scheduler of each draw, in the script's order."""
    found = sorted(schedulers_of_draws(ast.parse(text)).items(), key=lambda pair: pair[0].lineno)
    return [None if scheduler is None else ast.unparse(scheduler) for _, scheduler in found]


@pytest.mark.parametrize(
    "text",
    [
        "t = torch.randint(0, s.config.num_train_timesteps, (2,))\n",
        "t = torch.randint(s.config.num_train_timesteps, (2,))\n",
        "t = torch.randint(high=s.num_train_timesteps, size=(2,))\n",
        "t = torch.randint(0, 1000, (2,))\n" + NOISED,
        "t = torch.randint(0, 1000, (2,), device=d).long().to(d)\nt = t.long()\n" + NOISED,
        "t: Tensor = torch.randint(1000, (2,))\nx = s.add_noise(x, noise, timesteps=t.to(d))\n",
        "n = s.config.num_train_timesteps\nt = torch.randint(0, n, (2,))\n" + NOISED,
        "def step(s):\n    t = torch.randint(0, 1000, (2,))\n    x = s.add_noise(x, noise, t)\n"
        "def other(q):\n    t = q.sample()\n    x = q.add_noise(x, noise, t)\n",
    ],
)
def test_a_draw_for_one_scheduler(text: str) -> None:
    assert schedulers(text) == ["s"]


def test_an_attribute() -> None:
    assert schedulers(("t = torch.randint(0, 9, (2,))\n" + NOISED).replace("s.add", "self.s.add")) == [
        "self.s"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "y = torch.randint(0, 10, (2,))\nt = torch.ones(2)\n" + NOISED,
        # Two schedulers, or one that the name has only later.
        "t = torch.randint(0, 1000, (2,))\n" + NOISED + NOISED.replace("s.", "other."),
        "t = torch.randint(0, 1000, (2,))\ns = DDPMScheduler()\n" + NOISED,
        "t = torch.randint(0, 1000, (2,))\nx = make().add_noise(x, noise, t)\n",
        # The name holds something else at the noising.
        "t = torch.randint(0, 8, (2,))\nt = law(t)\n" + NOISED,
        "t = torch.randint(0, 8, (2,)) + 1\n" + NOISED,
        "t = law(torch.randint(0, 8, (2,)))\n" + NOISED,
        "t = torch.randint(0, 8, (2,))\nt += 1\n" + NOISED,
        "t = torch.randint(0, 8, (2,))\nfor t in range(3):\n    x = s.add_noise(x, noise, t)\n",
        # Another function's name.
        "def draw():\n    t = torch.randint(0, 1000, (2,))\n    return t\n" + NOISED,
    ],
)
def test_a_draw_that_is_not_safe_to_edit(text: str) -> None:
    assert schedulers(text) == [None]
    changed, sites = edited(ast.parse(text + LOSS))
    assert CALLS not in ast.unparse(changed)
    assert sites.other_draws
    assert f"(line {sites.other_draws[0]}) is not edited" in sites.shortfall()


def test_what_is_edited() -> None:
    text = "y = torch.randint(0, 10, (2,))\nt = torch.randint(0, 1000, (2,), generator=g)\n" + NOISED + LOSS
    changed, sites = edited(ast.parse(text))
    assert (sites.draws, sites.losses, sites.other_draws) == ([2], [4], [1])
    lines = ast.unparse(changed).splitlines()
    assert lines[0] == "y = torch.randint(0, 10, (2,))"
    assert lines[1] == f"t = {CALLS}.randint(s, 0, 1000, (2,), generator=g)"
