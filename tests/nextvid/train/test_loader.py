"""Batches are the drawn rows and masks, whatever the ranks, threads and place of resumption."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.config.stages import draws_before, stage_at
from nextvid.model.tokens import space_to_depth, tube_ids
from nextvid.train.distributed import Ranks
from nextvid.train.loader import READ_AHEAD, Batch, Loader
from nextvid.train.rows import Latents, Rows, Staged
from nextvid.trainset.mask_plan import grid_of, open_mask_plan
from nextvid.trainset.order import Drawn, Masks, Order, in_every_tubelet
from nextvid.trainset.trainset import Trainset
from storage import atomic
from storage.draws import Draws, mask_entry
from storage.errors import ConfigError, DamagedError, RefusedError
from storage.reader import RowReader, read_row, row_id
from storage.store import LatentStore
from storage.withdrawn import record_withdrawal
from tests.nextvid.train.corpus import BATCHES, WEIGHTS, loading, make_project, tiny_spec
from tests.nextvid.train.tiny import Keep, latents_of, tiny_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("loader"))


def _batches(project: Project, recipe: RecipeConfig, first: int = 0, rank: int = 0, ranks: int = 1) -> list[Batch]:
    with loading(project, recipe, Ranks(rank, ranks, CPU)) as loader:
        return list(loader.batches(first))


def _same(a: Batch, b: Batch) -> bool:
    ids = all(torch.equal(x, y) for x, y in zip(a.visible, b.visible, strict=True))
    return (a.step, a.draws) == (b.step, b.draws) and torch.equal(latents_of(a), latents_of(b)) and ids


def test_latents_are_the_drawn_rows_read_by_zarr(project: Project) -> None:
    """The slow way: draw by draw, each row through zarr, normalised in float64."""
    recipe, trainset = tiny_recipe(), Trainset.open(project.root)
    store = LatentStore(project.root, trainset.spec)
    images = 0
    for batch in _batches(project, recipe):
        frames = recipe.stages[stage_at(recipe.stages, batch.step)[0]].frames
        draws = Draws(recipe.seed, WEIGHTS, {"films": {4: 9, 8: 5}[frames], "pictures": 7})
        for number, latents in zip(batch.draws, latents_of(batch), strict=True):
            dataset, row = draws.at(number)
            length = 1 if draws.datasets[dataset] == "pictures" else frames
            address = trainset.rows(length)[row]
            stored = read_row(store, BATCHES[address["batch"]], length, int(address["part"]), int(address["slot"]))
            wanted = (stored.astype(np.float64) - trainset.mean[:, None, None]) / trainset.std[:, None, None]
            images += length == 1
            assert latents.shape[0] == frames
            np.testing.assert_allclose(latents.numpy(), np.broadcast_to(wanted, latents.shape), atol=1e-5)
    assert images > 3  # repeated over time, as the broadcast above demands


def test_trap_17_drawn_latents_have_mean_0_and_deviation_1_by_channel(project: Project) -> None:
    drawn = torch.cat([latents_of(batch).transpose(1, 2).flatten(2) for batch in _batches(project, tiny_recipe())[:6]])
    assert drawn.mean((0, 2)).tolist() == pytest.approx([0.0] * 4, abs=0.1)
    assert drawn.std((0, 2)).tolist() == pytest.approx([1.0] * 4, abs=0.1)


def test_trap_25_neighbouring_clips_and_ranks_see_different_cells(project: Project) -> None:
    recipe = tiny_recipe()
    shares = [_batches(project, recipe, rank=rank, ranks=2)[:3] for rank in range(2)]
    for index in range(2):
        rows = [tuple(ids.tolist()) for share in shares for batch in share for ids in batch.visible[index]]
        assert len(set(rows)) > 0.8 * len(rows)


def test_visible_ids_are_the_plans_entries(project: Project) -> None:
    recipe = tiny_recipe()
    plan = open_mask_plan(project.root, recipe.masks, (4, 4))
    for batch in _batches(project, recipe):
        tubelets = latents_of(batch).shape[1] // 2
        for index, strategy in enumerate(recipe.masks.strategies):
            for number, ids in zip(batch.draws, batch.visible[index].tolist(), strict=True):
                cells = np.flatnonzero(plan.kept[strategy.name][mask_entry(recipe.seed, index, number, 256)])
                assert ids == [16 * tubelet + cell for tubelet in range(tubelets) for cell in cells]


@pytest.mark.parametrize("keep", ["fixed", "bucket", "flat", "all"])
@pytest.mark.parametrize("ranks", [2])
def test_trap_25_ranks_share_each_batch_in_order(project: Project, keep: Keep, ranks: int) -> None:
    recipe = tiny_recipe(keep=keep)
    alone = _batches(project, recipe)
    shares = [_batches(project, recipe, rank=rank, ranks=ranks) for rank in range(ranks)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert whole.draws == tuple(number for part in parts for number in part.draws)
        assert torch.equal(latents_of(whole), torch.cat([latents_of(part) for part in parts]))
        for index, ids in enumerate(whole.visible):
            assert torch.equal(ids, torch.cat([part.visible[index] for part in parts]))


@pytest.mark.parametrize("keep", ["bucket", "flat", "all"])
def test_other_ways_of_thinning(project: Project, keep: Keep) -> None:
    recipe = tiny_recipe(keep=keep)
    for batch in _batches(project, recipe):
        tubelets = latents_of(batch).shape[1] // 2
        assert len(batch.visible) == (1 if keep == "all" else 2)
        for ids in batch.visible:
            assert ids.dtype == torch.int64
            assert (ids.diff(dim=1) > 0).all()
            assert int(ids.max()) < 16 * tubelets
            if keep == "all":
                assert ids.shape[1] == 16 * tubelets
            if keep == "bucket":
                assert ids.shape[1] % (8 * tubelets) == 0


@pytest.fixture(scope="module")
def everything(project: Project) -> list[Batch]:
    return _batches(project, tiny_recipe())


@pytest.mark.parametrize("first", range(13))  # 3, 6, 9: borders of stages; 12: after the last
def test_trap_25_resuming_at_any_step_goes_on_with_the_same_batches(
    project: Project, everything: list[Batch], first: int
) -> None:
    resumed = _batches(project, tiny_recipe(), first)
    assert len(resumed) == 12 - first
    assert all(_same(a, b) for a, b in zip(everything[first:], resumed, strict=True))


def test_trap_25_resuming_where_a_pass_over_a_dataset_ends(project: Project) -> None:
    """All nine films were drawn equally often, and the next pass takes them in another order."""
    recipe = tiny_recipe(steps=(40, 1, 1, 1))
    everything = _batches(project, recipe)
    drawn = Order(Trainset.open(project.root), recipe).drawn(4, 0, 160)
    films = np.cumsum(np.array(drawn.names)[drawn.datasets] == "films")[3::4]  # after each step of four clips
    ends = [step + 1 for step, count in enumerate(films.tolist()) if count % 9 == 0]
    assert len(ends) >= 2
    for first in ends:
        resumed = _batches(project, recipe, first)
        assert all(_same(a, b) for a, b in zip(everything[first:], resumed, strict=True))


@dataclass
class _Noted:
    """Rows that only note what is asked of them, by the step of their first draw."""

    notes: list[tuple[str, int]] = field(default_factory=list)

    def will_need(self, drawn: Drawn) -> None:
        self.notes.append(("hint", drawn.first // 4))

    def memory(self, clips: int, frames: int) -> None:
        pass

    def fill(self, drawn: Drawn, memory: None) -> None:
        self.notes.append(("fill", drawn.first // 4))

    def deliver(self, drawn: Drawn, memory: None) -> torch.Tensor:
        self.notes.append(("deliver", drawn.first // 4))
        return torch.empty(4, 0)


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_rows_are_hinted_four_batches_before_they_are_filled(project: Project, threads: int) -> None:
    recipe, rows = tiny_recipe(steps=(12, 1, 1, 1)), _Noted()
    plan = open_mask_plan(project.root, recipe.masks, grid_of(recipe.model))
    order = Order(Trainset.open(project.root), recipe)
    loader = Loader(recipe, order, Masks(recipe, plan), {"latents": cast("Rows", rows)}, Ranks(0, 1, CPU))
    assert len(list(loader.batches(0, threads))) == 15
    for step in range(8):
        filled = rows.notes.index(("fill", step))
        assert rows.notes.index(("hint", step)) < filled
        if threads < 2:  # else the two may overtake each other
            assert ("hint", step + READ_AHEAD) in rows.notes[:filled]


def test_draw_numbers_run_on_across_stages(project: Project) -> None:
    recipe = tiny_recipe()
    numbers = [number for batch in _batches(project, recipe) for number in batch.draws]
    assert numbers == list(range(draws_before(recipe.stages, recipe.steps)))


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("first", [0, 5])
def test_threads_change_nothing(project: Project, threads: int, first: int) -> None:
    with loading(project, tiny_recipe()) as loader:
        one, other = list(loader.batches(first, 1)), list(loader.batches(first, threads))
    assert len(one) == len(other) == 12 - first
    assert all(_same(a, b) for a, b in zip(one, other, strict=True))


def of_96_clips() -> RecipeConfig:
    """Batches of 96 clips, one a stage."""
    recipe = tiny_recipe()
    stages = tuple(stage.model_copy(update={"batch": 96, "steps": 1}) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})


@pytest.fixture(scope="module")
def whole(project: Project) -> list[Batch]:
    """Those batches, as one rank reads them."""
    return _batches(project, of_96_clips())


@pytest.mark.parametrize(("ranks", "firsts"), [(1, (0, 2)), (2, (0, 2)), (3, (0, 2)), (8, (0, 2)), (96, (2,))])
def test_ranks_change_nothing(project: Project, whole: list[Batch], ranks: int, firsts: tuple[int, ...]) -> None:
    """Each rank's share in the place that its number says; and after a resumption as well."""
    recipe = of_96_clips()
    for first in firsts:
        shares = [_batches(project, recipe, first, rank, ranks) for rank in range(ranks)]
        for batch, *parts in zip(whole[first:], *shares, strict=True):
            assert batch.draws == tuple(number for part in parts for number in part.draws)
            assert torch.equal(latents_of(batch), torch.cat([latents_of(part) for part in parts]))
            for index, ids in enumerate(batch.visible):
                assert torch.equal(ids, torch.cat([part.visible[index] for part in parts]))


