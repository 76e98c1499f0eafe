"""The loader: from the store to a step's batch, read ahead by threads of the trainer's process.

For each step threads draw rows and masks (nextvid/trainset/order.py), ask the kernel to read the rows, and fill host
memory that is used again and again (rows.py); then the trainer's thread delivers the batch to its device. Batches from
any step on are the same, whatever the ranks and threads.

Latents and pixels of a trainset are aligned, so `Drawn.rows` finds both. The same threads fill all that the recipe
reads, each kind in memory of its own.

Axes: B clips, F frames, C channels of one frame, h and w cells of the model's grid, H and W pixels, L visible tokens.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nextvid.config.recipe import RecipeConfig
from nextvid.config.stages import draws_before, stage_at
from nextvid.train.distributed import Ranks
from nextvid.train.rows import Hosted, Kind, Latents, Pixels, Rows, Staged, sent
from nextvid.trainset.mask_plan import OpenedPlan
from nextvid.trainset.order import Drawn, Masks, Order, fold
from nextvid.trainset.pixels import TrainsetPixels
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError, RefusedError
from storage.reader import PixelReader, open_reader
from storage.root import DataRoot
from storage.shard_files import AHEAD_ROWS
from storage.store import PixelStore

READ_AHEAD = 4  # batches drawn and hinted before they are filled: our choice, 33 MB at 32 clips
FILLED_AHEAD = 2  # or as many as threads: filled before their step; more would push ready ones out of the CPU's cache
MOST_AHEAD = 2 * (READ_AHEAD + 1)  # batches whose rows are hinted and not filled: drawn ahead, and being filled

RowKind = Literal["latents", "pixels"]  # fields of Batch
T = TypeVar("T")
Item = TypeVar("Item")
Asked = TypeVar("Asked")
Taken = TypeVar("Taken")
A = ParamSpec("A")


@dataclass(frozen=True)
class Batch:
    """One rank's clips of a global batch on their device, images repeated over frames.

    `latents`, of any target encoder, or `pixels` is None if the recipe reads none. Pixels stay bytes until the step,
    which takes a quarter of the memory.
    """

    step: int
    draws: tuple[int, ...]
    latents: Float[Tensor, "B F C h w"] | None  # normalised, on the model's grid
    visible: list[Int[Tensor, "B L"]]  # ids for each mask strategy
    pixels: UInt8[Tensor, "B F H W 3"] | None = None  # of the same view as the latents
    waited_s: float = 0.0

    def split(self, clips: int) -> list["Batch"]:
        """Micro-batches of `clips` each. Raises ConfigError unless they divide the batch: means need equal weight."""
        if len(self.draws) % clips:
            raise ConfigError(f"micro_batch {clips} does not divide the {len(self.draws)} clips of a rank")
        return [
            Batch(
                self.step,
                self.draws[first : first + clips],
                None if self.latents is None else self.latents[first : first + clips],
                [ids[first : first + clips] for ids in self.visible],
                None if self.pixels is None else self.pixels[first : first + clips],
            )
            for first in range(0, len(self.draws), clips)
        ]


@dataclass(frozen=True)
class Filled:
    """A batch in host memory, before it is delivered to the device."""

    step: int
    drawn: Drawn
    visible: list[Int[np.ndarray, "B L"]]
    memory: dict[RowKind, Any]  # of `Rows.memory`


class Loader:
    """Batches of one rank. `open_loader` opens and closes it."""

    def __init__(
        self, recipe: RecipeConfig, order: Order, masks: Masks, rows: Mapping[RowKind, Rows], ranks: Ranks
    ) -> None:
        self._recipe, self._order, self._rows, self._ranks = recipe, order, rows, ranks
        self.masks = masks
        for stage in recipe.stages:
            if stage.batch % ranks.count:
                raise RefusedError(
                    f"stage {stage.name}: batch {stage.batch} is not divisible by {ranks.count} ranks: ask for as many "
                    "as divide it, or override the batch"
                )

    def batches(self, first_step: int, threads: int = 1) -> Generator[Batch, None, None]:
        """Batches from `first_step` to the last step, in order. Without threads each is filled when it is requested."""
        filled = self.filled(first_step, threads)
        while True:
            began = time.perf_counter()
            ready = next(filled, None)
            if ready is None:
                return
            found = {kind: rows.deliver(ready.drawn, ready.memory[kind]) for kind, rows in self._rows.items()}
            ids = [sent(ids, self._ranks.device) for ids in ready.visible]
            waited_s = time.perf_counter() - began
            draws = tuple(ready.drawn.draws)
            yield Batch(ready.step, draws, found.get("latents"), ids, found.get("pixels"), waited_s)

    def filled(self, first_step: int, threads: int) -> Iterator[Filled]:
        """The same before delivery: the caller delivers each before it requests the next."""
        steps = range(first_step, self._recipe.steps)
        return read_ahead(steps, self._drawn, lambda step: self._memory(*self._share(step)), self._fill, threads)

    def clips(self, draws: range) -> Batch:
        """Clips of the first stage by draw number, without masks: the fixed set of the diagnostics."""
        at_once, frames = self._share(0)
        parts: dict[RowKind, list[Tensor]] = {kind: [] for kind in self._rows}
        for first in draws[::at_once]:
            drawn = self._order.drawn(frames, first, min(at_once, draws.stop - first))
            memory = self._memory(len(drawn), frames)
            for kind, rows in self._rows.items():
                rows.fill(drawn, memory[kind])
                parts[kind].append(rows.deliver(drawn, memory[kind]))
        found = {kind: torch.cat(some) for kind, some in parts.items()}
        return Batch(0, tuple(draws), found.get("latents"), [], found.get("pixels"))

    def _share(self, step: int) -> tuple[int, int]:
        """Clips of this rank in a step's batch, and their frames."""
        stage = self._recipe.stages[stage_at(self._recipe.stages, step)[0]]
        return stage.batch // self._ranks.count, stage.frames

    def _drawn(self, step: int) -> Drawn:
        """This rank's contiguous share of the step's draws, hinted to the kernel."""
        clips, frames = self._share(step)
        first = draws_before(self._recipe.stages, step) + self._ranks.rank * clips
        drawn = self._order.drawn(frames, first, clips)
        for rows in self._rows.values():
            rows.will_need(drawn)
        return drawn

    def _memory(self, clips: int, frames: int) -> dict[RowKind, Any]:
        return {kind: rows.memory(clips, frames) for kind, rows in self._rows.items()}

    def _fill(self, step: int, drawn: Drawn, memory: dict[RowKind, Any]) -> Filled:
        for kind, rows in self._rows.items():
            rows.fill(drawn, memory[kind])
        return Filled(step, drawn, self.masks.visible(step, drawn.draws), memory)


