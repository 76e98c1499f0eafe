"""The command `nextvid features`: what a file of features lacks of some videos and images is computed and added.

Several devices have a process each and deal the files out among them (extract.py); output.py keeps what they finish.
"""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue as Queue
from pathlib import Path
from typing import Any

import polars as pl

from nextvid.corpus.sources import list_folder
from nextvid.features.encoder import ExportFacts, read_facts
from nextvid.features.extract import Asked, Counts, SourceFile, extract
from nextvid.features.output import Output
from nextvid.machine import die_with, leased_devices
from nextvid.making.progress import OnProgress, Progress, noting, silent
from nextvid.plain_text import printable
from nextvid.train.export import WEIGHTS
from nextvid.video.archives import fingerprint_of
from nextvid.video.sandbox import Spawn
from storage import remote
from storage.digest import digest_file
from storage.errors import CorpusError, RefusedError, StoreError
from storage.limits import KILLED
from storage.locks import locked_or_holder
from storage.remote import is_local

NAME = "features"


@dataclass(frozen=True)
class Summary:
    """What one call did."""

    out: str
    counts: Counts
    present: int  # files that the output had already
    seconds: float  # from the first file on
    devices: int

    def text(self) -> str:
        """In two lines, and one for each of the first files that failed."""
        rate = self.counts.clips / self.seconds if self.counts.clips else 0.0
        busy = self.counts.busy_s / (self.seconds * self.devices) if self.counts.clips else 0.0
        return (
            f"{self.counts.clips} clips of {self.counts.files} files, {self.counts.failed} failed; {self.present} "
            f"files were there before\n{rate:.1f} clips/s, encoder busy {busy:.0%}; {self.out}"
        ) + "".join(f"\nfailed: {printable(error)}" for error in self.counts.errors)


def find_files(paths: Sequence[str]) -> pl.DataFrame:
    """The media files that paths and URLs name: columns path (URI) and fingerprint, each file once, folders searched.

    A file that is named itself is taken whatever its extension; its content decides. Raises CorpusError where one is
    missing or nothing is found.
    """
    found: list[tuple[str, str]] = []
    for path in paths:
        remote.refuse_protocol(path, "path")
        uri = path if "://" in path else str(Path(path).absolute())
        try:
            fs, key = remote.connect(uri)
            info = fs.info(key)
            if info["type"] == "directory":
                found += [(row[0], f"{row[3]} {row[4]}") for row in sorted(list_folder(uri)[0])]
                continue
        except FileNotFoundError:
            raise CorpusError(f"{path}: there is no such file or folder") from None
        except PermissionError as error:
            raise CorpusError(f"{path}: no permission to read it ({error})") from None
        fingerprint = fingerprint_of(info)
        if is_local(uri):
            fingerprint = f"mtime {os.stat(uri.removeprefix('file://')).st_mtime_ns}"  # noqa: PTH116 - as listings do
        found.append((uri, f"{info['size']} {fingerprint}"))
    if not found:
        raise CorpusError(f"{', '.join(paths) or 'no path'}: no video or image is there")
    schema = {"path": pl.String(), "fingerprint": pl.String()}
    return pl.DataFrame(found, schema, orient="row").unique("path", keep="first", maintain_order=True)


