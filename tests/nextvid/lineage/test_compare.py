"""Runs side by side: every field that differs is shown once, the rest is counted; accuracy by size."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nextvid.config.project import Project
from nextvid.lineage.compare import Difference, compare, find
from nextvid.train.run import find_run
from storage.errors import ConfigError
from storage.records import publish_record, read_record
from storage.root import RUN_CONFIG
from tests.nextvid.tiny_project import RECIPE

OTHER = "0123456789ab"


def second_run(project: Project, name: str = OTHER, **recipe: Any) -> str:
    """A copy of the run's config.json under another id, with other values."""
    folder = find_run(project, RECIPE).folder
    (folder.parent / name).mkdir()
    said = read_record(str(folder / RUN_CONFIG))
    said["recipe"] |= recipe
    said["run"] = name
    publish_record(str(folder.parent / name / RUN_CONFIG), said)
    return name


def add_score(
    project: Project, run: str, rows: str, accuracy: float, step: int = 5, digest: str | None = None, **more: Any
) -> None:
    folder = Path(project.root.probe(RECIPE, run, None, "species", digest or rows))
    folder.mkdir(parents=True)
    encoders = {"ema": {"accuracy": accuracy, "knn": 0.5}}
    said = {
        "run": run,
        "recipe": RECIPE,
        "benchmark": "species",
        "checkpoint": f"step_{step:09d}",
        "rows": rows,
        "seconds": accuracy,
        "encoders": encoders,
        **more,
    }
    (folder / "score.json").write_text(json.dumps(said))


def test_a_run_differs_from_itself_in_nothing(own_copy: Project) -> None:
    run = find_run(own_copy, RECIPE)
    found = compare(own_copy, [run.id, str(run.folder)])
    assert (found.config, found.scores) == ((), ())
    assert found.same > 50  # a recipe has more fields than this


def test_fields_that_differ_are_named_with_both_values(own_copy: Project) -> None:
    run = find_run(own_copy, RECIPE)
    masks = run.recipe.masks.model_dump(mode="json")
    other = second_run(own_copy, seed=run.recipe.seed + 1, masks={**masks, "seed": 99})
    found = compare(own_copy, [run.id, other])
    by_field = {difference.field: difference for difference in found.config}
    assert by_field["recipe.seed"] == Difference("recipe.seed", (run.recipe.seed, run.recipe.seed + 1))
    assert by_field["recipe.masks.seed"] == Difference("recipe.masks.seed", (masks["seed"], 99))
    assert "run" not in by_field
    text = found.text()
    assert "recipe.seed" in text
    assert "fields differ" in text


def test_scores_on_the_same_rows_stand_side_by_side(own_copy: Project) -> None:
    run, other = find_run(own_copy, RECIPE).id, second_run(own_copy)
    add_score(own_copy, run, "ab" * 16, 0.5)
    add_score(own_copy, other, "ab" * 16, 0.75)
    found = compare(own_copy, [run, other])
    assert found.config == ()
    assert found.scores == (Difference("species[abababababab].encoders.ema.accuracy", (0.5, 0.75)),)


def test_scores_on_other_rows_stand_against_nothing(own_copy: Project) -> None:
    run, other = find_run(own_copy, RECIPE).id, second_run(own_copy)
    add_score(own_copy, run, "ab" * 16, 0.5)
    add_score(own_copy, other, "cd" * 16, 0.5)
    found = compare(own_copy, [run, other])
    accuracies = [d.values for d in found.scores if d.field.endswith("accuracy")]
    assert accuracies == [(0.5, None), (None, 0.5)]
    assert " - " in found.text()


def test_scores_of_one_checkpoint_with_other_settings_are_all_shown(own_copy: Project) -> None:
    run, other = find_run(own_copy, RECIPE).id, second_run(own_copy)
    for name, frozen, tuned in ((run, 0.5, 0.75), (other, 0.25, None)):
        add_score(own_copy, name, "ab" * 16, frozen)
        if tuned is not None:
            add_score(own_copy, name, "ab" * 16, tuned, digest="cd" * 16, finetune={"layer_decay": 0.75})
    found = compare(own_copy, [run, other])
    accuracies = {d.field: d.values for d in found.scores if d.field.endswith("ema.accuracy")}
    assert sorted(accuracies.values()) == [(0.5, 0.25), (0.75, None)]
    assert all(field.startswith("species[abababababab, ") for field in accuracies)
    assert sorted(found.reached[0].accuracy.values()) == [0.5, 0.75]


def test_an_unknown_run_is_an_error_that_names_the_known(own_copy: Project) -> None:
    run = find_run(own_copy, RECIPE).id
    with pytest.raises(ConfigError, match=f"'nothing' is no run of .*{run}"):
        compare(own_copy, [run, "nothing"])
    assert find(own_copy, run).run == run
    shutil.rmtree(Path(own_copy.root.recipe_folder(RECIPE)))
    with pytest.raises(ConfigError, match="there are: none"):
        find(own_copy, run)


def test_several_runs_are_ordered_by_the_size_of_their_encoders(own_copy: Project) -> None:
    run = find_run(own_copy, RECIPE)
    model = run.recipe.model.model_dump(mode="json")
    wide = second_run(own_copy, "aaaaaaaaaaaa", model=model | {"encoder": model["encoder"] | {"width": 64}})
    deep = second_run(own_copy, "bbbbbbbbbbbb", model=model | {"encoder": model["encoder"] | {"depth": 2}})
    for number, name in enumerate((run.id, wide, deep)):
        add_score(own_copy, name, "ab" * 16, 0.5 + number / 10)
    add_score(own_copy, run.id, "ab" * 16, 0.1, step=2, digest="0" * 32)  # of an earlier checkpoint
    found = compare(own_copy, [wide, run.id, deep])
    assert [reached.run for reached in found.reached] == [run.id, deep, wide]
    assert [reached.accuracy["species[abababababab]"] for reached in found.reached] == [0.5, 0.7, 0.6]
    assert found.reached[0].clips == sum(stage.steps * stage.batch for stage in run.recipe.stages)
    widths = next(d for d in found.config if d.field == "recipe.model.encoder.width")
    assert widths.values == (64, 32, 32)
    with pytest.raises(ConfigError, match="two runs or more"):
        compare(own_copy, [run.id])
