"""The state of policies in files: one of the launcher's own, or one in each checkpoint of accelerate."""

import io
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from speedit_plugins.files import pickle_fault, write_whole

# In a checkpoint's folder.
CHECKPOINT_FILE = "speedit_policy.pt"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state, whole or not at all.

    Args:
        path: of the file.
        state: plain values and tensors.

    Raises:
        OSError: the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_whole(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, Any]:
    """The state in a file that `write_state` wrote; its tensors are on the CPU.

    Raises:
        ValueError: the file is no such file, or damaged.
        OSError: it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, KeyError) as error:
        raise ValueError(f"{path} is no state of a policy, or damaged: {pickle_fault(error)}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no state of a policy: it has {type(state).__name__}")
    return state


def keep_in_checkpoints(accelerator: Any, holder: Any) -> None:
    """Makes `save_state` and `load_state` of an accelerator write and read a policy's state too.

    A checkpoint without one, of a training before, leaves the policy as it is.

    Args:
        accelerator: of accelerate.
        holder: has `state_dict` and `load_state_dict`.
    """

    def save(models: Any, weights: Any, folder: str) -> None:
        if accelerator.is_main_process:
            write_state(Path(folder) / CHECKPOINT_FILE, holder.state_dict())

    def load(models: Any, folder: str) -> None:
        path = Path(folder) / CHECKPOINT_FILE
        if path.is_file():
            holder.load_state_dict(read_state(path))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class PolicyStates:
    """The states of several policies, in the order in which the policies first train.

    Args:
        holders: where they are kept; None keeps them for good.
    """

    def __init__(self, holders: MutableMapping[Any, None] | None = None) -> None:
        self._holders = {} if holders is None else holders
        self._waiting: list[Mapping[str, Any]] = []
        self._source = ""

    def load(self, states: Sequence[Mapping[str, Any]], source: str) -> None:
        """Gives states to the policies that have trained, and the rest to those that train next.

        Args:
            states: what `state_dicts` returned.
            source: where they are from, for messages.

        Raises:
            ValueError: a state is of another policy.
        """
        self._waiting, self._source = list(states), source
        for holder in list(self._holders):
            self._give(holder)

    def add(self, holder: Any) -> None:
        """A policy is about to train. The first time it is kept, and gets the next of the loaded states.

        Raises:
            ValueError: that is the state of another policy.
        """
        if holder not in self._holders:
            self._give(holder)
            self._holders[holder] = None

    def state_dicts(self) -> list[dict[str, Any]]:
        """The state of each policy, and those that wait still; empty if no policy has trained."""
        states = [holder.state_dict() for holder in self._holders]
        return states and [*states, *map(dict, self._waiting)]

    def _give(self, holder: Any) -> None:
        if self._waiting:
            try:
                holder.load_state_dict(self._waiting[0])
            except ValueError as error:
                raise ValueError(f"{self._source}: {error}") from error
            # A state that was refused still waits, so that it is written again.
            del self._waiting[0]


class StateFile:
    """One file for the state of all policies of a launched script, in the order in which they first train.

    Args:
        path: of the file. If there is one, its states go to the policies as they first train.
        every: steps of any optimizer between two writings, >= 1.
        config: of the policy, as text. A file of another one is refused.
        writes: returns whether this process writes; with several ranks the first does.

    Raises:
        ValueError: `every` < 1, the file is damaged, or is of another policy.
        OSError: the file cannot be read, or its folder is missing.
    """

    def __init__(self, path: Path, every: int, config: str, *, writes: Callable[[], bool]) -> None:
        if every < 1:
            raise ValueError(f"--state-every needs at least 1 step, got {every}")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no folder {path.parent} for --state {path}")
        self._path, self._every, self._config, self._writes = path, every, config, writes
        self._states = PolicyStates()
        self._num_steps = 0
        if path.is_file():
            found = read_state(path)
            if found.get("config") != config:
                raise ValueError(f"{path} has the state of policy {found.get('config')}, not of {config}")
            self._states.load(found["states"], str(path))

    def add(self, holder: Any) -> None:
        """A policy is about to train. The first time it gets its state, if the file had one, and is kept."""
        self._states.add(holder)

    def step_done(self) -> None:
        """An optimizer has made a step."""
        self._num_steps += 1
        if self._num_steps % self._every == 0:
            self.write()

    def write(self) -> None:
        """Writes the states now, in the process that writes. Those of policies that did not train stay."""
        if self._writes() and (states := self._states.state_dicts()):
            write_state(self._path, {"config": self._config, "states": states})
