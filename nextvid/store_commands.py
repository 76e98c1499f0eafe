"""The commands on what is stored: check, withdraw, sweep, pull, and latents in and out."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nextvid.command_line import Batch, Corpus, Json, Yes, app, show
from nextvid.config.project import open_project
from nextvid.making.progress import shown
from nextvid.plain_text import printable
from storage.errors import UpstreamError


@app.command
def verify(
    batch: Batch = None,
    corpus: Corpus = None,
    quick: Annotated[bool, tyro.conf.arg(help="names, sizes and seals alone: finds what is missing or short")] = False,
) -> None:
    """Read every byte of stores, tables, trainsets, runs, encoders and scores, and list what is damaged."""
    from nextvid.corpus.sources import refuse_unknown
    from nextvid.lineage.verify import damaged_records
    from storage.store import every_store

    project = open_project(corpus)
    if batch is not None:
        refuse_unknown(project, batch)
    stores = every_store(project.root)
    if not stores:
        raise UpstreamError("there are no latents yet: 'nextvid make latents' makes them")
    problems = [str(problem) for store in stores for problem in store.verify(batch, quick=quick)]
    problems += damaged_records(project.root, quick=quick) if batch is None else []
    for problem in problems:
        print(printable(problem))
    if problems:
        sys.exit(4)
    what = "row" if batch is not None else "row, table, record and weight"
    print(f"every committed {what} {'has its name and size' if quick else 'is as it was written'}")


@app.command
def withdraw(
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help="as its dataset's listing names it")],
    yes: Yes = False,
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Zero all that is stored of a file, refuse it from now on, list the runs that read it. A plan without --yes."""
    from nextvid.lineage.withdraw import withdraw as withdraw_file

    show(withdraw_file(open_project(corpus), file, yes=yes), json_)


@app.command
def sweep(yes: Yes = False, corpus: Corpus = None, json_: Json = False) -> None:
    """Delete shards that no trainset and no clip needs, and leftover files over a day old. A plan without --yes."""
    from nextvid.lineage.sweep import sweep as sweep_stores

    show(sweep_stores(open_project(corpus), yes=yes), json_)


@app.command
def pull(
    trainset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TRAINSET", help="digest of a trainset")],
    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL", help="the root that has it")],
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Copy a trainset from another root into this project's: exactly what training reads, checked; resumable."""
    from nextvid.trainset.pull import pull as pull_trainset

    with shown() as on_progress:
        found = pull_trainset(open_project(corpus), trainset, url, on_progress)
    show(found, json_)


@app.command(name="export-latents")
def export_latents(
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help="new, or of the same export")],
    format_: Annotated[
        Literal["parquet", "webdataset", "mds"],
        tyro.conf.arg(name="format", help="mds is read by mosaicml-streaming"),
    ] = "parquet",
    frames: Annotated[int | None, tyro.conf.arg(help="clip length; needed where there are several; 1: images")] = None,
    trainset: Annotated[str | None, tyro.conf.arg(metavar="DIGEST", help="the newest if left out")] = None,
    corpus: Corpus = None,
    json_: Json = False,
) -> None:
    """Write the latents of a trainset as files for training code of others; run again, it writes what is missing."""
    from nextvid.trainset.dataset import open_latents
    from nextvid.trainset.exported import export_latents as export

    data = open_latents(open_project(corpus).path, frames, trainset=trainset)
    with shown() as on_progress:
        found = export(data, Path(out), format_, on_progress)
    show(found, json_)


@app.command(name="import-vavae")
def import_vavae(
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="the published VA-VAE, a .pt file")],
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help="a folder that does not exist yet")],
    stats: Annotated[str | None, tyro.conf.arg(help="the published latents_stats.pt, kept for reference")] = None,
) -> None:
    """Convert the published VA-VAE checkpoint to a folder that `encoding.autoencoder` in corpus.yaml can name."""
    from nextvid.encode.vavae import import_vavae as convert

    print(f"{convert(checkpoint, out, stats)} tensors in {out}: name it as encoding.autoencoder in corpus.yaml")
