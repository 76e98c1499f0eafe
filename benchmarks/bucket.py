"""A first epoch from a bucket against mosaicml-streaming and litdata: `python -m benchmarks.bucket [--quick]`.

The bucket is moto's S3 server behind a link of 20 ms and limited bandwidth, on this machine; every arm starts with an
empty cache folder and reads the same clips once, shuffled as its users have it. Then ours reads a second epoch from its
copies, and rows by ranges. Requests and bytes are counted on the link. Peers read with 2 worker processes, ours with 2
threads.

Axes: F frames, C channels, h w cells.
"""

import asyncio
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import fsspec
import torch
import tyro
from torch import Tensor

from benchmarks.clips import BATCH, CLIP_BYTES, TRAINSET, random_clips, training_recipe, write_store
from benchmarks.measure import machine, show, write
from benchmarks.peers import found_peers, stacked_arrays, stacked_bytes
from benchmarks.sources import loaded
from nextvid.train.distributed import Ranks
from nextvid.train.loader import open_loader
from nextvid.trainset.mask_plan import grid_of, make_plan, open_mask_plan
from nextvid.trainset.trainset import Trainset
from storage.root import DataRoot

LATENCY_S, LINK_BYTES_S = 0.020, 100e6  # our choice: a round trip within a region; what two cores serve beside readers
QUICK_CLIPS, CLIPS, QUICK_TURNS, TURNS = 256, 2048, 1, 3
RANGED_CLIPS = 256  # moto reads a whole shard for each range, so that its rate says nothing; requests do
WORKERS = 2
TARGET = 1.0  # over the best of the others
PIECE_BYTES = 1 << 18


