"""Work beside the training: jobs on one thread, in their order, until one fails."""

import queue
import threading
from collections.abc import Callable

# Name of the thread while it waits for a job.
IDLE = "idle"


class Background:
    """Runs jobs one after the other on a thread of its own. After one that failed, none is run.

    The thread ends with the process, even in the middle of a job: `wait` before.

    Args:
        name: of the thread while a job runs.
    """

    def __init__(self, name: str) -> None:
        self.fault: Exception | None = None
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._num_left = 0
        threading.Thread(target=self._run, args=[name], name=IDLE, daemon=True).start()

    @property
    def is_busy(self) -> bool:
        """Whether a job is not done yet."""
        return self._num_left > 0

    def start(self, job: Callable[[], object]) -> None:
        """Runs the job after those before it, and returns at once."""
        with self._changed:
            self._num_left += 1
        self._jobs.put(job)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Waits until every job is done or dropped, or for the time. Says whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_left, timeout_seconds)

    def _run(self, name: str) -> None:
        own = threading.current_thread()
        while True:
            job = self._jobs.get()
            own.name = name
            try:
                if self.fault is None:
                    job()
            # Every kind of error: whoever waits raises it.
            except Exception as error:
                self.fault = error
            # What the job holds is large, and the next one may be long in coming.
            del job
            own.name = IDLE
            with self._changed:
                self._num_left -= 1
                self._changed.notify_all()
