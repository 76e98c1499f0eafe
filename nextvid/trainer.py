"""The entry point of one rank that trains, and scores meanwhile: `python -m nextvid.trainer --corpus F --recipe R ...`.

torchrun starts it, or a person for one rank. With --run the run was prepared before (pretrain.py); without, rank 0
prepares it, so that torchrun can be called by hand on many machines. Exit codes are those of the command line.
"""

from pathlib import Path
from typing import Annotated

import tyro

from nextvid.config.project import open_project
from nextvid.machine import die_with, run_rank


def main(
    recipe: str,
    corpus: str | None = None,
    run: str | None = None,
    set_: Annotated[tuple[str, ...], tyro.conf.arg(name="set", help="overrides, key.path=value")] = (),
    launcher: Annotated[int | None, tyro.conf.arg(help="id of the process with which to end")] = None,
) -> None:
    """Train one run to its last step."""
    if launcher is not None:
        die_with(launcher)
    from nextvid.config.recipe import ExecutionConfig
    from nextvid.evaluate.training_scores import open_scorer
    from nextvid.train.distributed import join
    from nextvid.train.loop import train
    from nextvid.train.pretrain import prepare_run
    from nextvid.train.run import open_run

    project = open_project(corpus)
    how = open_run(Path(project.root.run(recipe, run))).how if run is not None else ExecutionConfig()
    with join(how) as ranks:
        name = run
        if name is None:
            name = ranks.from_first(prepare_run(project, recipe, set_, how).run_id if ranks.first else None)
            assert name is not None, "rank 0 sends the run's id"
        train(project, open_run(Path(project.root.run(recipe, name))), ranks, open_scorer)


if __name__ == "__main__":
    run_rank(main, "nextvid.trainer")
