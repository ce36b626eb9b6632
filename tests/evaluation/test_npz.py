import errno
import os
import resource
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from speedit_plugins.trainer.evaluation.npz import (
    npz_batches,
    npz_keys,
    npz_shape,
    read_npz,
    read_statistics,
    write_npz,
)


def noise(count: int, shape: tuple[int, ...] = (4, 5, 3), seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def test_numpy_reads_our_files_and_we_read_numpys(tmp_path: Path) -> None:
    images = noise(7)
    write_npz(tmp_path / "ours.npz", images)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"], images)
    np.savez(tmp_path / "theirs.npz", images)
    np.savez_compressed(tmp_path / "small.npz", images, np.arange(7))  # ADM's own files have labels in arr_1
    np.testing.assert_array_equal(read_npz(tmp_path / "theirs.npz"), images)
    np.testing.assert_array_equal(read_npz(str(tmp_path / "small.npz")), images)
    assert sorted(os.listdir(tmp_path)) == ["ours.npz", "small.npz", "theirs.npz"]


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), as_tensor=st.booleans())
def test_chunks_are_written_as_one_array(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], as_tensor: bool
) -> None:
    images = noise(sum(sizes), (2, 3, 1))
    chunks: list[NDArray[np.uint8]] = np.split(images, np.cumsum(sizes)[:-1])
    path = tmp_path_factory.mktemp("chunks") / "x.npz"
    # A chunk need not be contiguous: it may be a permuted (B, C, H, W) batch.
    views = (np.asfortranarray(chunk) for chunk in chunks)
    write_npz(path, (torch.from_numpy(v) if as_tensor else v for v in views), num_images=len(images))
    np.testing.assert_array_equal(read_npz(path), images)


def test_one_chunk_is_held_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    on_disk: list[int] = []

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for seed in range(4):
            on_disk.append(sum(entry.stat().st_size for entry in os.scandir(tmp_path)))
            yield noise(64, (64, 64, 3), seed)

    write_npz(path, chunks(), num_images=256)
    chunk = 64 * 64 * 64 * 3
    # Each chunk is on disk before the next one is requested. 64 KiB allow for the file buffer and headers.
    assert all(size >= index * chunk - 65536 for index, size in enumerate(on_disk))
    assert not any(name.endswith(".npz") for name in os.listdir(tmp_path) if name != "x.npz")


@pytest.mark.parametrize(
    ("chunks", "num_images", "message"),
    [
        ([noise(2)], None, "needs num_images when the images come in chunks"),
        ([noise(2)], 3, "num_images=3, got 2 images"),
        ([noise(2), noise(2)], 3, "num_images=3, got more images"),
        ([], 3, "num_images=3, got 0 images"),
        ([noise(2)], 0, "at least one image, got 0"),
        ([noise(2), noise(2, (4, 4, 3))], 4, r"one shape, got \(4, 4, 3\) after \(4, 5, 3\)"),
        ([noise(2).astype(np.float32)], 2, r"uint8 \(N, H, W, C\), not empty; got float32 \(2, 4, 5, 3\)"),
        ([noise(2)[0]], 4, r"got uint8 \(4, 5, 3\)"),
        ([noise(0)], 2, r"got uint8 \(0, 4, 5, 3\)"),
        (noise(2), 3, "num_images=3, got an array of 2 images"),
    ],
)
def test_wrong_images_are_refused_and_the_earlier_file_stays(
    tmp_path: Path, chunks: list[NDArray[np.uint8]], num_images: int | None, message: str
) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, noise(1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_npz(path, chunks, num_images=num_images)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.npz"]


def test_after_an_interruption_the_earlier_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, noise(1))
    before = path.read_bytes()

    def chunks() -> Iterator[NDArray[np.uint8]]:
        yield noise(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(path, chunks(), num_images=4)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.npz"]


def test_a_full_disk_raises_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, noise(1))
    before = path.read_bytes()

    def full(file: IO[bytes]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*x.npz: No space left on device") as caught:
        write_npz(path, noise(2))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.npz"]


def test_a_write_that_fails_half_way_raises_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, noise(1))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to let the file grow past 1 MB; then zipfile also fails to finish the archive.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*x.npz: File too large"):
            write_npz(path, (noise(64, (64, 64, 3)) for _ in range(4)), num_images=256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.npz"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write .*nowhere/x.npz: No such file"):
        write_npz(tmp_path / "nowhere" / "x.npz", noise(1))


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_npz(tmp_path / "x.npz", noise(1))
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_files_in_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=noise(2), labels=np.arange(2))
    with pytest.raises(
        ValueError, match=r"x.npz is not an npz in ADM's format: no arr_0 in it, only \['images', 'labels'\]"
    ):
        read_npz(path)
    np.savez(path, noise(2) / 255.0)
    with pytest.raises(ValueError, match=r"arr_0 in .*x.npz must be uint8 \(N, H, W, C\).*got float64"):
        read_npz(path)
    np.savez(path, noise(2)[0])
    with pytest.raises(ValueError, match=r"got uint8 \(4, 5, 3\)"):
        read_npz(path)
    with path.open("wb") as file:
        np.save(file, noise(2))
    with pytest.raises(ValueError, match=r"not an npz in ADM's format: it is a bare .npy array"):
        read_npz(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_npz(tmp_path / "absent.npz")


def test_pickled_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"not an npz in ADM's format: Object arrays cannot be loaded"):
        read_npz(path)
    path.write_bytes(b"\x80\x04K\x01.")  # a pickled 1
    with pytest.raises(ValueError, match="not an npz in ADM's format"):
        read_npz(path)


