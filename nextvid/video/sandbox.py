"""Long-lived processes that can be killed: every decode of foreign bytes runs in one, with a deadline and limits.

A crash, a hang or too much memory costs one task a MediaError with reason crashed, timeout or memory, and the next
task gets a fresh process. Processes are forked by one that has imported the decoders and nothing of the caller's (no
inherited locks, no torch, no `__main__`), and start in 0.1 to 0.4 s beside other work, not 2 to 4. One pebble pool a
process, since processes that share a pipe can damage it for each other by dying. worker.py sets the limits.
"""

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import context, popen_forkserver, popen_spawn_posix, spawn, util
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from nextvid.stopping import when_stopped
from nextvid.video import worker
from storage.errors import MediaError
from storage.limits import KILLED

T = TypeVar("T")
Arguments = TypeVar("Arguments", bound=tuple[object, ...])

MEMORY_BYTES = 4 << 30  # 16 frames of 8192 x 4320 as RGB are 1.7 GB; twice that and the decoder's own
OUTPUT_BYTES = 2 << 30  # what one task may return
START_S = 60.0  # our measurement: the first is ready in 0.3 s on two idle cores, 1.9 s with ten busy processes
PRELOADED = ["cv2", "nextvid.video.decode", "nextvid.video.shots", "nextvid.video.worker", "pebble"]
LONGEST = 75  # bytes of TMPDIR: a socket's name has 107 (unix(7)), of which multiprocessing adds 32
IN_FLIGHT = 2  # tasks waiting a process in map_unordered: keeps it busy, bounds memory


class Sandbox:
    """`workers` processes; use as a context manager, from any thread.

    Functions must be importable by name, arguments and results picklable.
    """

    def __init__(self, workers: int = 1, memory_bytes: int = MEMORY_BYTES, output_bytes: int = OUTPUT_BYTES) -> None:
        assert workers > 0, "a sandbox needs a process"
        self.workers = workers
        self._limits = (memory_bytes, output_bytes)
        self._free: SimpleQueue[ProcessPool | None] = SimpleQueue()
        for _ in range(workers):
            self._free.put(None)  # started by the first task that needs it
        self._tasks: set[ProcessFuture[worker.Outcome]] = set()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kill=kind is not None)

    def call(self, function: Callable[..., T], *args: object, timeout_s: float) -> T:
        """The function's result. Raises MediaError: its own, or crashed, timeout, memory, too_large, failed."""
        return self.submit(function, *args, timeout_s=timeout_s).result()

    def submit(self, function: Callable[..., T], *args: object, timeout_s: float) -> "Future[T]":
        """As `call`, at once; the deadline counts from the task's start, not from now."""
        return self._threads.submit(self._run, function, args, timeout_s)

    def map_unordered(
        self, function: Callable[..., T], tasks: Iterable[Arguments], timeout_s: float
    ) -> Iterator[tuple[Arguments, T | MediaError]]:
        """(arguments, result or error) of each task as they finish; reads `tasks` only as fast as they do."""
        running: dict[Future[T], Arguments] = {}
        source = iter(tasks)
        try:
            while True:
                while len(running) < self.workers * IN_FLIGHT and (task := next(source, None)) is not None:
                    running[self.submit(function, *task, timeout_s=timeout_s)] = task
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    try:
                        yield task, future.result()
                    except MediaError as error:
                        yield task, error
        finally:
            for future in running:
                future.cancel()

    def close(self, *, kill: bool = False) -> None:
        """End the processes. Tasks that wait are cancelled; running ones end first, unless `kill` ends them at once."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if kill:
            for task in list(self._tasks):
                task.cancel()  # pebble ends the process of a running task
        self._threads.shutdown()
        while not self._free.empty():
            _end(self._free.get())

    def _run(self, function: Callable[..., T], args: tuple[object, ...], timeout_s: float) -> T:
        pool = self._free.get()
        try:
            if pool is None:
                _place_sockets()
                forked = _Forked()
                forked.set_forkserver_preload(PRELOADED)
                pool = ProcessPool(1, initializer=worker.limit, initargs=self._limits, context=forked)
            task = pool.schedule(worker.run, args=(function, args, self._limits[1]), timeout=timeout_s)
            self._tasks.add(task)
            try:
                outcome = _outcome(task, timeout_s)
            finally:
                self._tasks.discard(task)
        except BaseException:
            _end(pool)  # its state is unknown
            pool = None
            raise
        finally:
            self._free.put(pool)
        if outcome.reason is not None:
            raise MediaError(outcome.reason, outcome.message)
        return outcome.value  # type: ignore[return-value]  # what `function` returned, carried as an object


def _outcome(task: "ProcessFuture[worker.Outcome]", timeout_s: float) -> worker.Outcome:
    try:
        outcome: worker.Outcome = task.result(timeout=timeout_s + START_S)
        return outcome
    except (FutureTimeoutError, TimeoutError):
        raise MediaError("timeout", f"took longer than {timeout_s} s and was stopped") from None
    except ProcessExpired as error:
        killed = f"; {KILLED}" if error.exitcode == -signal.SIGKILL else ""
        raise MediaError("crashed", f"the process that read it died with exit code {error.exitcode}{killed}") from None
    except BrokenProcessPool as error:
        raise MediaError("crashed", f"the process that read it died: {error}") from None


def _end(pool: ProcessPool | None) -> None:
    if pool is not None:
        pool.stop()
        pool.join()


_LAUNCHING = threading.Lock()
_SOCKETS = ExitStack()


def _place_sockets() -> None:
    """Where TMPDIR is too long for a socket's name, let multiprocessing put its sockets in a folder in /tmp."""
    with _LAUNCHING:
        temporary = tempfile.gettempdir()
        if len(temporary) > LONGEST:
            tempfile.tempdir = "/tmp"  # noqa: S108
            try:
                folder = util.get_temp_dir()  # which is kept for the process, and removed at its end
            finally:
                tempfile.tempdir = temporary
            _SOCKETS.close()  # of an earlier sandbox: the folder is the same
            _SOCKETS.enter_context(when_stopped(lambda: shutil.rmtree(folder, ignore_errors=True)))


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that this thread launches do not import `__main__`: an unguarded script would run again."""
    thread = threading.get_ident()
    with _LAUNCHING:
        prepare = spawn.get_preparation_data

        def without_main(name: str) -> dict[str, Any]:
            data = prepare(name)
            if threading.get_ident() == thread:
                data.pop("init_main_from_name", None)
                data.pop("init_main_from_path", None)
            return data

        spawn.get_preparation_data = without_main
        try:
            yield
        finally:
            spawn.get_preparation_data = prepare


class _WithoutMain:
    """For both ways in which multiprocessing starts a child."""

    def _launch(self, process_obj: BaseProcess) -> None:
        with _without_main():
            super()._launch(process_obj)  # type: ignore[misc]  # of the class that this is mixed into


class _SpawnPopen(_WithoutMain, popen_spawn_posix.Popen):
    pass


class _SpawnProcess(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_spawn_posix.Popen:  # noqa: N802 - multiprocessing's name
        return _SpawnPopen(process_obj)


class Spawn(context.SpawnContext):
    """Spawned processes that do not import the caller's `__main__`."""

    Process = _SpawnProcess


class _ForkPopen(_WithoutMain, popen_forkserver.Popen):
    pass


class _ForkProcess(context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_forkserver.Popen:  # noqa: N802 - multiprocessing's name
        return _ForkPopen(process_obj)


class _Forked(context.ForkServerContext):
    """Processes forked by one that has imported the decoders and nothing of the caller's."""

    Process = _ForkProcess