@pytest.mark.parametrize("stored", [("float16", "frame"), ("int8", "frame"), ("int8", "causal4")])
@pytest.mark.parametrize("fold", [1, 2])
def test_what_a_device_makes_is_what_the_threads_make(tmp_path: Path, fold: int, stored: tuple[str, str]) -> None:
    """The way through the pinned ring, here on the CPU, and that in host memory end with the same batches."""
    spec = replace(tiny_spec() if fold == 1 else tiny_spec(height=8, channels=1), storage=stored[0], time_map=stored[1])
    project, recipe = make_project(tmp_path, spec=spec), tiny_recipe()
    trainset = Trainset.open(project.root)
    wanted = _batches(project, recipe)
    plan = open_mask_plan(project.root, recipe.masks, grid_of(recipe.model))
    reader = RowReader(project.root, trainset.spec, trainset.batches)
    staged = Staged(Latents(reader, trainset, fold, CPU), 16, READ_AHEAD + 1, CPU)
    loader = Loader(recipe, Order(trainset, recipe), Masks(recipe, plan), {"latents": staged}, Ranks(0, 1, CPU))
    for threads in (0, 1, 3):
        found = list(loader.batches(0, threads))
        assert all(_same(a, b) for a, b in zip(wanted, found, strict=True))
    assert torch.equal(latents_of(loader.clips(range(7))), torch.cat([latents_of(b) for b in wanted[:2]])[:7])


