"""What to do when memory or open files run out: one line for each, with the options that lower the need."""

import errno
import re
import resource

_NO_FILES = re.compile(r"Too many open files|received \d+ items of ancdata")
_NO_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory"
    r"|Unable to allocate|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_NO_SHARED_MEMORY = re.compile(
    r"(unable to (write to|resize|open|mmap)|allocat).*(/torch_|shm|shared memory)|Bus error", re.IGNORECASE
)


def out_of_files(error: BaseException) -> str | None:
    """What to do if the process has too many open files; None for another error."""
    is_system = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    # torch hands files from process to process, and reports a full table by what it did not receive.
    if not is_system and not _NO_FILES.search(str(error)):
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    name = getattr(error, "filename", None)
    where = f" at {name}" if name else ""
    return (
        f"too many open files{where}: the limit of this process is {limit}; raise it (ulimit -n 65536), or"
        " lower data.num_workers or data.prefetch_factor"
    )


def out_of_shared_memory(error: BaseException) -> str | None:
    """What to do if /dev/shm, through which batches come, is full; None for another error."""
    if not _NO_SHARED_MEMORY.search(str(error)):
        return None
    return (
        "shared memory is full: make /dev/shm larger (docker run --shm-size), or lower data.num_workers,"
        " data.prefetch_factor or data.batch_size"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, that of the device or of the machine."""
    if isinstance(error, MemoryError):
        return True
    is_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return is_system or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))
