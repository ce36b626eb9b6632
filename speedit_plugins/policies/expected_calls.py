"""What a training loop has to call beside `draw`, and a warning if it never does."""

import warnings

import torch

# More draws than most loops make before they report losses, such as the micro-batches of an accumulation.
NUM_DRAWS = 100
_HOW = {
    "update": "policy.update(draw.index, loss), with the unweighted loss of each sample",
    "advance": "policy.advance(), before each draw",
}


class ExpectedCalls:
    """Counts draws until each of some methods was called, and warns once if one of them never is.

    Draws under `torch.no_grad()` do not count: they train nothing.

    Args:
        methods: "update", "advance", both or none.

    Example:
        >>> import warnings
        >>> expected = ExpectedCalls("update", "advance")
        >>> expected.called("advance")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for _ in range(200):
        ...         expected.drawn("info_noise")
        >>> [str(each.message).split(":")[0] for each in caught]
        ["policy 'info_noise' stays as it began"]
    """

    def __init__(self, *methods: str) -> None:
        self._missing = list(methods)
        self._num_draws = 0

    def called(self, method: str) -> None:
        """Records that the loop has called this method."""
        if method in self._missing:
            self._missing.remove(method)

    def drawn(self, policy: str) -> None:
        """Counts a batch that the policy of this name has drawn.

        Warns:
            UserWarning: at draw `NUM_DRAWS`, if a method was not called yet.
        """
        if not self._missing or not torch.is_grad_enabled():
            return
        self._num_draws += 1
        if self._num_draws == NUM_DRAWS:
            missing = " and ".join(f"policy.{method}" for method in self._missing)
            wanted = "; and ".join(_HOW[method] for method in self._missing)
            warnings.warn(
                f"policy {policy!r} stays as it began: it has drawn {NUM_DRAWS} batches, and your loop has"
                f" not called {missing}. In each training step it needs {wanted}. Draws under"
                " torch.no_grad() train nothing and are not counted",
                # The caller of `TimestepPolicy.draw`; of a direct `draw_at`, the caller's caller.
                stacklevel=4,
            )
