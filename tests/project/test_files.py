from pathlib import Path

import pytest

from speedit_plugins.files import flush, replacing, sha256_of, write_whole


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
