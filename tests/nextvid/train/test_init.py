"""A run starts from another's checkpoint or an exported encoder; what does not fit is refused by name."""

import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from nextvid.config.overrides import apply_overrides
from nextvid.config.project import Project
from nextvid.config.recipe import InitConfig, RecipeConfig
from nextvid.config.recipes import recipe
from nextvid.config.strict import parse
from nextvid.lineage.trace import trace
from nextvid.train import checkpoint
from nextvid.train.init import find_source, refuse_other_shapes, start_from
from nextvid.train.loop import train
from nextvid.train.pretrain import prepare_run
from nextvid.train.run import Run, Source, open_run
from nextvid.train.step import Trained, build
from nextvid.trainset.mask_plan import make_plan
from nextvid.trainset.trainset import Trainset
from storage.errors import ConfigError, RefusedError, UpstreamError
from tests.nextvid.train.corpus import begin, make_project, tiny_spec, write_trainset
from tests.nextvid.train.tiny import ALONE, HOW, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "tiny_by_name")
SHORT = tiny_recipe(steps=(1, 1, 1, 1))
COOLDOWN_ONLY = ("stages.warmup=null", "stages.stable1=null", "stages.stable2=null")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Run]:
    """A project and a complete run of it."""
    project = make_project(tmp_path_factory.mktemp("source"))
    make_plan(project.root, tiny_recipe())
    run = begin(project, SHORT)
    train(project, run, ALONE)
    return project, run


def started(project: Project, *overrides: str) -> Run:
    """A run prepared with changes of the tiny recipe."""
    return open_run(Path(prepare_run(project, "tiny", overrides, HOW).folder))


def at_start(run: Run) -> Trained:
    """Model and reference of a run before its first step."""
    trained = build(run.recipe, ALONE)
    assert run.source is not None
    start_from(run.source, trained)
    return trained


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], prefix: str = "") -> bool:
    return all(torch.equal(value, expected[prefix + name]) for name, value in found.items())


def test_absent_it_is_in_no_digest() -> None:
    config = recipe("demo")
    assert "init" in config.model_dump()
    assert config.digest() == "f4a830e6e093cfba875ddda8d753d59b"
    changed = apply_overrides(config, ["init.run=0123456789ab"])
    assert changed.init == InitConfig(run="0123456789ab")
    assert changed.digest() != config.digest()


def test_the_cooldown_alone_goes_on_from_a_step(source: tuple[Project, Run]) -> None:
    project, run = source
    cooled = started(project, f"init.run={run.id}", "init.step=3", "init.reference=average", *COOLDOWN_ONLY)
    assert [stage.name for stage in cooled.recipe.stages] == ["cooldown"]
    before = checkpoint.path_at(run.checkpoints, 3)
    assert cooled.source == Source(str(before), run.id, 3, None)
    trained = at_start(cooled)
    assert same(trained.model.state_dict(), checkpoint.load_tensors(before / "model.safetensors"))
    assert same(trained.reference.state_dict(), checkpoint.load_tensors(before / "ema.safetensors"))
    train(project, cooled, ALONE)
    assert cooled.complete
    assert trace(project, cooled.id).sources == trace(project, run.id).runs
    assert [facts.run for facts in trace(project, run.id).started] == [cooled.id]
    assert f"source   recipe={run.recipe.name}  run={run.id}" in trace(project, cooled.id).text()
    again = started(project, f"init.run={run.id}", "init.step=3", "init.reference=average", *COOLDOWN_ONLY)
    assert again.id == cooled.id


