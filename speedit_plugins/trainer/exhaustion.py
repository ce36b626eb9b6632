"""What to do when memory or open files run out: one line for each, with the options that lower the need."""

import errno
import inspect
import re
import resource

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.config.schema import ExperimentConfig

_NO_FILES = re.compile(r"Too many open files|received \d+ items of ancdata")
_NO_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory"
    r"|Unable to allocate|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_NO_SHARED_MEMORY = re.compile(
    r"(unable to (write to|resize|open|mmap)|allocat).*(/torch_|shm|shared memory)|Bus error", re.IGNORECASE
)
# "Tried to allocate 20.00 GiB", "you tried to allocate 4000 bytes", "Unable to allocate 3.6 TiB".
_ASKED = re.compile(r"allocate ([\d.]+ ?[kMGTP]?i?[Bb](?:ytes)?)")


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


def memory_line(error: BaseException, phase: str, config: ExperimentConfig) -> str | None:
    """What to lower after memory ran out in a phase; None for another error."""
    if not is_out_of_memory(error):
        return None
    # torch.OutOfMemoryError is that of a device.
    on_device = type(error).__name__ == "OutOfMemoryError"
    asked = _ASKED.search(str(error))
    more = f" (asked for {asked[1]} more)" if asked else ""
    where = "the device" if on_device else "the machine"
    return f"out of memory of {where}{more}: {_less(phase, config, on_device=on_device)}"


def _less(phase: str, config: ExperimentConfig, *, on_device: bool) -> str:
    """The keys that lower the memory of a phase, with their values."""
    sizes = {"evaluation.batch_size": config.evaluation.batch_size}
    if phase != "test":
        sizes = {"per_proc_batch_size": config.per_proc_batch_size}
    if phase == "train":
        grids = sizes if config.sample_every or config.evaluate_every else {}
        if config.evaluate_every:
            grids = {**grids, "evaluation.batch_size": config.evaluation.batch_size}
        workers = {} if on_device else {"data.num_workers": config.data.num_workers}
        sizes = {"data.batch_size": config.data.batch_size, **workers, **grids}
    least = {"data.num_workers": 0}
    found = [f"lower {key} (now {size})" for key, size in sizes.items() if size > least.get(key, 1)]
    if phase == "train" and config.data.batch_size > 1:
        found[0] += ", with as much more optimizer.grad_accumulation"
    if phase == "train" and _recomputes(config) is False:
        found.append("set model.gradient_checkpointing=true")
    if phase != "test" and config.precision == "fp32":
        found.append("set precision=bf16")
    return ", or ".join(found) or "wanted a smaller model"


def _recomputes(config: ExperimentConfig) -> bool | None:
    """Whether the model recomputes activations in the backward pass; None if it cannot."""
    builder = MODELS.get(str(config.model["type"]))
    if builder is None or "gradient_checkpointing" not in inspect.signature(builder).parameters:
        return None
    return bool(config.model.get("gradient_checkpointing", False))
