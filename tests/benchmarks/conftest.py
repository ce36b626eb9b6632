"""Trains the digit classifier of the benchmarks once for each set of arguments."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from speedit_plugins.trainer.evaluation.features import DigitClassifier

_TRAINED: dict[bytes, dict[str, Any]] = {}


# Undone after each module: the tests of other folders train their own.
@pytest.fixture(autouse=True, scope="module")
def _trained_once() -> Iterator[None]:
    # The same arguments give the same classifier to the bit: tests/evaluation/test_features.py checks it.
    train = DigitClassifier.__init__

    def remembered(self: DigitClassifier, images: Tensor, labels: Tensor, **options: Any) -> None:
        parts = [images.numpy().tobytes(), labels.numpy().tobytes(), repr((images.shape, options)).encode()]
        key = hashlib.sha256(b"".join(parts)).digest()
        if key not in _TRAINED:
            train(self, images, labels, **options)
            _TRAINED[key] = vars(self)
        vars(self).update(_TRAINED[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitClassifier, "__init__", remembered)
        yield
