import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from runs import file_size_limit
from safetensors.torch import save_file

from speedit_plugins.files import flush, naming, replacing, sha256_of, usual_mode, write_whole


def test_the_hash_is_that_of_the_standards_example(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-4: the SHA-256 example for a one-block message.
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_longer_than_a_piece_hashes_as_a_whole(tmp_path: Path) -> None:
    for name, content in (("long", bytes(2**22) + b"a"), ("other", bytes(2**22) + b"b")):
        (tmp_path / name).write_bytes(content)
    assert sha256_of(tmp_path / "long") != sha256_of(tmp_path / "other")


def test_files_and_folders_are_flushed_and_missing_ones_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    flush(tmp_path / "file")
    flush(tmp_path)
    with pytest.raises(OSError, match="absent"):
        flush(tmp_path / "absent")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_replaced_whole_or_stays_whatever_ends_its_writing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "file"
    write_whole(target, b"first")
    with replacing(target) as partial:
        partial.write_bytes(b"second")
        assert target.read_bytes() == b"first"
    assert target.read_bytes() == b"second"

    def ended() -> None:
        with replacing(target) as partial:
            partial.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        ended()
    assert target.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [target]


def test_a_library_that_cannot_write_raises_an_error_that_names_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1000)}
    for write in (save_file, torch.save):
        with (
            file_size_limit(500),
            pytest.raises(OSError, match=rf"^\[Errno \d+\] cannot write {tmp_path}/weights: [\w ,]+$"),
            replacing(tmp_path / "weights") as partial,
        ):
            write(tensors, partial)
        assert list(tmp_path.iterdir()) == []


def test_only_an_error_that_names_no_file_is_given_a_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device: 'other'"), naming(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "other")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}: No space left on device"), naming(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(RuntimeError, match="^shapes differ$"), naming(tmp_path):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_files_get_the_permissions_of_the_umask_whatever_a_library_gives_them(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "weights") as partial:
            save_file({"a": torch.zeros(1)}, partial)
        assert usual_mode(tmp_path) == mode
        assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == mode
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