@dataclass
class Link:
    """A TCP proxy that delays and limits; counts are shared with the process that it serves in."""

    server_port: int
    requests: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))
    sent_bytes: Any = field(default_factory=lambda: multiprocessing.Value("q", 0))
    open: Any = field(default_factory=lambda: multiprocessing.Value("i", 0))
    most_open: Any = field(default_factory=lambda: multiprocessing.Value("i", 0))
    port: Any = field(default_factory=lambda: multiprocessing.Value("i", 0))

    def clear(self) -> None:
        for count in (self.requests, self.sent_bytes, self.most_open):
            count.value = 0

    def serve(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._free_at = 0.0  # when the link has sent what it was given
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.value += 1
        self.most_open.value = max(self.most_open.value, self.open.value)
        up, down = await asyncio.open_connection("127.0.0.1", self.server_port)
        try:
            await asyncio.gather(self._asked(reader, down), self._answered(up, writer))
        except OSError:  # either end has closed
            pass
        finally:
            self.open.value -= 1
            for end in (down, writer):
                end.close()

    async def _asked(self, reader: asyncio.StreamReader, down: asyncio.StreamWriter) -> None:
        while data := await reader.read(PIECE_BYTES):
            if data.startswith((b"GET ", b"HEAD ", b"PUT ", b"POST ")):
                self.requests.value += 1
                await asyncio.sleep(LATENCY_S)
            down.write(data)
            await down.drain()
        down.close()

    async def _answered(self, up: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await up.read(PIECE_BYTES):
            self._free_at = max(self._free_at, time.perf_counter()) + len(data) / LINK_BYTES_S
            await asyncio.sleep(self._free_at - time.perf_counter())
            self.sent_bytes.value += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[tuple[str, Link]]:
    """Serve moto and a link to it; (URL of the server itself, link), with the environment set to the link."""
    from tests.services.s3.server import s3_server, variables_of

    with s3_server(folder) as port:
        link = Link(port)
        process = multiprocessing.get_context("fork").Process(target=link.serve, daemon=True)
        process.start()
        while not link.port.value:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{link.port.value}"
        os.environ |= variables_of(url) | {"S3_ENDPOINT_URL": url}
        try:
            yield f"http://127.0.0.1:{port}", link
        finally:
            process.terminate()
            process.join()


def main(
    quick: bool = False,
    clips: int | None = None,
    turns: int | None = None,
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
) -> None:
    """Measure, print a table, and with --json write what README.md documents.

    Args:
        quick: one turn of 256 clips; supports no claim.
        clips: how many are in the bucket.
        turns: how often each arm reads them.
        json: file for the results.
    """
    count, turns = clips or (QUICK_CLIPS if quick else CLIPS), turns or (QUICK_TURNS if quick else TURNS)
    peers, absent = found_peers()
    writers = {source.name: source.write for source in peers if source.name.startswith(("mosaicml", "litdata"))}
    with tempfile.TemporaryDirectory(prefix="nextvid-bucket-") as name:
        folder = Path(name)
        with bucket(folder) as (server, link):
            _fill(folder, server, count, writers)
            arms: dict[str, Callable[[Path, int], Iterable[Tensor]]] = {"ours": our_epoch}
            arms |= {peer: EPOCHS[peer.partition(" ")[0].rstrip(",")] for peer in writers}
            found: dict[str, list[dict[str, float]]] = {}
            for turn in range(turns):
                for arm, epoch in arms.items():
                    cache = folder / f"cache{turn}" / arm.partition(" ")[0]
                    cache.mkdir(parents=True)
                    found.setdefault(arm, []).append(_read(epoch, cache, count, link))
                    if arm == "ours":
                        found.setdefault("ours, second epoch", []).append(_read(epoch, cache, count, link))
            found["ours, by ranges"] = [_read(ranged_epoch, folder / "none", RANGED_CLIPS, link)]
    _report(found, absent, {"quick": quick, "clips": count, "turns": turns}, json)


def _fill(folder: Path, server: str, count: int, writers: dict[str, Callable[..., None]]) -> None:
    """Write each format here and put it into the bucket, past the link."""
    clips = random_clips(count)
    write_store(clips, folder / "ours")
    make_plan(DataRoot.open(str(folder / "ours")), training_recipe(1))
    fs = fsspec.filesystem("s3", endpoint_url=server)
    fs.mkdir("bench")
    for name, writer in writers.items():
        place = folder / _key(name)
        place.mkdir()
        writer(clips, place)
    for place in [folder / "ours", *(folder / _key(name) for name in writers)]:
        fs.put(f"{place}/", f"bench/{place.name}/", recursive=True)


def _key(name: str) -> str:
    return name.partition(" ")[0].rstrip(",").partition("-")[0]


def _read(epoch: Callable[[Path, int], Iterable[Tensor]], cache: Path, count: int, link: Link) -> dict[str, float]:
    """One epoch, from opening to the last clip."""
    link.clear()
    began, seen = time.perf_counter(), 0
    for batch in epoch(cache, count):
        seen += len(batch)
    seconds = time.perf_counter() - began
    assert seen == count, f"{seen} of {count} clips"
    return {
        "clips_per_s": count / seconds,
        "requests_per_clip": link.requests.value / count,
        "bytes_over_clips": link.sent_bytes.value / (count * CLIP_BYTES),
        "connections": float(link.most_open.value),
    }


def our_epoch(cache: Path, count: int, cache_bytes: int = 10**11) -> Iterator[Tensor]:
    """The trainer's loader with 2 threads, its batches as they go to a device."""
    root = DataRoot.open("s3://bench/ours", str(cache), str(cache), cache_bytes)
    config = training_recipe(count // BATCH)
    plan = open_mask_plan(root, config.masks, grid_of(config.model))
    with open_loader(root, Trainset.open(root, TRAINSET), config, plan, Ranks(0, 1, torch.device("cpu"))) as opened:
        for batch in opened.batches(0, WORKERS):
            assert batch.latents is not None
            yield batch.latents


def ranged_epoch(cache: Path, count: int) -> Iterator[Tensor]:
    """The same without a cache."""
    return our_epoch(cache, count, 0)


def _mds_epoch(cache: Path, _count: int) -> Iterable[Tensor]:
    from streaming import StreamingDataset

    data = StreamingDataset(remote="s3://bench/mosaicml", local=str(cache), batch_size=BATCH, shuffle=True)
    return loaded(data, WORKERS, stacked_bytes)


def _litdata_epoch(cache: Path, _count: int) -> Iterable[Tensor]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS = {**downloader._OBSTORE_CLIENT_OPTIONS, "allow_http": True}  # refuses moto else
    data = StreamingDataset("s3://bench/litdata", cache_dir=str(cache), shuffle=True, batch_decode=False)
    found: Iterable[Tensor] = StreamingDataLoader(
        data, batch_size=BATCH, num_workers=WORKERS, collate_fn=stacked_arrays
    )
    return found


EPOCHS = {"mosaicml-streaming": _mds_epoch, "litdata": _litdata_epoch}


def _report(
    found: dict[str, list[dict[str, float]]], absent: list[dict[str, str]], how: dict[str, Any], json: Path | None
) -> None:
    rows = [
        {"name": name, **{key: statistics.median(turn[key] for turn in turns) for key in turns[0]}}
        for name, turns in found.items()
    ]
    others = [turns for name, turns in found.items() if not name.startswith("ours")]
    ratio = None
    if others:  # of rates within one turn
        best = [max(turns[n]["clips_per_s"] for turns in others) for n in range(how["turns"])]
        ratio = statistics.median(one["clips_per_s"] / peer for one, peer in zip(found["ours"], best, strict=True))
    show("first epoch from a bucket", list(rows[0]), [list(row.values()) for row in rows])
    print(f"ours over the best of the others: {ratio if ratio is None else round(ratio, 2)} (wanted {TARGET})")
    link = {"latency_s": LATENCY_S, "bytes_per_s": LINK_BYTES_S}
    write(
        json,
        {
            "benchmark": "bucket",
            "machine": machine(),
            **how,
            "link": link,
            "rows": rows,
            "absent": absent,
            "ratio": ratio,
        },
    )


if __name__ == "__main__":
    tyro.cli(main)
