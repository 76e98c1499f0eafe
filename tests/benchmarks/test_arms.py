"""What the arms of the loader's benchmark hand out: whole batches, which stay as they are while somebody holds them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.arms import _Consumer
from benchmarks.clips import BATCH, CHANNELS, InHostMemory, Store, random_clips, write_store
from benchmarks.measure import timed
from benchmarks.sources import OWN, Source
from nextvid.model.tokens import normalise

CLIPS = 4 * BATCH


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(random_clips(CLIPS), folder)
    return folder


@pytest.mark.parametrize("threads", [0, 2])
def test_a_batch_stays_until_the_next_is_there(written: Path, threads: int) -> None:
    store, clips = Store(written), random_clips(CLIPS)
    steps = 12
    order = np.array(store.order(steps)).reshape(steps, BATCH)
    held: torch.Tensor | None = None
    for step, batch in enumerate(store.loader(steps, InHostMemory).batches(0, threads)):
        assert batch.latents is not None
        if held is not None:
            np.testing.assert_array_equal(held.numpy(), clips[order[step - 1]])
        np.testing.assert_array_equal(batch.latents.numpy(), clips[order[step]])
        held = batch.latents


@pytest.mark.parametrize("source", OWN, ids=lambda source: source.name)
def test_formats_give_the_same_clips_epoch_after_epoch(source: Source, tmp_path: Path) -> None:
    clips, order = random_clips(BATCH), list(range(BATCH))[::-1]
    source.write(clips, tmp_path)
    batches = source.batches(tmp_path, order, 0)
    for _ in range(2):
        np.testing.assert_array_equal(torch.cat(list(batches)).numpy(), clips[order])
    if source.opened is not None:
        np.testing.assert_array_equal(source.opened(tmp_path)(3), clips[3])


def test_workers_live_on_and_their_time_counts(tmp_path: Path) -> None:
    source, order = OWN[0], list(range(BATCH)) * 8
    source.write(random_clips(BATCH), tmp_path)
    batches = source.batches(tmp_path, order, 1)
    assert len(list(batches)) == 8

    def epochs() -> None:
        for _ in range(20):
            assert len(list(batches)) == 8

    took = timed(epochs)
    assert took.cpu_s > 0.02, "a worker copied 1.3 GB meanwhile"


def test_the_consumer_normalises_as_the_model_wants_it() -> None:
    batch = torch.from_numpy(random_clips(BATCH))
    consume = _Consumer(converted=True)
    ready = consume._converted(torch.empty(batch.shape), batch)
    torch.testing.assert_close(ready, normalise(batch.float(), torch.zeros(CHANNELS), torch.ones(CHANNELS)))

    def short() -> Iterator[torch.Tensor]:
        yield batch[:3]

    with pytest.raises(AssertionError, match="3 clips of 4"):
        consume(short(), 4)