def test_any_damage_raises_the_same_error(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, noise(8))
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-30], whole[:200] + b"\x00\x01\x02" + whole[203:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x.npz is not an npz in ADM's format"):
            read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0", b"no array")
    with pytest.raises(ValueError, match="not an npz in ADM's format: arr_0 in it is not an array"):
        read_npz(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_batches_are_the_images_in_order(tmp_path: Path, save: Any, batch_size: int) -> None:
    images = noise(7)
    save(tmp_path / "x.npz", images, np.arange(7))
    batches = list(npz_batches(tmp_path / "x.npz", batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), images)
    assert npz_shape(tmp_path / "x.npz") == (7, 4, 5, 3)
    assert npz_keys(tmp_path / "x.npz") == ["arr_0", "arr_1"]


def test_a_large_file_is_read_batch_by_batch(tmp_path: Path) -> None:
    write_npz(tmp_path / "x.npz", (noise(64, (64, 64, 3), seed) for seed in range(8)), num_images=512)
    tracemalloc.start()
    try:
        sizes = [batch.nbytes for batch in npz_batches(tmp_path / "x.npz", 16)]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # In memory are a batch as bytes and as an array, and the previous batch; the file has 32 batches.
    assert most < 5 * max(sizes)


def test_batches_of_files_in_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=noise(2))
    with pytest.raises(
        ValueError, match=r"x.npz is not an npz in ADM's format: no arr_0 in it, only \['images.npy'\]"
    ):
        list(npz_batches(path, 2))
    np.savez(path, noise(2) / 255.0)
    with pytest.raises(ValueError, match=r"arr_0 must be uint8 .*got float64 \(2, 4, 5, 3\) in C order"):
        npz_shape(path)
    np.savez(path, np.asfortranarray(noise(2)))
    with pytest.raises(ValueError, match=r"in C order, not empty; got uint8 \(2, 4, 5, 3\) in Fortran order"):
        npz_shape(path)
    np.savez(path, np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"got object"):
        npz_shape(path)
    write_npz(path, noise(8))
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-30], whole[:200] + b"\x00\x01\x02" + whole[203:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x.npz is not an npz in ADM's format"):
            list(npz_batches(path, 2))
    with pytest.raises(FileNotFoundError, match="absent"):
        npz_shape(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    "shape",
    ["(-1, 4, 5, 3)", "(2, -4, -5, 3)", "(10**9, 4, 5, 3)", "(8, 4, 5, 4)", "(2**70, 2**70, 5, 3)", "(8, 4"],
)
def test_a_header_that_does_not_fit_the_file_is_damage(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "x.npz"
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".replace("10**9", str(10**9))
    header = text.replace("2**70", str(2**70)).encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + noise(8).tobytes()
        for name in ("arr_0.npy", "mu.npy", "sigma.npy"):
            archive.writestr(name, content)
    for read in (read_npz, npz_shape, read_statistics, lambda path: list(npz_batches(path, 2))):
        with pytest.raises(ValueError, match=r"^\S+x.npz is not an npz in ADM's format: "):
            read(path)


def test_statistics_of_a_reference_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    mean, covariance = np.arange(3.0, dtype=np.float32), np.eye(3) * 2.0
    np.savez(path, mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=covariance)
    got = read_statistics(path)
    assert [value.dtype for value in got] == [torch.float64] * 2
    assert got[0].tolist() == [0.0, 1.0, 2.0]
    assert torch.equal(got[1], 2 * torch.eye(3).double())
    with pytest.raises(ValueError, match=r"mu_s and sigma_s in .*x.npz must be \(D,\) and \(D, D\)"):
        read_statistics(path, spatial=True)
    np.savez(path, noise(2))
    with pytest.raises(ValueError, match="x.npz is not an npz in ADM's format: .*mu"):
        read_statistics(path)
