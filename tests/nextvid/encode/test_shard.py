"""One shard: batches follow from the plan alone, one is gathered while another runs, and failures keep their place."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextvid.encode import autoencoders
from nextvid.encode.autoencoders import Autoencoder, Running
from nextvid.encode.frames import DecodedRow
from nextvid.encode.shard import NOT_WANTED, EncodedShard, commit_table, encode_rows
from nextvid.encode.weights import Facts
from storage.schemas import Commits
from storage.spec import EncodingSpec
from tests.nextvid.encode.small_corpus import texture

F, SIDE = 2, 32
IDS = [bytes([n]) * 16 for n in range(7)]


@pytest.fixture
def model(random_autoencoder: Path) -> Autoencoder:
    return Autoencoder.load(random_autoencoder, frames_at_once=4)


def spec_of(model: Autoencoder, posterior: str = "mean") -> EncodingSpec:
    side = SIDE // model.stride
    return EncodingSpec(
        model.digest, SIDE, "bicubic", "fp32", posterior, "float16", model.channels, height=side, width=side
    )


def views() -> dict[bytes, DecodedRow]:
    return {row: DecodedRow(texture(n, F, SIDE), 0.25) for n, row in enumerate(IDS)}


def run(model: Autoencoder, seen: Mapping[bytes, DecodedRow], posterior: str = "mean") -> EncodedShard:
    spec = spec_of(model, posterior)
    shard = EncodedShard.empty(spec, F, IDS)
    for rows in encode_rows(model, spec, F, forwards(seen, [])):
        shard.add(rows)
    return shard


def forwards(seen: Mapping[bytes, DecodedRow], events: list[str]) -> Iterator[dict[bytes, DecodedRow]]:
    """Two rows a forward, as many as the model takes at once."""
    for first in range(0, len(IDS), 2):
        events.append("gather")
        yield {row: seen.get(row, DecodedRow(None, 0.0, NOT_WANTED)) for row in IDS[first : first + 2]}


def test_rows_are_those_of_each_row_alone(model: Autoencoder) -> None:
    seen = views()
    done = run(model, seen)
    for row, latents in zip(IDS, done.latents, strict=True):
        frames = seen[row].frames
        assert frames is not None
        np.testing.assert_allclose(latents, model.encode(frames).latents, atol=1e-5)
    assert done.good == IDS
    assert done.decode_s == [0.25] * 7
    assert all(second > 0 for second in done.encode_s)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_a_shard_encoded_again_has_the_same_bits(model: Autoencoder, posterior: str) -> None:
    one, other = run(model, views(), posterior), run(model, views(), posterior)
    np.testing.assert_array_equal(one.latents, other.latents)


def test_a_failed_row_changes_no_bit_of_another(model: Autoencoder) -> None:
    """Its place in the batch is kept, so that a shard finished later, when a file is gone, has the same other rows."""
    whole, seen = run(model, views()), views()
    seen[IDS[2]] = DecodedRow(None, 0.5, "corrupt")
    del seen[IDS[5]]
    done = run(model, seen)
    assert done.reasons == [None, None, "corrupt", None, None, NOT_WANTED, None]
    left = [0, 1, 3, 4, 6]
    np.testing.assert_array_equal(done.latents[left], whole.latents[left])
    assert np.isnan(done.latents[[2, 5]]).all()
    assert done.posterior_std[2] is None
    table = commit_table(done, list(range(7)), {IDS[0]: 30.0})
    assert table["status"].to_list() == ["ok", "ok", "quarantined", "ok", "ok", "rejected", "ok"]
    Commits.validate(table.with_columns(crc32c=0), cast=True)


def test_the_next_forward_is_gathered_while_one_runs(model: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    start, result = Autoencoder.start, Running.result

    def starting(self: Autoencoder, clips: list[np.ndarray], *rest: np.ndarray | None) -> Running:
        events.append(f"start {len(clips)}")
        return start(self, clips, *rest)

    def resulting(self: Running) -> object:
        events.append("result")
        return result(self)

    monkeypatch.setattr(Autoencoder, "start", starting)
    monkeypatch.setattr(Running, "result", resulting)
    done = [rows.row_ids for rows in encode_rows(model, spec_of(model), F, forwards(views(), events))]
    assert done == [IDS[:2], IDS[2:4], IDS[4:6], IDS[6:]]
    assert events[:6] == ["gather", "start 2", "gather", "start 2", "result", "gather"]
    assert events[6:] == ["start 2", "result", "gather", "start 1", "result", "result"]


class TestMemory:
    """A device without memory for a batch: half of it from then on, told once, the same rows."""

    @pytest.fixture
    def small(self, model: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> Autoencoder:
        """An encoder whose device holds one frame at a time."""
        posterior = autoencoders.posterior

        def limited(
            model: object, about: Facts, pixels: torch.Tensor, frames: int
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            if len(pixels) > 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return posterior(model, about, pixels, frames)

        monkeypatch.setattr(autoencoders, "posterior", limited)
        return model

    def test_batch_halves_until_it_fits_and_the_rows_are_the_same(
        self, small: Autoencoder, random_autoencoder: Path
    ) -> None:
        notes: list[int] = []
        small.when_halved = notes.append
        done = run(small, views())
        assert notes == [2, 1]
        assert done.good == IDS
        alone = Autoencoder.load(random_autoencoder, frames_at_once=1)
        for row, latents in zip(IDS, done.latents, strict=True):
            frames = views()[row].frames
            assert frames is not None
            np.testing.assert_array_equal(latents, alone.encode(frames).latents)

    def test_decoding_halves_too(self, model: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
        frames = texture(0, 4, SIDE)
        latents = model.encode(frames).latents
        wanted = model.decode(latents)
        rebuilt = autoencoders.rebuilt

        def limited(network: Any, about: Facts, values: torch.Tensor, frames: int) -> torch.Tensor:
            if len(values) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return rebuilt(network, about, values, frames)

        monkeypatch.setattr(autoencoders, "rebuilt", limited)
        assert np.abs(model.decode(latents).astype(int) - wanted).max() <= 1
        assert model.frames_at_once == 2

    def test_a_frame_that_does_not_fit_is_one_clear_error(
        self, model: Autoencoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(autoencoders, "posterior", full)
        with pytest.raises(ValueError, match=r"one frame does not fit.*encoding\.resolution"):
            run(model, views())
