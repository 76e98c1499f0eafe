"""The report end to end on a tiny run: what it needs, what it shows, and that it is written once."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nextvid.config.project import Project
from nextvid.config.stages import draws_before
from nextvid.evaluate.samples import make_samples
from nextvid.report import scores
from nextvid.report.page import Picture, Table
from nextvid.report.report import build_card, gather, make_report
from nextvid.report.scores import Score
from nextvid.train.run import find_run
from storage.errors import UpstreamError
from storage.records import publish_record, read_record
from tests.nextvid.tiny_project import RECIPE, probe


@pytest.fixture(scope="module")
def scored(evaluated: Project) -> Project:
    probe(evaluated, RECIPE)
    make_samples(evaluated, RECIPE)
    return evaluated


def test_the_page_is_written_once(scored: Project) -> None:
    first, again = make_report(scored, RECIPE), make_report(scored, RECIPE)
    assert not again.made
    assert first.digest == again.digest
    page = Path(str(first.numbers["page"]))
    text = page.read_text()
    run = find_run(scored, RECIPE)
    for digest in (run.id, run.trainset, run.mask_plan):
        assert digest in text
    figures = [path.name for path in (page.parent / "figures").iterdir()]
    assert text.count('src="data:image/png;base64,') == len(figures)
    assert {"curves.png", "masked.png", "tsne_species.png", "dense_species.png", "attention_species.png"} <= set(
        figures
    )
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)  # in a megabyte of base64 any four letters may stand
    assert "http" not in words.replace("http-equiv", "")


def test_every_source_is_there(scored: Project) -> None:
    """Every number has a source: each file that the report names exists."""
    card = build_card(gather(scored, find_run(scored, RECIPE)))
    assert len(card.sources()) > 8
    absent = [path for path in card.sources() if not Path(path).exists()]
    assert [Path(path).name for path in absent] == ["shots"]  # this project has no shots
    for section in card.sections:
        assert any(block.sources for block in section.blocks), section.title


def test_the_demo_names_the_page_of_its_study(scored: Project) -> None:
    run = find_run(scored, RECIPE)
    assert "docs/demo.md" in build_card(gather(scored, run)).subtitle
    other = replace(run, recipe=run.recipe.model_copy(update={"name": "another"}))
    assert "docs/demo.md" not in build_card(replace(gather(scored, run), run=other, samples=None)).subtitle


def test_numbers_are_those_of_the_files(scored: Project) -> None:
    gathered = gather(scored, find_run(scored, RECIPE))
    found = gathered.scores[0].record["encoders"]["ema"]
    table = scores.table(gathered.scores[0])
    assert table.rows[0][1] == f"{found['accuracy']:.3f} ± {found['standard_error']:.3f}".replace("0.", ".")
    assert table.rows[2][2] == ""
    assert table.caption.endswith("Heads learn from stored views, whose features are read once.")
    shares = {share.name: share for share in gathered.data.shares}
    assert (shares["pets"].files, shares["stills"].rows) == (20, 6)


def test_missing_scores_and_samples_are_named(own_copy: Project) -> None:
    with pytest.raises(UpstreamError, match="no scores on species: make 'probes' first"):
        make_report(own_copy, RECIPE)
    probe(own_copy, RECIPE)
    with pytest.raises(UpstreamError, match=r"samples\.json"):
        make_report(own_copy, RECIPE)


def test_a_changed_score_makes_another_report(scored: Project, own_copy: Project) -> None:
    probe(own_copy, RECIPE)
    make_samples(own_copy, RECIPE)
    first = make_report(own_copy, RECIPE)
    path = Path(gather(own_copy, find_run(own_copy, RECIPE)).scores[0].path)
    record = read_record(str(path))
    record["encoders"]["ema"]["accuracy"] = 0.25
    publish_record(str(path), record)
    second = make_report(own_copy, RECIPE)
    assert second.made
    assert second.digest != first.digest


def score(ema: float, random: float, error: float) -> Score:
    entry = {"standard_error": error, "by_seed": [0.0], "rate": 1e-3, "knn": 0.1, "knn_standard_error": 0.01}
    encoders = {"ema": {"accuracy": ema, **entry}, "random": {"accuracy": random, **entry}}
    return Score({"benchmark": "motion", "encoders": encoders}, "/score.json", {})


def test_a_gain_is_claimed_beyond_two_standard_errors_only() -> None:
    clear, unclear = scores.headline(score(0.783, 0.659, 0.014)), scores.headline(score(0.431, 0.411, 0.0155))
    assert ".783 against .659" in clear
    assert "+12.4 points, 6.3 standard errors" in clear
    assert "within two standard errors (4.4)" in unclear
    assert "−12.4" in scores.headline(score(0.659, 0.783, 0.014))
    assert "limit" not in clear


def test_a_score_on_a_part_of_the_benchmark_says_so_in_headline_and_table(scored: Project) -> None:
    whole = gather(scored, find_run(scored, RECIPE)).scores[0]
    part = replace(whole, record={**whole.record, "limit": 1000})
    words = "at most 1,000 shots of each split (`limit`), "
    assert f"{whole.benchmark}: on {words}the frozen EMA encoder reaches " in scores.headline(part)
    assert f": {words}" in scores.table(part).caption
    assert "limit" not in scores.headline(whole) + scores.table(whole).caption


def test_scores_of_earlier_checkpoints_become_a_curve_over_clips(scored: Project, own_copy: Project) -> None:
    run = find_run(own_copy, RECIPE)
    folder = Path(own_copy.root.probes(RECIPE, run.id))
    shutil.copytree(scored.root.probes(RECIPE, run.id), folder)
    shutil.copytree(scored.root.samples(RECIPE, run.id), own_copy.root.samples(RECIPE, run.id))
    last = next(folder.rglob("score.json"))
    before = gather(own_copy, run)
    assert before.history == {}
    for number, (step, changes) in enumerate(
        [(2, {}), (1, {"rows": "of other rows"})]
    ):  # written later, of earlier steps
        record = read_record(str(last)) | {"checkpoint": f"step_{step:09d}"} | changes
        other = shutil.copytree(last.parent, last.parents[1] / f"{number:032d}")
        publish_record(str(other / "score.json"), record)
    found = gather(own_copy, run)
    assert found.scores[0].path == before.scores[0].path, "the last checkpoint's is the score"
    clips = [draws_before(run.recipe.stages, step) for step in (2, 5)]
    assert [seen for seen, _ in found.history["species"]] == clips
    card = build_card(found)
    names = [block.name for block in card.sections[0].blocks if isinstance(block, Picture)]
    assert names == ["scores_over_clips", "tsne_species"]


def test_encoders_of_others_are_in_the_same_table(scored: Project) -> None:
    gathered = gather(scored, find_run(scored, RECIPE))
    score = gathered.scores[0]
    numbers = score.record["encoders"]["ema"] | {"accuracy": 0.75}

    def other(name: str, **changes: object) -> Score:
        record = {**score.record, "recipe": name, "family": "vit_mae", "encoders": {name: numbers}, **changes}
        return Score(record, f"/{name}/score.json", {})

    found = scores.table(score, [other("control"), other("elsewhere", tested="others", clips={"test": 7})])
    assert [row[0] for row in found.rows[3:]] == ["control (vit_mae)", "elsewhere (vit_mae), on 7 other test clips"]
    gain = scores.points(0.75 - score.record["encoders"]["random"]["accuracy"])
    assert [row[2].split(" ")[0] for row in found.rows[2:]] == ["", gain, ""]
    assert found.sources == (score.path, "/control/score.json", "/elsewhere/score.json")
    assert found.rows[0][7] == f"{numbers['rate']:g} and {numbers['weight_decay']:g}"
    protocol = {"protocol": "diving48", "levels": 4, "cut_from": "file", "judged": "file", "train_views": "one"}
    told = scores.table(replace(score, record={**score.record, **protocol})).caption
    words = "segments of whole files, one answer a file, heads learn from one view of a clip."
    assert f"Protocol diving48, 4 levels of the encoder, {words}" in told
    assert "rotocol" not in found.caption
    assert found.head[4:7] == ("k-NN, mean of all tokens", "k-NN, by time", "k-NN, changes")
    assert found.rows[0][6].startswith(f"{numbers['knn_by_change']:.3f}".removeprefix("0"))
    assert found.rows[0][5].startswith(f"{numbers['knn_by_time']:.3f}".removeprefix("0"))


def test_fine_tuned_encoders_stand_beside_frozen_ones(scored: Project) -> None:
    """In the table of a frozen benchmark with the same answers, and in one of their own."""
    frozen = gather(scored, find_run(scored, RECIPE)).scores[0]
    numbers = {key: frozen.record["encoders"]["ema"][key] for key in ("standard_error", "rate", "weight_decay")}
    tuned = {name: numbers | {"accuracy": 0.875, "by_seed": [0.875]} for name in ("ema", "random")}
    changes = {"benchmark": "tuned", "protocol": "finetune", "finetune": {}, "encoders": tuned, "seeds": [0]}
    other = Score({**frozen.record, **changes}, "/tuned/score.json", frozen.features)
    elsewhere = Score({**other.record, "tested": "others"}, "/elsewhere/score.json", frozen.features)
    blocks = scores.section([frozen, other, elsewhere], {}, {}).blocks
    tables = [block for block in blocks if isinstance(block, Table)]
    names = [*scores.NAMES.values()]
    assert [row[0] for row in tables[0].rows] == [
        *names, "EMA encoder, fine-tuned (tuned)", "random initialisation, fine-tuned (tuned)"
    ]  # fmt: skip
    assert [row[1].split(" ")[0] for row in tables[0].rows[3:]] == [".875", ".875"]
    assert tables[0].rows[3][2] == tables[0].rows[4][2] != ""
    assert tables[0].sources == (frozen.path, other.path)
    assert [row[0] for row in tables[1].rows] == [names[0], names[2]]
    assert tables[1].head[1] == "fine-tuned"
    assert tables[1].caption.endswith("Protocol finetune. The encoder and its head learn from stored views.")
    assert "the fine-tuned EMA encoder reaches .875" in scores.headline(other)