def make_features(
    paths: Sequence[str],
    asked: Asked,
    out: Path,
    device: str = "auto",
    ranks: int = 1,
    on_progress: OnProgress = silent,
) -> Summary:
    """Compute the features that the file `out` lacks of these files, and write it.

    Raises CorpusError, ConfigError, RefusedError; a file that cannot be used is a row.
    """
    facts = read_facts(asked.encoder)
    output = Output(out.absolute(), _settings(facts, asked), _shape(facts, asked))
    every, counts, devices = find_files(paths), Counts(), []
    known = output.open()
    with locked_or_holder(output.parts / "lock") as holder:
        if holder is not None:
            raise RefusedError(f"{out}: process {holder} is writing it: wait for it, or name another file")
        complete = known.group_by("path", "fingerprint").agg((pl.col("status") == "ok").all()).filter("status")
        missing = every.join(complete, on=["path", "fingerprint"], how="anti", maintain_order="left")
        files, began = [SourceFile(*row) for row in missing.iter_rows()], time.perf_counter()
        if files:
            with leased_devices(ranks, device, NAME, noting(on_progress, NAME)) as devices:
                began = time.perf_counter()
                counts = _extract_on(devices, files, asked, output, on_progress)
        seconds = time.perf_counter() - began
        output.merge()
    return Summary(str(out), counts, every.height - missing.height, seconds, max(1, len(devices)))


def _settings(facts: ExportFacts, asked: Asked) -> dict[str, Any]:
    """What decides the vectors, as plain values. Raises RefusedError where the encoder cannot do what is asked."""
    policy, model = asked.windows.policy, facts.model
    if not -model.encoder.depth <= asked.layer < model.encoder.depth:
        raise RefusedError(f"layer {asked.layer}: this encoder has the layers 0 to {model.encoder.depth - 1}")
    if policy.frames % model.tubelet:
        raise RefusedError(f"{policy.frames} frames: this encoder takes whole tubelets of {model.tubelet}")
    if model.encoder.input == "latents" and not facts.carries_autoencoder:
        raise RefusedError(f"{asked.encoder} reads latents and has no autoencoder: export the run again beside its own")
    return {
        "encoder": digest_file(asked.encoder / WEIGHTS),
        "frames": policy.frames,
        "fps": policy.fps,
        "stride": policy.stride,
        "crop": policy.crop,
        "every_s": asked.windows.every_s,
        "layer": asked.layer % model.encoder.depth,
        "pool": asked.pool,
        "precision": asked.precision,
    }


def _shape(facts: ExportFacts, asked: Asked) -> tuple[int, ...]:
    model = facts.model
    tubelets = asked.windows.policy.frames // model.tubelet
    match asked.pool:
        case "mean":
            return (model.encoder.width,)
        case "tubelet":
            return (tubelets, model.encoder.width)
        case "none":
            return (tubelets, model.cells, model.encoder.width)


def _extract_on(
    devices: Sequence[str], files: Sequence[SourceFile], asked: Asked, output: Output, on_progress: OnProgress
) -> Counts:
    """Extract on each device its share of the files, every so many-th."""
    total = Counts()

    def tell(done: Counts) -> None:
        nonlocal total
        total += done
        on_progress(Progress(NAME, total.files, len(files)))

    if len(devices) == 1:
        extract(files, asked, output, devices[0], 1, "0", tell)
        return total
    context = Spawn()
    told = context.SimpleQueue()

    def listen() -> None:
        for done in iter(told.get, None):
            tell(done)

    listener = threading.Thread(target=listen, name="telling")
    listener.start()
    pools = [ProcessPoolExecutor(1, context, _begin, (told, os.getpid())) for _ in devices]
    try:
        running = [
            pool.submit(_extract, files[rank :: len(devices)], asked, output, device, len(devices), str(rank))
            for rank, (pool, device) in enumerate(zip(pools, devices, strict=True))
        ]
        for future in running:
            future.result()
    except BrokenProcessPool as error:
        raise StoreError(
            f"a process died; what it finished is kept: run the same command again; {KILLED} (--batch, --ranks)"
        ) from error
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        told.put(None)
        listener.join()
    return total


# What follows runs in the processes.

_TOLD: list["Queue[Counts | None]"] = []  # one


def _begin(told: "Queue[Counts | None]", parent: int) -> None:
    die_with(parent)
    _TOLD.append(told)


def _extract(files: Sequence[SourceFile], asked: Asked, output: Output, device: str, sharers: int, name: str) -> None:
    extract(files, asked, output, device, sharers, name, _TOLD[0].put)
