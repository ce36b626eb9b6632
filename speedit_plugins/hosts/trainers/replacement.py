"""A function of a host is replaced by one of ours that calls it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

_MARK = "_speedit_replaced"


def replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
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
        >>> replace(Host, "loss", lambda own: lambda self: 3 * own(self))
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
            f"{owner.__name__}.{name} has a policy already, from a line of yours or the launcher"
        )
    made = wraps(own)(make(own))
    setattr(made, _MARK, True)
    setattr(owner, name, made)