def test_the_trainers_threads_stay_as_they_are(project: Project) -> None:
    before = torch.get_num_threads()
    with loading(project, tiny_recipe()) as loader:
        for _ in loader.batches(0, 2):
            assert torch.get_num_threads() == before


def test_a_batch_that_is_kept_is_not_overwritten(project: Project) -> None:
    recipe = tiny_recipe(steps=(12, 1, 1, 1))
    with loading(project, recipe) as loader:
        kept: list[Batch] = []
        copies: list[torch.Tensor] = []
        for batch in loader.batches(0):
            kept.append(batch)
            copies.append(latents_of(batch).clone())
    assert all(torch.equal(latents_of(batch), copy) for batch, copy in zip(kept, copies, strict=True))


def test_memory_of_batches_that_were_let_go_is_used_again(project: Project) -> None:
    recipe = tiny_recipe(steps=(30, 1, 1, 1))
    with loading(project, recipe) as loader:
        addresses = [latents_of(batch).data_ptr() for batch in loader.batches(0)]
    assert len(set(addresses)) <= READ_AHEAD + 2


def test_an_abandoned_iteration_ends_its_threads(project: Project) -> None:
    with loading(project, tiny_recipe()) as loader:
        batches = loader.batches(0)
        next(batches)
        batches.close()


