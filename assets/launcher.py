"""torchrun as a child of a Dagster step: its own process group, metrics streamed through Pipes, cancel within 10 s."""

import os
import subprocess
import warnings
from pathlib import Path

import dagster as dg

from nextvid.train.launch import LOG, PreparedRun, end_group


def run_group(context: dg.AssetExecutionContext, run: PreparedRun) -> None:
    """Train in a process group of its own, which ends with this call. Raises dg.Failure with the end of its output."""
    log_path = Path(run.folder) / LOG
    with (
        log_path.open("ab") as log,
        warnings.catch_warnings(action="ignore", category=dg.PreviewWarning),  # dagster's, of its own message reader
        dg.open_pipes_session(
            context=context,
            context_injector=dg.PipesTempFileContextInjector(),
            message_reader=dg.PipesTempFileMessageReader(),
        ) as session,
    ):
        process = subprocess.Popen(
            run.command,
            env={**os.environ, **run.env, **session.get_bootstrap_env_vars()},
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


def _tail(path: Path, size_bytes: int = 4000) -> str:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - size_bytes))
        return file.read().decode(errors="replace")
