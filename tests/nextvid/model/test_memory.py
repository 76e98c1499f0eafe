"""Memory of a rank against the live bytes of a step on fake tensors, and the micro-batches that follow from it."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nextvid.config.ablations import ABLATIONS
from nextvid.config.recipe import ExecutionConfig, RecipeConfig, StageConfig
from nextvid.config.recipes import recipe
from nextvid.model.encoder import Encoder, input_width
from nextvid.model.flow import FlowDraws
from nextvid.model.memory import CARDS_GB, GB, rank_memory, remedies
from nextvid.model.nextvid import NExTVid
from nextvid.model.reference import reference_features
from nextvid.model.tokens import tube_ids
from nextvid.train.step import carry_out
from tests.nextvid.model.tiny import key

DEPTH = 2  # blocks a part that are traced: the formulas are linear in depth
CLIPS = 2
PLAIN = ExecutionConfig()


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._held: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], _types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._held:
                self._held.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return found

    def _gone(self, storage: int, size: int) -> None:
        self._held.discard(storage)
        self.now -= size


def shallow(config: RecipeConfig) -> RecipeConfig:
    """The same widths, grid, masks and stages with DEPTH blocks a part."""
    parts = {
        name: part.model_copy(update={"depth": DEPTH})
        for name, part in (("encoder", config.model.encoder), ("predictor", config.model.predictor))
    }
    decoder = config.model.decoder.model_copy(update={"depth": DEPTH})
    return config.model_copy(update={"model": config.model.model_copy(update={**parts, "decoder": decoder})})


def live_bytes(config: RecipeConfig, stage: StageConfig, how: ExecutionConfig) -> int:
    """The most bytes alive while the gradients of CLIPS clips are computed, weights and reference included."""
    model = config.model
    tubelets, cells = stage.frames // model.tubelet, model.cells
    with FakeTensorMode(), Live() as live:
        online, reference = NExTVid(config), Encoder(model).requires_grad_(False)
        carry_out(online, reference, how, torch.device("cpu"))
        tokens = torch.empty(CLIPS, tubelets * cells, input_width(model))
        targets = torch.empty(CLIPS, tubelets, cells, model.target_channels)
        ids = [
            tube_ids(torch.zeros(CLIPS, each.budget, dtype=torch.int64), tubelets, cells)
            for each in config.masks.strategies
        ]
        with torch.autocast("cpu", torch.bfloat16):
            y = reference_features(reference, tokens, target_norm=True)
        for only in range(len(ids)):
            with torch.autocast("cpu", torch.bfloat16):
                losses = online(tokens, targets, y, ids, key(CLIPS), stage.tau_copies, only, how.fold_copies)
            losses.total.backward()
            del losses
    return live.most


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")  # by torch's own __repr__
@pytest.mark.parametrize(
    ("name", "stage", "how"),
    [
        ("nextvid_l", 0, PLAIN),
        ("nextvid_h", 0, PLAIN),
        ("nextvid_g", 0, PLAIN),
        ("nextvid_s", 0, PLAIN),
        ("nextvid_l", 3, PLAIN),  # 64 frames
        ("nextvid_l", 0, ExecutionConfig(fold_copies=True)),
        ("nextvid_l", 0, ExecutionConfig(recompute_blocks=True)),
    ],
)
def test_memory_is_what_a_step_holds(
    name: str, stage: int, how: ExecutionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shapes_only(_: object, strategy: int, copies: range, shape: tuple[int, int, int], *rest: object) -> FlowDraws:
        return FlowDraws(torch.empty(len(copies), CLIPS, shape[0]), torch.empty(len(copies), CLIPS, *shape))

    monkeypatch.setattr("nextvid.model.nextvid.draw_flow", shapes_only)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda weight, **_: weight)  # it looks at values
    config = shallow(recipe(name))
    found = rank_memory(config, config.stages[stage], how)
    unseen = found.moments + found.batch  # no optimiser and no loader is here
    assert found.total(CLIPS) - unseen == pytest.approx(live_bytes(config, config.stages[stage], how), rel=0.15)


def test_the_weights_state_is_fp32() -> None:
    config = recipe("nextvid_l")
    found = rank_memory(config, config.stages[0], PLAIN)
    trained, encoder = 303.9e6 + 22.1e6 + 32.9e6, 303.9e6
    assert found.weights == found.gradients == found.moments // 2 == pytest.approx(4 * trained, rel=1e-3)
    assert found.average == pytest.approx(4 * encoder, rel=1e-3)
    assert found.copies == found.weights // 2
    cut = rank_memory(config, config.stages[0], ExecutionConfig(shard=True, ranks=8))
    assert (cut.weights, cut.moments, cut.average) == (found.weights // 8, found.moments // 8, found.average // 8)
    assert rank_memory(config, config.stages[0], ExecutionConfig(device="cpu")).copies == 0  # fp32 there


@pytest.mark.parametrize("name", ["nextvid_s_latent", "nextvid_b_latent", *ABLATIONS])
@pytest.mark.parametrize("device", [24 * GB, 80 * GB])
def test_one_gpu_recipes_fit_by_themselves(name: str, device: int) -> None:
    config = recipe(name)
    for stage in config.stages:
        for ranks in (1, 4):
            found = rank_memory(config, stage, ExecutionConfig(ranks=ranks))
            clips = found.micro_batch(device)
            assert clips >= 1
            assert found.share % clips == 0
            assert found.total(clips) < device
            assert found.total(2 * clips) > 0.4 * device or clips == found.share  # not far below what would fit


def test_switches_are_named_where_a_clip_does_not_fit() -> None:
    config = recipe("nextvid_g")
    for size in CARDS_GB:
        for stage in config.stages:
            if rank_memory(config, stage, PLAIN).micro_batch(size * GB) == 0:
                changes = next(remedies(config, stage, PLAIN, size * GB))
                assert rank_memory(config, stage, PLAIN.model_copy(update=changes)).micro_batch(size * GB) > 0
    assert not list(remedies(config, config.stages[0], PLAIN, 4 * GB))


@pytest.mark.parametrize("keep", ["bucket", "flat"])
def test_drawn_counts_of_cells_are_weighed_at_their_most(keep: str) -> None:
    config = recipe("nextvid_l")
    drawn = config.model_copy(update={"masks": config.masks.model_copy(update={"keep": keep})})
    assert rank_memory(drawn, drawn.stages[0], PLAIN).clip > rank_memory(config, config.stages[0], PLAIN).clip
