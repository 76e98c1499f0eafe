"""The command line: `nextvid COMMAND`. The same functions and the same nouns as the graph.

Exit codes: 0 done, 2 the user's configuration or corpus is wrong (or the command itself), 3 something upstream is
missing or failed its checks, 4 a store or table is damaged, 5 the system refused (disk full, no permission), 1 anything
else. Progress is a plain line an outcome, and at a terminal a bar for what counts files or rows; `--json` prints what a
script would read.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.extras import SubcommandApp

from nextvid.config.project import open_project
from nextvid.graph import Asset
from nextvid.make import Request, make
from nextvid.making.bars import shown
from nextvid.making.outcome import Outcome
from storage.errors import ConfigError, NExTVidError, UpstreamError, exit_code

app = SubcommandApp()

Corpus = Annotated[str | None, tyro.conf.arg(help="path of corpus.yaml; else NEXTVID_CORPUS, else ./corpus.yaml")]
Yes = Annotated[bool, tyro.conf.arg(help="do it; without, only say what would be done")]
Json = Annotated[bool, tyro.conf.arg(name="json", help="print JSON")]


@app.command(name="make")
def make_command(
    asset: Annotated[Asset, tyro.conf.Positional],
    corpus: Corpus = None,
    batch: str | None = None,
    recipe: str | None = None,
    benchmark: str | None = None,
    set_: Annotated[tuple[str, ...], tyro.conf.arg(name="set", help="overrides of the recipe, key.path=value")] = (),
    ranks: int = 1,
    json_: Json = False,
) -> None:
    """Make an asset and what it lacks upstream."""
    from nextvid.planning.acceptance import others, outdated

    project = open_project(corpus)
    with shown() as bars:
        request = Request(asset, batch, recipe, benchmark, set_, ranks, bars.on_pace, on_count=bars.on_count)
        for outcome in make(project, request):
            print(json.dumps(asdict(outcome), default=str) if json_ else line(outcome), flush=True)
    if project.corpus.reencode == "ask" and (names := outdated(project)):
        print(
            f"{project.path} asks for {others(names)} than is in force: this went on with what is. 'nextvid plan' says "
            "what the other costs, 'nextvid plan --accept' puts it in force",
            file=sys.stderr,
        )


@app.command
def inspect(
    what: Annotated[Literal["recipe"], tyro.conf.Positional],
    name: Annotated[str, tyro.conf.Positional],
    set_: Annotated[tuple[str, ...], tyro.conf.arg(name="set", help="overrides of the recipe, key.path=value")] = (),
    json_: Json = False,
) -> None:
    """Print what a recipe costs: parameters, tokens, FLOPs and memory by part; with --json the recipe in full too."""
    from nextvid.config.overrides import apply_overrides
    from nextvid.config.recipes import recipe as recipe_by_name
    from nextvid.model.cost import cost
    from nextvid.model.summary import summary

    match what:
        case "recipe":
            found = apply_overrides(recipe_by_name(name), set_)
    reckoned = cost(found)
    if json_:
        values = {"digest": found.digest(), **found.model_dump(mode="json"), "cost": asdict(reckoned)}
        print(json.dumps(values, indent=2))
    else:
        print(summary(found, reckoned))


@app.command
def plan(batch: str | None = None, accept: bool = False, corpus: Corpus = None, json_: Json = False) -> None:
    """Show what `make latents` would encode, why and at what cost; --accept puts corpus.yaml in force."""
    from nextvid.planning.acceptance import accept_asked
    from nextvid.planning.costs import forecast

    project = open_project(corpus)
    if accept:
        project = accept_asked(project)
    found = forecast(project, batch)
    print(json.dumps(asdict(found), indent=2) if json_ else found.text())


@app.command
def schema() -> None:
    """Print the JSON schema of corpus.yaml, by which editors complete and check the file."""
    from nextvid.config.reference import schema as corpus_schema

    print(json.dumps(corpus_schema(), indent=2))


@app.command
def draws(
    first: Annotated[int, tyro.conf.arg(help="how many draws")] = 10,
    start: Annotated[int, tyro.conf.arg(help="number of the draw to begin with")] = 0,
    recipe: str = "demo",
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Print the first draws of a recipe on the newest trainset: dataset, row and mask entries, without data or GPU.

    Says on stderr how many draws training makes, if fewer than asked for; and how many of the first ones are those of
    the trainset before it, and why the others are not.
    """
    from nextvid.config.recipes import recipe as recipe_by_name
    from nextvid.config.stages import draws_before
    from nextvid.trainset.order import listed_draws
    from nextvid.trainset.prefix import shared_prefix

    if first < 1 or start < 0:
        raise ConfigError(f"--first {first} --start {start}: ask for one draw or more, counted from 0")
    project, config = open_project(corpus), recipe_by_name(recipe)
    for drawn in listed_draws(project, recipe, range(start, start + first)):
        print(json.dumps(drawn) if json_ else "  ".join(f"{k}={v}" for k, v in drawn.items()))
    if (made := draws_before(config.stages, config.steps)) < start + first:
        print(f"training makes {made} draws, the last is number {made - 1}", file=sys.stderr)
    if config.masks.keep != "fixed":
        print(f"masks of keep: {config.masks.keep} hang on the step too and are not printed", file=sys.stderr)
    if prefix := shared_prefix(project, recipe, start + first):
        print(prefix.text(), file=sys.stderr)


