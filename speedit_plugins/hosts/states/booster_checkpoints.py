"""The state of policies in the checkpoints that a host writes with ColossalAI's Booster.

Open-Sora and OpenDiT save by `booster.save_optimizer(optimizer, FOLDER/optimizer)` and resume by
`booster.load_optimizer`. With a policy, FOLDER/speedit_policy.pt is written and read beside it.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from speedit_plugins.hosts.states.state_file import CHECKPOINT_FILE, PolicyStates, read_state, write_state

_STATES = "_speedit_states"


def booster_states() -> PolicyStates | None:
    """The states that go into the checkpoints of all Boosters; None if ColossalAI is not imported.

    The first call changes the two methods of the class.
    """
    booster: Any = getattr(sys.modules.get("colossalai.booster.booster"), "Booster", None)
    if booster is None:
        return None
    states: PolicyStates | None = vars(booster).get(_STATES)
    if states is None:
        # A scheduler that the host drops takes its policy along.
        states = PolicyStates(WeakKeyDictionary())
        setattr(booster, _STATES, states)
        booster.save_optimizer = _saving(booster.save_optimizer, states)
        booster.load_optimizer = _loading(booster.load_optimizer, states)
    return states


def keep_in_boosters(holder: Any) -> None:
    """Keeps the state of a policy that is about to train in the checkpoints of the host's Boosters, if any.

    Args:
        holder: has `state_dict` and `load_state_dict`.

    Raises:
        ValueError: the checkpoint that was loaded has the state of another policy.
    """
    if (states := booster_states()) is not None:
        states.add(holder)


def _saving(save: Callable[..., None], states: PolicyStates) -> Callable[..., None]:
    @functools.wraps(save)
    def saved(self: Any, optimizer: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        save(self, optimizer, checkpoint, *args, **kwargs)
        writes = not dist.is_initialized() or dist.get_rank() == 0
        if writes and (kept := states.state_dicts()):
            write_state(_beside(checkpoint), {"states": kept})

    return saved


def _loading(load: Callable[..., None], states: PolicyStates) -> Callable[..., None]:
    @functools.wraps(load)
    def loaded(self: Any, optimizer: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        load(self, optimizer, checkpoint, *args, **kwargs)
        path = _beside(checkpoint)
        # A checkpoint from before the policy has none.
        if path.is_file():
            states.load(read_state(path)["states"], str(path))

    return loaded


def _beside(checkpoint: Any) -> Path:
    return Path(checkpoint).parent / CHECKPOINT_FILE