def test_training_goes_on_over_a_grown_trainset(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    make_plan(project.root, tiny_recipe())
    run = begin(project, SHORT)
    train(project, run, ALONE)
    grown = write_trainset(project.root, tiny_spec(), seed=1)
    assert Trainset.open(project.root).digest == grown != run.trainset
    longer = started(project, f"init.run={run.id}", "seed=1", "stages.warmup=null")
    assert (longer.trainset, longer.recipe.stages[0].name) == (grown, "stable1")
    trained = at_start(longer)
    ended = checkpoint.load_tensors(checkpoint.path_at(run.checkpoints, 4) / "model.safetensors")
    assert same(trained.model.state_dict(), ended)
    assert same(trained.reference.state_dict(), ended, "encoder.")  # a copy of the encoder that training begins with


def test_an_exported_encoder_gives_the_encoder_alone(source: tuple[Project, Run], tmp_path: Path) -> None:
    project, run = source
    one = started(project, f"init.encoder={run.folder / 'encoder'}")
    trained, fresh = at_start(one), build(one.recipe, ALONE)
    average = checkpoint.load_tensors(checkpoint.path_at(run.checkpoints, 4) / "ema.safetensors")
    assert same(trained.model.encoder.state_dict(), average)
    assert same(trained.reference.state_dict(), average)
    assert trained.model.decoder is not None
    assert fresh.model.decoder is not None
    assert same(trained.model.decoder.state_dict(), fresh.model.decoder.state_dict())
    assert one.source is not None
    assert one.source.digest is not None
    other = started(project, f"init.encoder={run.folder / 'encoder_online'}")
    assert len({one.id, other.id, started(project).id}) == 3


def test_a_checkpoint_by_its_folder_and_some_parts(source: tuple[Project, Run]) -> None:
    project, run = source
    path = checkpoint.path_at(run.checkpoints, 4)
    one = started(project, f"init.checkpoint={path}", 'init.parts=["predictor"]')
    assert one.source is not None
    assert (one.source.run, one.source.step) == (run.id, 4)
    trained, fresh = at_start(one), build(one.recipe, ALONE)
    assert same(trained.model.encoder.state_dict(), fresh.model.encoder.state_dict())
    assert same(trained.reference.state_dict(), fresh.model.encoder.state_dict())
    assert trained.model.predictor is not None
    stored = checkpoint.load_tensors(path / "model.safetensors")
    assert same(trained.model.predictor.state_dict(), stored, "predictor.")


def test_what_several_ranks_wrote_is_read_whole(source: tuple[Project, Run], tmp_path: Path) -> None:
    _, run = source
    trained = build(run.recipe, ALONE)
    staged = tmp_path / "step_000000004"
    staged.mkdir()
    tensors = checkpoint.tensors_of(trained.model, trained.reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about no_dist
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(staged), save_distributed=True), no_dist=True)
    checkpoint.describe(staged, run.identity, checkpoint.Progress(4, 0))
    for part, module in (("model", trained.model), ("ema", trained.reference)):
        assert same(checkpoint.weights(staged, part), module.state_dict())  # type: ignore[arg-type]
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        assert checkpoint.weight_shapes(staged, part) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.grid_height=2", "model.grid_width=8"), r"model.grid_height is 4 there and 2 here"),
        (
            ("model.encoder.width=32",),
            r"model.encoder.width is 24 there and 32 here; encoder.embed.weight is \[24, 8\]",
        ),
        (("model.encoder.heads=4",), r"model.encoder.heads is 2 there and 4 here"),
    ],
)
def test_another_model_is_refused_by_name(source: tuple[Project, Run], changes: tuple[str, ...], message: str) -> None:
    project, run = source
    config = apply_overrides(tiny_recipe(), (*changes, f"init.run={run.id}"))
    found = find_source(project, config)
    assert found is not None
    with pytest.raises(RefusedError, match=message) as refused:
        refuse_other_shapes(found, config)
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_named(source: tuple[Project, Run], tmp_path: Path) -> None:
    project, run = source
    for overrides, message in (
        (("init.run=0123456789ab",), "there is no run 0123456789ab"),
        ((f"init.run={run.id}", "init.step=99"), "has those of steps 1, 2, 3, 4"),
        ((f"init.encoder={tmp_path}",), "is no exported encoder"),
        ((f"init.checkpoint={tmp_path}",), "is no complete checkpoint"),
    ):
        with pytest.raises(UpstreamError, match=message):
            prepare_run(project, "tiny", overrides, HOW)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({}, "name one of run, checkpoint and encoder"),
        ({"run": "0123456789ab", "encoder": "here"}, "name one of"),
        ({"encoder": "here", "step": 3}, "step is of a run"),
        ({"encoder": "here", "reference": "average"}, "needs a run or checkpoint"),
        ({"rum": "0123456789ab"}, "did you mean 'run'"),
    ],
)
def test_a_wrong_block_is_explained(init: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(RecipeConfig, tiny_recipe().model_dump() | {"init": init}, "there")