@app.command
def verify(batch: str | None = None, corpus: Corpus = None) -> None:
    """Read every committed byte of every store of latents and pixels, and every trainset; name what is damaged."""
    from nextvid.corpus.sources import refuse_unknown
    from nextvid.lineage.trace import damaged_trainsets
    from storage.pixels import every_store

    project = open_project(corpus)
    root = project.root
    if batch is not None:
        refuse_unknown(project, batch)
    stores = every_store(root)
    if not stores:
        raise UpstreamError("there are no latents yet: 'nextvid make latents' makes them")
    problems = [str(problem) for store in stores for problem in store.verify(batch)]
    problems += damaged_trainsets(root) if batch is None else []
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(4)
    print("every committed row is as it was written")


@app.command
def lineage(what: Annotated[str, tyro.conf.Positional], corpus: Corpus = None, json_: Json = False) -> None:
    """Trace a run, checkpoint or score down to its files, or a file up to the runs that saw it."""
    from nextvid.lineage.trace import trace

    found = trace(open_project(corpus), what)
    print(json.dumps(asdict(found), default=str, indent=2) if json_ else found.text())


@app.command(name="import-vavae")
def import_vavae(
    checkpoint: Annotated[str, tyro.conf.Positional],
    out: Annotated[str, tyro.conf.Positional],
    stats: Annotated[str | None, tyro.conf.arg(help="the published latents_stats.pt, kept for reference")] = None,
) -> None:
    """Convert the published VA-VAE checkpoint to a folder that encoding.autoencoder can name."""
    from nextvid.encode.vavae import import_vavae as convert

    print(f"{convert(checkpoint, out, stats)} tensors in {out}: name it as encoding.autoencoder in corpus.yaml")


@app.command
def withdraw(
    file: Annotated[str, tyro.conf.Positional], yes: Yes = False, corpus: Corpus = None, json_: Json = False
) -> None:
    """Zero what was stored of a file, refuse it from now on, and list what has seen it; a plan without --yes."""
    from nextvid.lineage.withdraw import withdraw as withdraw_file

    found = withdraw_file(open_project(corpus), file, yes=yes)
    print(json.dumps(asdict(found), indent=2) if json_ else found.text())


@app.command
def sweep(yes: Yes = False, corpus: Corpus = None, json_: Json = False) -> None:
    """Free shards that no trainset cites and no clip wants, and litter older than a day; a plan without --yes."""
    from nextvid.lineage.sweep import sweep as sweep_stores

    found = sweep_stores(open_project(corpus), yes=yes)
    print(json.dumps(asdict(found), indent=2) if json_ else found.text())


@app.command
def compare(
    first: Annotated[str, tyro.conf.Positional],
    second: Annotated[str, tyro.conf.Positional],
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Show in which fields of configuration and scores two runs differ."""
    from nextvid.lineage.compare import compare as compare_runs

    found = compare_runs(open_project(corpus), first, second)
    print(json.dumps(asdict(found), indent=2) if json_ else found.text())


@app.command
def export(
    run: Annotated[str, tyro.conf.Positional], out: Annotated[str, tyro.conf.Positional], corpus: Corpus = None
) -> None:
    """Copy a run's EMA encoder to a folder that nextvid.load_encoder opens."""
    from nextvid.lineage.compare import find
    from nextvid.train.export import copy_encoder

    facts = find(open_project(corpus), run)
    copy_encoder(Path(facts.folder, "encoder"), Path(out))
    print(f"encoder of run {facts.run} (recipe {facts.recipe}, trainset {facts.trainset}) in {out}")


def line(outcome: Outcome) -> str:
    """One outcome on one line."""
    name = outcome.asset if outcome.partition is None else f"{outcome.asset} {outcome.partition}"
    state = "made" if outcome.made else "up to date"
    bad = f", {outcome.quarantined} quarantined" if outcome.quarantined else ""
    failed = [check.name for check in outcome.checks if not check.passed]
    verdict = f", failed: {', '.join(failed)}" if failed else ""
    return f"{name:38} {state:11} {outcome.rows:>8} rows{bad}  {outcome.seconds:7.1f} s{verdict}"


def main() -> None:
    """Entry point; errors of ours are one message on stderr and an exit code that says which kind."""
    try:
        app.cli(prog="nextvid", description=__doc__.splitlines()[0] if __doc__ else None)
    except NExTVidError as error:
        print(f"{error.kind}: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    except OSError as error:
        print(f"system: {error}; what was done before stands whole, ask again once this is mended", file=sys.stderr)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
