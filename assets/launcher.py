"""torchrun as a child of a Dagster step: its own process group, metrics streamed through Pipes, cancel within 10 s."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

import dagster as dg

GRACE_S = 8.0  # design 4: a cancelled group ends within 10 s; SIGKILL follows after this


def run_group(context: dg.AssetExecutionContext, command: Sequence[str], env: Mapping[str, str], log_path: str) -> None:
    """Run a command to its end in a process group of its own. Raises dg.Failure with the end of its output."""
    with (
        open(log_path, "ab") as log,  # noqa: PTH123 - a plain append handle for the child
        dg.open_pipes_session(
            context=context,
            context_injector=dg.PipesTempFileContextInjector(),
            message_reader=dg.PipesTempFileMessageReader(),
        ) as session,
    ):
        process = subprocess.Popen(
            list(command),
            env={**os.environ, **env, **session.get_bootstrap_env_vars()},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait()
        finally:
            end_group(process)
    if code != 0:
        raise dg.Failure(
            description=f"the trainer ended with exit code {code}; the end of {log_path}:\n{_tail(log_path)}",
            allow_retries=code < 0,  # a signal is a crash and worth a retry, which resumes the same run
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process group: SIGTERM, then SIGKILL after the grace."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: str, size_bytes: int = 4000) -> str:
    with open(path, "rb") as file:  # noqa: PTH123
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - size_bytes))
        return file.read().decode(errors="replace")
