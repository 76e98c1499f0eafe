"""The entry point of one rank that trains, and scores meanwhile: `python -m nextvid.trainer --recipe R --run ID`.

The run was prepared before (pretrain.py). Exit codes are those of the command line.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from nextvid.config.project import open_project
from nextvid.machine import die_with, run_rank


def main(
    recipe: str,
    run: str,
    corpus: str | None = None,
    launcher: Annotated[int | None, tyro.conf.arg(help="id of the process with which to end")] = None,
) -> None:
    """Train one run to its last step."""
    if launcher is not None:
        die_with(launcher)
    from nextvid.config.recipe import ExecutionConfig
    from nextvid.evaluate.training_scores import open_scorer
    from nextvid.train.distributed import join
    from nextvid.train.loop import train
    from nextvid.train.run import open_run

    project = open_project(corpus)
    opened = open_run(Path(project.root.run(recipe, run)))
    with join(opened.how) as ranks:
        # rank 0's, for all: nodes that are started by hand write config.json one after the other
        how = ranks.from_first(opened.how.model_dump_json())
        train(project, replace(opened, how=ExecutionConfig.model_validate_json(str(how))), ranks, open_scorer)


if __name__ == "__main__":
    run_rank(main, "nextvid.trainer")
