"""Functions of a host that the adapters replace by functions of ours, each once."""

import functools
from collections.abc import Callable
from typing import Any, cast

_MARK = "_speedit_replaced"


def exchange(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts a function in the place of one of a module or a class.

    Args:
        owner: the module or class.
        name: of its function, or of one that a class inherits.
        make: returns the new function; it is given the host's own.

    Raises:
        ValueError: the function is not there, or it has been replaced already.

    Example:
        >>> class Host:
        ...     def loss(self):
        ...         return 2.0
        >>> exchange(Host, "loss", lambda own: lambda self: 3 * own(self))
        >>> Host().loss()
        6.0
    """
    own = getattr(owner, name, None)
    if own is None:
        raise ValueError(
            f"{owner.__name__} has no {name}: this version of the host draws its timesteps, or makes its"
            " loss, in another place than the plugin knows"
        )
    if hasattr(own, _MARK):
        raise ValueError(
            f"{owner.__name__}.{name} has a policy already, from a line of yours or from the launcher"
        )
    made = functools.wraps(own)(make(own))
    setattr(made, _MARK, True)
    setattr(owner, name, made)


def replace(owner: Any, name: str, around: Callable[..., Any], host: str) -> None:
    """Replaces a function of a module, or a method of a class, by one that is called with it.

    Args:
        owner: the module or the class.
        name: of the function in it.
        around: takes the host's function, then the arguments of the call.
        host: for messages.

    Raises:
        ValueError: there is none, or it is replaced already.
    """
    if getattr(owner, name, None) is None:
        raise ValueError(
            f"{owner.__name__} has no {name}, which the plugin replaces in {host}: it knows another version"
        )

    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: around(own, *args, **kwargs)

    exchange(owner, name, make)


def replace_in_subclasses(base: Any, name: str, around: Callable[..., Any], host: str) -> None:
    """Replaces a method in each subclass that defines it, of those that exist and those still to come.

    Args:
        base: of the subclasses. Its own method of this name stays.
        name, around, host: see `replace`.

    Raises:
        ValueError: a method is replaced already.
    """
    begin = vars(base).get("__init_subclass__")

    def made(cls: Any, **kwargs: Any) -> None:
        if begin is None:
            super(base, cls).__init_subclass__(**kwargs)
        else:
            begin.__get__(None, cls)(**kwargs)
        if name in vars(cls):
            replace(cls, name, around, host)

    for each in all_subclasses(base):
        if name in vars(each):
            replace(each, name, around, host)
    setattr(base, "__init_subclass__", classmethod(cast(Any, made)))  # noqa: B010 - mypy: a method is assigned


def all_subclasses(base: Any) -> set[Any]:
    """The classes that derive from a class, at any depth."""
    direct: set[Any] = set(base.__subclasses__())
    return direct.union(*(all_subclasses(each) for each in direct))
