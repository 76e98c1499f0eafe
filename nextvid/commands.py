"""The command line: `nextvid COMMAND` calls the makers that Dagster's assets call, without Dagster.

Results go to stdout; progress, notes and errors go to stderr.
"""

import io
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nextvid import store_commands  # noqa: F401 - registers its commands
from nextvid.command_line import ABOUT, Batch, Corpus, How, Json, Overrides, Run, app, example_of, show
from nextvid.config.project import open_project
from nextvid.config.recipe import On
from nextvid.graph import Asset
from nextvid.make import Request, make
from nextvid.making.outcome import Outcome, line, to_look_at
from nextvid.making.progress import shown
from nextvid.plain_text import printable
from storage.errors import ConfigError, exit_code
from storage.limits import explained

HALF_PAIR = re.compile("[\ud800-\udfff]")  # what Python makes of the bytes of an argument that are not UTF-8


@app.command(name="make")
def make_command(
    asset: Annotated[Asset, tyro.conf.Positional],
    corpus: Corpus = None,
    batch: Batch = None,
    recipe: Annotated[
        str | None,
        tyro.conf.arg(metavar="NAME", help="for mask_plan and all after it; for probes also an encoder of corpus.yaml"),
    ] = None,
    benchmark: Annotated[str | None, tyro.conf.arg(metavar="NAME", help="probe only on this benchmark")] = None,
    set_: Overrides = (),
    how: How = (),
    ranks: Annotated[int | None, tyro.conf.arg(help="processes that train or probe, one a GPU; by default 1")] = None,
    repeat: Annotated[int, tyro.conf.arg(help="train the same again, as a run of its own: 1, 2, ...")] = 0,
    trainset: Annotated[str | None, tyro.conf.arg(metavar="DIGEST", help="train on this one, not the newest")] = None,
    run: Annotated[str | None, tyro.conf.arg(metavar="RUN", help="probe, sample or report this run")] = None,
    checkpoint: Annotated[
        int | None, tyro.conf.arg(metavar="STEP", help="probe the checkpoint of this step of --run, ended or not")
    ] = None,
    on: Annotated[On, tyro.conf.arg(help="train on this machine, or as a job of a cluster")] = "here",
    json_: Json = False,
) -> None:
    """Make an asset and whatever it lacks upstream."""
    from nextvid.planning.acceptance import difference, outdated

    project = open_project(corpus)
    made: list[Outcome] = []
    try:
        with shown() as on_progress:
            request = Request(
                asset, batch, recipe, benchmark, set_, how, ranks, repeat, trainset, run, checkpoint, on, on_progress
            )
            for outcome in make(project, request):
                made.append(outcome)
                print(json.dumps(asdict(outcome), default=str) if json_ else line(outcome), flush=True)
    finally:
        if made and not json_:
            print(to_look_at(made), flush=True)
    if project.corpus.reencode == "ask" and (names := outdated(project)):
        print(
            f"{difference(names)}; the accepted one was used. "
            "'nextvid plan' shows what the change would cost, 'nextvid plan --accept' accepts it",
            file=sys.stderr,
        )


@app.command
def init(
    folder: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help="of videos and images; or a URL")
    ],
    out: Annotated[str, tyro.conf.arg(metavar="PATH", help="a file that does not exist yet")] = "corpus.yaml",
    autoencoder: Annotated[str | None, tyro.conf.arg(metavar="FOLDER", help="weights; by default the demo's")] = None,
    json_: Json = False,
) -> None:
    """Look at a folder and write a first corpus.yaml for it: what is there, its labels, clips that fit."""
    from nextvid.corpus.draft import draft_corpus

    show(draft_corpus(folder, out, autoencoder), json_)


@app.command
def status(corpus: Corpus = None, json_: Json = False) -> None:
    """Show on one screen what exists, what is missing or broken, and what to do next."""
    from nextvid.lineage.status import read_status

    with shown() as on_progress:
        found = read_status(open_project(corpus), on_progress)
    show(found, json_)