def read_ahead(
    items: Iterable[Item],
    draw: Callable[[Item], Asked],
    memory: Callable[[Item], Taken],
    fill: Callable[[Item, Asked, Taken], T],
    threads: int,
) -> Iterator[T]:
    """`fill(item, draw(item), memory(item))` for each item, in order; `memory` is called here, the others by threads.

    An item is drawn when READ_AHEAD later ones are asked for, and filled ahead as constants above say; so at most
    READ_AHEAD + 1 memories are taken and not yielded. Without threads each is drawn and filled when it is requested.
    """

    def filled(item: Item, asked: Future[Asked], taken: Taken) -> T:
        # `asked` was submitted earlier, so it runs or has ended: no thread waits for one that cannot start
        return fill(item, asked.result(), taken)

    filling = min(max(FILLED_AHEAD, threads), READ_AHEAD) if threads else 0
    with _threads(threads) as pool:
        drawing = ((item, pool.submit(draw, item)) for item in items)
        fills = (pool.submit(filled, item, drawn, memory(item)) for item, drawn in _ahead(drawing, READ_AHEAD))
        for future in _ahead(fills, filling):
            yield future.result()


class _Here(Executor):
    """Without threads: work is done when it is submitted."""

    def submit(self, work: Callable[A, T], /, *args: A.args, **kwargs: A.kwargs) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


@contextmanager
def _threads(count: int) -> Iterator[Executor]:
    """Threads that end with the block; work that has not begun is cancelled."""
    torch.get_num_threads()  # fixes the caller's number of threads before ours set their own
    pool = ThreadPoolExecutor(count, "loader", initializer=torch.set_num_threads, initargs=(1,)) if count else _Here()
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(made: Iterable[T], count: int) -> Iterator[T]:
    """The same items, each yielded when `count` later ones are made."""
    window: deque[T] = deque()
    for item in made:
        window.append(item)
        if len(window) > count:
            yield window.popleft()
    yield from window


@contextmanager
def open_loader(
    root: DataRoot,
    trainset: Trainset,
    recipe: RecipeConfig,
    plan: OpenedPlan,
    ranks: Ranks,
    pixels: TrainsetPixels | None = None,
) -> Iterator[Loader]:
    """The loader of one rank; `pixels` are the trainset's, for a recipe that reads them.

    Raises RefusedError if trainset and recipe do not fit, or a row was withdrawn.
    """
    order = Order(trainset, recipe)
    trainset.refuse_withdrawn(order.lengths)
    largest = max(stage.batch // ranks.count * stage.frames for stage in recipe.stages)
    ahead_rows = max(AHEAD_ROWS, *(stage.batch // ranks.count * MOST_AHEAD for stage in recipe.stages))
    with ExitStack() as stack:
        rows: dict[RowKind, Rows] = {}
        if recipe.reads_latents:
            stored = {frames: trainset.rows(frames) for frames in trainset.lengths}
            reader = open_reader(root, trainset.spec, trainset.batches, stored, ahead_rows)
            stack.callback(reader.close)
            latents = Latents(reader, trainset, fold(trainset, recipe), ranks.device)
            rows["latents"] = placed(latents, largest, ranks.device)
        if recipe.reads_pixels:
            assert pixels is not None, "a recipe that reads pixels was given none"
            PixelStore(root, pixels.spec).refuse_gone()
            stored = {frames: pixels.rows(frames) for frames in trainset.lengths}
            jpegs = PixelReader(root, pixels.spec, trainset.batches, stored, ahead_rows)
            stack.callback(jpegs.close)
            rows["pixels"] = placed(Pixels(jpegs, pixels.spec, stored), largest, ranks.device)
        yield Loader(recipe, order, Masks(recipe, plan), rows, ranks)


def placed(kind: Kind, largest: int, device: torch.device) -> Rows:
    """How rows of this kind get to a device; `largest`: frames of the largest batch."""
    if device.type == "cpu":
        return Hosted(kind, largest)
    return Staged(kind, largest, READ_AHEAD + 1, device)
