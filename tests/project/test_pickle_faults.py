import pickle
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speedit_plugins.files import pickle_fault
from speedit_plugins.hosts.states.state_file import read_state
from speedit_plugins.spectrum_samples import _arrays
from speedit_plugins.trainer import checkpoints


@pytest.mark.parametrize("zipped", [True, False])
def test_why_torch_refuses_a_file_is_told_without_its_advice(tmp_path: Path, zipped: bool) -> None:
    torch.save({"x": Fraction(1, 2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"x": 1}))
    faults = []
    for name in ("x.pt", "y.pt"):
        with pytest.raises(pickle.UnpicklingError) as caught:
            torch.load(tmp_path / name, weights_only=True)
        assert "weights_only" in str(caught.value)
        faults.append(pickle_fault(caught.value))
    assert faults == [
        "it asks for fractions.Fraction, and loading that could run any code",
        "it is no file of torch.save with tensors and plain values",
    ]
    assert pickle_fault(KeyError("a")) == "'a'"
    assert pickle_fault(EOFError()) == "EOFError"


def test_no_reader_passes_on_the_advice_to_run_a_file(tmp_path: Path) -> None:
    for name in (checkpoints.MODEL, checkpoints.EMA, checkpoints.CONFIG, checkpoints.MANIFEST):
        (tmp_path / name).touch()
    save_file({"a": torch.zeros(1)}, tmp_path / checkpoints.MODEL)
    save_file({"a": torch.zeros(1)}, tmp_path / checkpoints.EMA)
    torch.save({"x": Fraction(1, 2)}, tmp_path / checkpoints.STATE)
    for read, path in (
        (read_state, tmp_path / checkpoints.STATE),
        (_arrays, tmp_path / checkpoints.STATE),
        (checkpoints.load, tmp_path),
    ):
        with pytest.raises(
            ValueError, match=r"it asks for fractions\.Fraction, and loading that could"
        ) as caught:
            read(path)
        assert "weights_only" not in str(caught.value)
