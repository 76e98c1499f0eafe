"""The entry point of one rank that scores: `python -m nextvid.evaluate --corpus F --recipe R ...`; torchrun starts it.

What is scored was planned before (probes.py); exit codes are those of the command line.
"""

from typing import Annotated, Literal

import tyro

from nextvid.config.project import open_project
from nextvid.machine import die_with, run_rank
from storage.errors import RefusedError


def main(
    recipe: str,
    corpus: str | None = None,
    run: str | None = None,
    checkpoint: int | None = None,
    benchmarks: tuple[str, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 1,
    launcher: Annotated[int | None, tyro.conf.arg(help="id of the process with which to end")] = None,
) -> None:
    """Score a run's checkpoint, or an encoder of corpus.yaml, where scores are missing."""
    if launcher is not None:
        die_with(launcher)
    import os

    from nextvid.config.recipe import ExecutionConfig
    from nextvid.evaluate.compute import compute_probes
    from nextvid.evaluate.probes import plan_probes
    from nextvid.train.distributed import join

    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        raise RefusedError("ranks that score share files of one machine: ask for as many as it has GPUs")
    project = open_project(corpus)
    planned = plan_probes(project, recipe, run, benchmarks, checkpoint)
    with join(ExecutionConfig(device=device)) as ranks:
        compute_probes(project, planned, ranks, threads)


if __name__ == "__main__":
    run_rank(main, "nextvid.evaluate")
