"""What `nextvid verify` finds in records and tables: everything under the roots but the bytes of stores.

Each file is read as its reader does, and compared with the name it has: tables hold rows of their batch, and what is
kept under a digest has that digest. All other files: verify_files.py. Nothing is repaired. Stores: storage/verify.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextvid.config.accepted import accepted
from nextvid.lineage.trace import damaged_trainsets, score_record, scores_of
from nextvid.lineage.verify_files import folders_for_files, sealed_files
from nextvid.making.publishing import CHECKS, read_latest
from nextvid.train import checkpoint
from nextvid.train.events import read_events
from nextvid.train.export import check_files, read_config
from nextvid.train.run import Run, open_run
from nextvid.trainset import mask_plan
from storage import atomic, listing, tables
from storage.digest import digest_config
from storage.errors import DamagedError, NExTVidError, StoreError, TableError, is_damage
from storage.records import read_record
from storage.root import RUN_CONFIG, DataRoot, Pointed, Table
from storage.schemas import Clips, Duplicates, Labels, Media, Pictures, ProbeRows, Shots, Sources
from storage.verify import Problem

SCHEMAS: dict[Table, Any] = {"sources": Sources, "media": Media, "labels": Labels, "shots": Shots, "clips": Clips}
_DIGEST = r"[0-9a-f]{32}"


def damaged_records(root: DataRoot, *, quick: bool = False) -> list[str]:
    """What is wrong with tables, records, trainsets, runs and scores, one message each: file, finding, remedy.

    With `quick`, names, sizes, seals and records alone: weights, arrays and pictures are not read.
    """
    problems: list[Problem] = []
    with _found(problems, root.accepted(), "remove it; 'nextvid plan --accept' accepts what corpus.yaml asks for"):
        accepted(root)
    if not quick:
        _tables(root, problems)
    for noun in ("latent_stats", "duplicates", "mask_plan"):
        _pointed(root, noun, problems)
    lines = [*map(str, problems), *damaged_trainsets(root, quick=quick)]
    problems.clear()
    for config in sorted(Path(root.runs_url, "pretrain").glob(f"*/*/{RUN_CONFIG}")):
        _run(config.parent, problems, quick)
    for path in scores_of(root):
        _score(path, problems, quick)
    for place in folders_for_files(root):
        problems.append(Problem(place, None, "is a folder where a file should be", "remove it"))
    lines += map(str, problems)
    problems.clear()
    for file, read in sealed_files(root, quick=quick):
        if not any(file in line for line in lines):
            with _found(problems, file, "remove it and make it again"):
                read()
    return [*lines, *map(str, problems)]


@contextmanager
def _found(problems: list[Problem], file: str, remedy: str) -> Iterator[None]:
    """Whatever ends the block because of what the file is, is one more problem of it."""
    try:
        yield
    except (NExTVidError, OSError, ValueError, EOFError) as error:
        if not is_damage(error) and not isinstance(error, NExTVidError):
            raise
        problems.append(Problem(file, None, str(error), remedy))
    except (AttributeError, KeyError, TypeError) as error:
        what = f"is not what was written ({type(error).__name__}: {error})"
        problems.append(Problem(file, None, what, remedy))


def _tables(root: DataRoot, problems: list[Problem]) -> None:
    """Tables of every batch, their checks, and the checks of latents."""
    for noun, schema in SCHEMAS.items():
        for batch in root.batches(noun):
            path = root.table(noun, batch)
            maker = "sources" if noun == "sources" else "media" if noun == "labels" else noun
            with _found(problems, path, f"remove it and make '{maker}' of batch {batch} again"):
                held = tables.read_table(path, schema)
                others = set(held["batch"].unique()) - {batch} if "batch" in held.columns else set()
                if others:
                    raise TableError(f"holds rows of batch {', '.join(sorted(map(str, others)))}")
            if noun not in ("sources", "labels"):
                _checks(root.checks(noun, batch), noun, problems)
    for name in listing.files(f"{root.folder('shots')}/pictures", r".*\.parquet"):
        path = f"{root.folder('shots')}/pictures/{name}"
        with _found(problems, path, "remove it and make 'shots' again"):
            tables.read_table(path, Pictures)
    for spec in listing.folders(root.folder("latents"), _DIGEST):
        folder = root.spec_folder(spec)
        for name in listing.files(folder, r"[a-z0-9_]+\.[0-9]{6}\.json"):
            _checks(f"{folder}/{name}", "latents", problems)


def _checks(path: str, asset: str, problems: list[Problem]) -> None:
    with _found(problems, path, f"remove it and make '{asset}' again"):
        found = tables.read_checks(path)
        if found is not None and found["asset"] != asset:
            raise TableError(f"holds the checks of '{found['asset']}'")


def _pointed(root: DataRoot, noun: Pointed, problems: list[Problem]) -> None:
    """Everything kept under a digest, and the pointer to the newest."""
    latest = root.latest(noun)
    with _found(problems, latest, f"remove it and make '{noun}' again"):
        digest = read_latest(root, noun)
        if digest is not None and not atomic.exists(root.pointed(noun, digest)):
            raise DamagedError(f"names {digest}, which is not there")
    for digest in listing.folders(f"{root.url}/{noun}", _DIGEST):
        folder = root.pointed(noun, digest)
        _checks(f"{folder}/{CHECKS}", noun, problems)
        with _found(problems, folder, f"remove the folder and make '{noun}' again"):
            match noun:
                case "latent_stats":
                    held = digest_config(read_record(f"{folder}/stats.json"))
                case "mask_plan":
                    for _ in mask_plan.read_files(folder, mask_plan.read_plan(folder)):
                        pass
                    held = digest
                case _:
                    tables.read_table(f"{folder}/duplicates.parquet", Duplicates)
                    held = digest if read_record(f"{folder}/duplicates.json") else "none"
            if held != digest:
                raise DamagedError(f"what is recorded there has the digest {held}")


def _run(folder: Path, problems: list[Problem], quick: bool) -> None:
    """A run's config.json, events, checkpoints and exported encoders."""
    place, run = str(folder / RUN_CONFIG), list[Run]()
    with _found(problems, place, "restore it from a copy; without it the run cannot go on"):
        run.append(open_run(folder))
        if run[0].id != folder.name:
            raise StoreError(f"describes run {run[0].id}")
    if not run:
        return
    with _found(problems, str(folder / "events.jsonl"), "restore it from a copy, or remove it: curves start again"):
        events = read_events(folder)
        if not events or (run[0].complete and events[-1]["kind"] != "end"):
            raise DamagedError("lacks its last events")
        others = {event["run"] for event in events if "run" in event} - {folder.name}
        if others:
            raise DamagedError(f"holds events of run {', '.join(sorted(others))}")
    for path in sorted((folder / "checkpoints").glob("step_*")):
        remedy = "remove the folder and train again: the run goes on from the checkpoint before it"
        with _found(problems, str(path), remedy):
            checkpoint.refuse_other(path, run[0].identity)
            if not quick:
                checkpoint.verify(path)
    for path in (folder / "encoder", folder / "encoder_online"):
        if path.is_dir():
            with _found(problems, str(path), "remove the folder and train again: the run exports it again"):
                config = read_config(path)
                if config["run"] != folder.name:
                    raise DamagedError(f"is the encoder of run {config['run']}")
                if not quick:
                    check_files(path, config)
                for name, sums in config.get("files", {}).items():
                    if (path / name).stat().st_size != sums["size_bytes"]:
                        raise DamagedError(f"{path / name} has another size than was written")


def _score(path: Path, problems: list[Problem], quick: bool) -> None:
    """A score.json, the rows that were scored, and the features of pictures."""
    remedy = f"remove the folder {path.parent} and make 'probes' again"
    with _found(problems, str(path), remedy):
        score_record(path)
    with _found(problems, str(path.with_name("rows.parquet")), remedy):
        tables.read_table(str(path.with_name("rows.parquet")), ProbeRows)
    file = path.with_name("features.npz")
    with _found(problems, str(file), remedy):
        if not file.is_file():
            raise DamagedError("is missing")
        if not quick:
            tables.read_arrays(str(file), remedy)