@app.command
def plan(
    batch: Batch = None,
    accept: Annotated[bool, tyro.conf.arg(help="accept corpus.yaml and newer makers first")] = False,
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Show what `nextvid make latents` would encode, why, and at what cost."""
    from nextvid.planning.costs import accept_and_tell, forecast

    project = open_project(corpus)
    if accept:
        project = accept_and_tell(project)
    show(forecast(project, batch), json_)


@app.command
def inspect(
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="name of a recipe, such as nextvid_l")],
    set_: Overrides = (),
    how: How = (),
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Show what a recipe costs: parameters, tokens and FLOPs by part, and what fits a GPU. --json adds the recipe."""
    from nextvid.config.corpus import corpus_path
    from nextvid.config.overrides import apply_how, apply_overrides
    from nextvid.config.recipe import ExecutionConfig
    from nextvid.config.recipes import recipe as recipe_by_name
    from nextvid.model.cost import cost, summary
    from nextvid.model.memory import rank_memory, report

    config = apply_overrides(recipe_by_name(recipe, corpus_path(corpus)), set_)
    costs, execution = cost(config), apply_how(ExecutionConfig(), how)
    if json_:
        memory = {stage.name: asdict(rank_memory(config, stage, execution)) for stage in config.stages}
        values = {"digest": config.digest(), **config.model_dump(mode="json"), "cost": asdict(costs), "memory": memory}
        print(json.dumps(values, indent=2))
    else:
        print(summary(config, costs), report(config, execution), sep="\n")


@app.command
def schema() -> None:
    """Print the JSON schema of corpus.yaml, by which editors complete and check the file."""
    from nextvid.config.reference import schema as corpus_schema

    print(json.dumps(corpus_schema(), indent=2))


@app.command
def draws(
    first: Annotated[int, tyro.conf.arg(help="how many draws")] = 10,
    start: Annotated[int, tyro.conf.arg(help="number of the first one, from 0")] = 0,
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME", help="name of a recipe")] = "demo",
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """List the rows and masks that training will draw from the newest trainset, in order, without data or GPU."""
    from nextvid.config.stages import draws_before
    from nextvid.trainset.order import listed_draws, shared_with_parent

    if first < 1 or start < 0:
        raise ConfigError(f"--first {first} --start {start}: ask for one draw or more, counted from 0")
    project = open_project(corpus)
    config = project.recipe(recipe)
    for drawn in listed_draws(project, recipe, range(start, start + first)):
        print(json.dumps(drawn) if json_ else printable("  ".join(f"{k}={v}" for k, v in drawn.items())))
    if (made := draws_before(config.stages, config.steps)) < start + first:
        print(f"training makes {made} draws, the last is number {made - 1}", file=sys.stderr)
    if config.masks.keep != "fixed":
        print(f"masks depend on the step too (masks.keep: {config.masks.keep}) and are not shown", file=sys.stderr)
    if shared := shared_with_parent(project, recipe, start + first):
        print(shared, file=sys.stderr)


@app.command
def lineage(
    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="run, checkpoint, score or file")],
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Trace a run, checkpoint or score down to its files, or a file up to the runs that read it."""
    from nextvid.lineage.trace import trace

    show(trace(open_project(corpus), what), json_)


@app.command(name="show")
def show_command(
    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="id of a row, clip, shot or medium, or a file")],
    out: Annotated[str, tyro.conf.arg(metavar="PATH", help="where the picture goes")] = "shown.png",
    recipe: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help="whose draws and masks; else the last run's")
    ] = None,
    features: Annotated[bool, tyro.conf.arg(help="add dense features as colours, EMA beside random encoder")] = False,
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Show a row, shot or file as a picture and in words: source, stored, masked, and which draws see it."""
    from nextvid.lineage.shown import show as show_one

    with shown() as on_progress:
        found = show_one(open_project(corpus), what, out, recipe, on_progress, features)
    show(found, json_)


@app.command
def compare(
    runs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="ids of two runs or more")
    ],
    picture: Annotated[
        str | None, tyro.conf.arg(metavar="PNG", help="draw accuracy over the encoders' parameters to this file")
    ] = None,
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Show the fields of configuration and the scores in which runs differ, and accuracy by size of the encoder."""
    from nextvid.lineage.compare import compare as compare_runs

    found = compare_runs(open_project(corpus), runs)
    if picture is not None:
        from nextvid.report.curves import over_size_png

        Path(picture).write_bytes(over_size_png(found.reached))
    show(found, json_)


@app.command
def export(
    run: Run,
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help="a folder that does not exist yet")],
    format_: Annotated[
        Literal["safetensors", "onnx"],
        tyro.conf.arg(name="format", help="onnx adds a model.onnx, for any runtime of it"),
    ] = "safetensors",
    corpus: Corpus = None,
) -> None:
    """Copy the EMA encoder of a run to a folder that nextvid.load_encoder opens, with its model card."""
    from nextvid.features.encoder import copy_encoder
    from nextvid.lineage.compare import find
    from nextvid.report.hub_card import hub_card
    from nextvid.train.run import open_run

    project = open_project(corpus)
    facts = find(project, run)
    folder = Path(facts.folder)
    readme = hub_card(project, open_run(folder)) if (folder / "encoder").is_dir() else None
    copy_encoder(folder / "encoder", Path(out), readme, onnx=format_ == "onnx")
    print(f"encoder of run {facts.run} (recipe {facts.recipe}, trainset {facts.trainset}) in {out}")


@app.command
def features(
    paths: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PATH", help="videos, images, folders, fsspec URLs"),
    ],
    encoder: Annotated[str, tyro.conf.arg(metavar="FOLDER", help="an exported encoder")],
    out: Annotated[str, tyro.conf.arg(metavar="FILE", help="a .parquet, .npz or .safetensors file, added to")],
    frames: Annotated[int | None, tyro.conf.arg(help="frames of a clip; by default those of training")] = None,
    fps: Annotated[float | None, tyro.conf.arg(help="frames a second of a clip")] = None,
    stride: Annotated[int | None, tyro.conf.arg(help="every so many source frames, in the place of fps")] = None,
    every: Annotated[float | None, tyro.conf.arg(help="a clip every so many seconds; by default one a file")] = None,
    pool: Annotated[
        Literal["mean", "tubelet", "none"],
        tyro.conf.arg(help="one vector a clip, one a tubelet of it, or one a tubelet and cell"),
    ] = "mean",
    layer: Annotated[int, tyro.conf.arg(help="number of the block, from 0; by default the last")] = -1,
    precision: Annotated[Literal["fp32", "bf16"], tyro.conf.arg(help="arithmetic of the encoder")] = "fp32",
    batch: Annotated[int | None, tyro.conf.arg(help="clips of one forward; by default 16, on a CPU 4")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], tyro.conf.arg(help="auto is a GPU where there is one")] = "auto",
    ranks: Annotated[int, tyro.conf.arg(help="processes, one for each GPU")] = 1,
    json_: Json = False,
) -> None:
    """Compute features of videos and images with an exported encoder; run again, it does what is missing.

    A row has path, start_us, end_us, vector, status and reason. A file that cannot be used is a row, and the exit
    code is 3 then.
    """
    from nextvid.features.encoder import read_facts
    from nextvid.features.extract import Asked
    from nextvid.features.make import make_features
    from nextvid.features.windows import Windows

    if min(1 if batch is None else batch, ranks) < 1:
        raise ConfigError(f"--batch {batch} --ranks {ranks}: both must be at least 1")
    windows = Windows.of(read_facts(Path(encoder)).clip, frames, fps, stride, every)
    asked = Asked(Path(encoder), windows, layer, pool, precision, batch)
    with shown() as on_progress:
        summary = make_features(paths, asked, Path(out), device, ranks, on_progress)
    show(summary, json_)
    if summary.counts.failed:
        sys.exit(3)


def main() -> None:
    """Carry out the command: an error becomes one message on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of letters that the terminal's encoding lacks
    try:
        try:
            if other := next((word for word in sys.argv[1:] if HALF_PAIR.search(word)), None):
                raise ConfigError(f"{other} is not UTF-8: rename the file or folder")
            app.cli(prog="nextvid", description=ABOUT)
        finally:
            if example := example_of(sys.argv[1:]):
                print(example)
            sys.stdout.flush()  # here, so that a closed pipe is noticed below and not at the interpreter's exit
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if (known := explained(error)) is None:
            raise
        print(printable(f"{known.kind}: {known}", keep="\n"), file=sys.stderr)
        sys.exit(exit_code(known))
