"""Python programs that start as forks of a process with torch in it: each takes seconds less.

A program finds Python as it starts, but for PRELOADED in sys.modules. What it writes goes to files, and its
exit code is the one that Python gives it.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# The last two take longer than torch. Optimizers load one when they first step, hosts' scripts the other.
PRELOADED = ("torch", "torch._dynamo", "diffusers.training_utils")


class WarmPython:
    """Runs modules as `python -m` does, one after the other.

    Args:
        environment: variables of every program.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._server: subprocess.Popen[str] | None = None

    def run(self, module: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """The exit code of `python -m module *arguments`, and what it wrote."""
        with TemporaryDirectory() as folder:
            outputs = [Path(folder) / name for name in ("stdout", "stderr")]
            request = {
                "module": module,
                "arguments": arguments,
                "cwd": str(cwd or Path.cwd()),
                "outputs": list(map(str, outputs)),
            }
            code = self._ask(json.dumps(request))
            written = [path.read_text() for path in outputs]
        return subprocess.CompletedProcess([module, *arguments], code, *written)

    def _ask(self, request: str) -> int:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=self._environment,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        try:
            self._server.stdin.write(f"{request}\n")
            self._server.stdin.flush()
            return int(self._server.stdout.readline())
        except BaseException:
            # pytest's limit for what hangs: the program and its server go, the next one gets another.
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server = None
            raise


def _become_next() -> dict[str, Any]:
    """Forks for each request; returns it in the fork. At the end of the requests the server ends."""
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            request: dict[str, Any] = json.loads(line)
            return request
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()
    sys.exit()


def _serve() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    request = _become_next()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(request["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["arguments"]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