def test_micro_batches_are_the_batch(project: Project) -> None:
    batch = _batches(project, tiny_recipe())[0]
    parts = batch.split(2)
    assert [part.draws for part in parts] == [(0, 1), (2, 3)]
    assert torch.equal(torch.cat([latents_of(part) for part in parts]), latents_of(batch))
    with pytest.raises(ConfigError, match="does not divide"):
        batch.split(3)


def test_store_of_half_the_stride_is_folded(tmp_path: Path) -> None:
    """Latents of 8 x 8 cells and one channel become 4 x 4 cells of four channels."""
    project = make_project(tmp_path, spec=tiny_spec(height=8, channels=1))
    recipe, trainset = tiny_recipe(), Trainset.open(project.root)
    batch = _batches(project, recipe)[0]
    drawn = Order(trainset, recipe).drawn(4, 0, 4)
    store = LatentStore(project.root, trainset.spec)
    address, frames = drawn.addresses[0], int(drawn.frames[0])
    stored = read_row(store, BATCHES[address["batch"]], frames, int(address["part"]), int(address["slot"]))
    plain = torch.from_numpy(stored.astype(np.float32))[None].expand(1, 4 if frames == 1 else -1, -1, -1, -1)
    torch.testing.assert_close(latents_of(batch)[:1], space_to_depth(plain, 2))


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        ((4, 5), {}, "wants 4 channels on a grid of 4 x 4, and the latents are 5 channels"),
        ((6, 4), {}, "the latents are 4 channels of 6 x 6"),
        ((4, 4), {"stages.cooldown.frames": 16}, "no clips of 16 frames"),
        ((4, 4), {"stages.cooldown.batch": 3}, "batch 3 is not divisible by 2 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, spec: tuple[int, int], change: dict[str, int], message: str
) -> None:
    project = make_project(tmp_path, spec=tiny_spec(*spec))
    recipe = tiny_recipe()
    for key, value in change.items():
        last = recipe.stages[-1].model_copy(update={key.rsplit(".", 1)[1]: value})
        recipe = recipe.model_copy(update={"stages": (*recipe.stages[:-1], last)})
    with pytest.raises(RefusedError, match=message):
        _batches(project, recipe, ranks=2)


def test_a_withdrawn_row_refuses_the_trainset(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    trainset = Trainset.open(project.root)
    record_withdrawal(project.root, "e" * 32, [b"\0" * 16, b"\xff" * 16])
    _batches(project, tiny_recipe())  # rows of others
    for frames in (1, 4, 8):
        for row in (0, -1):
            withdrawn = row_id(trainset.rows(frames)[row])
            record_withdrawal(project.root, "f" * 32, [withdrawn])
            with pytest.raises(RefusedError, match=withdrawn.hex()):
                _batches(project, tiny_recipe())
            atomic.remove_tree(f"{project.root.withdrawn()}/{'f' * 32}.json")


def test_a_changed_byte_of_a_drawn_row_is_an_error(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    trainset = Trainset.open(project.root)
    part = LatentStore(project.root, trainset.spec).part(BATCHES[0], 4, 0)
    path = Path(part.shard_path(0))
    data = bytearray(path.read_bytes())
    for slot in range(9):
        data[slot * trainset.spec.row_bytes(4)] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError):
        _batches(project, tiny_recipe())


def test_tubes_in_numpy_are_the_models(project: Project) -> None:
    cells = np.sort(np.random.default_rng(0).permuted(np.tile(np.arange(16), (5, 1)), axis=1)[:, :6], axis=1)
    assert np.array_equal(in_every_tubelet(cells, 3, 16), tube_ids(torch.from_numpy(cells), 3, 16).numpy())


def test_clips_of_the_diagnostics_do_not_depend_on_ranks(project: Project) -> None:
    with loading(project, tiny_recipe()) as alone, loading(project, tiny_recipe(), Ranks(1, 2, CPU)) as second:
        assert torch.equal(latents_of(alone.clips(range(48))), latents_of(second.clips(range(48))))


def test_each_frame_takes_the_latent_that_covers_it(tmp_path: Path) -> None:
    """Rows of an autoencoder over time, Cosmos's: of 4 frames the first has its own latent, the others share one."""
    made = make_project(tmp_path, spec=replace(tiny_spec(), time_map="causal4"))
    recipe = tiny_recipe()
    videos = 0
    for batch in _batches(made, recipe)[:3]:
        for clip in latents_of(batch):
            assert torch.equal(clip[1:], clip[1:2].expand_as(clip[1:]))
            videos += int(not torch.equal(clip[0], clip[1]))
    assert 0 < videos < 12  # of images every frame is the same
