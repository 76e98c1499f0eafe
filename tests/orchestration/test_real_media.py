"""The same graph over photographed videos and images, broken ones too: every file ends as a row, nothing crashes."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from nextvid.config.project import Project, open_project
from nextvid.corpus.sources import update_sources
from orchestration.sensors import apply_partitions
from storage.atomic import read_json
from storage.schemas import Clips, Media, Shots
from storage.tables import read_tables
from tests.orchestration.conftest import load_defs

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.realdata, pytest.mark.slow, pytest.mark.timeout(900)]

CORPUS = """
root: {root}
encoding: {{autoencoder: {autoencoder}, resolution: 64}}
curation: {{filters: {{motion_min: null, luma_min: null, luma_max: null, blur_min: null}}}}
datasets:
  weizmann4:
    uri: {media}/videos/weizmann4_mp4
    weight: 0.7
    clips: [{{frames: 8, fps: 4, crop: centre}}]
    labels: {{layout: csv, file: {media}/weizmann4_mp4.csv, path_base: {media}, targets: {{action: label}},
             split_column: split, group_column: group}}
  clothing10:
    uri: {media}/images/clothing10
    weight: 0.2
    clips: [{{frames: 1, crop: centre}}]
    labels: {{layout: folders}}
  assorted:
    uri: {media}/assorted
    weight: 0.1
    clips: [{{frames: 8, fps: 4, crop: random, flip: true, clips_per_shot: 2}}]
    quarantine_budget: 0.2
  broken:
    uri: {media}/broken
    quarantine_budget: 1.0
benchmarks:
  action: {{datasets: [weizmann4], target: action, policy: {{frames: 8, fps: 4, crop: centre}}, epochs: 2, batch: 8,
    seeds: 1}}
"""

STEPS = {"stages": {str(stage): {"steps": 2} for stage in range(4)}}


@pytest.fixture
def real(tmp_path: Path, real_media: Path) -> Project:
    """A project over the real media; the folders themselves are only read."""
    text = CORPUS.format(root=tmp_path / "root", media=real_media, autoencoder=REPOSITORY / "examples/demo/autoencoder")
    (tmp_path / "corpus.yaml").write_text(text)
    return open_project(tmp_path / "corpus.yaml")


def run(
    project: Project,
    instance: dg.DagsterInstance,
    name: str,
    partition: str | None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a job, or one asset, to its success; the metadata of what it materialised last."""
    defs = load_defs(project)
    if name in ("ingest", "freeze"):
        result = defs.resolve_job_def(name).execute_in_process(instance=instance, partition_key=partition)
    else:
        result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            partition_key=partition,
            asset_selection=[dg.AssetKey(name)],
            run_config={"ops": {name: {"config": config}}} if config else None,
        )
    assert result.success
    return {
        key: value.value
        for key, value in result.get_asset_materialization_events()[-1].materialization.metadata.items()
    }


def test_every_file_is_a_row_and_the_graph_ends_in_a_report(
    real: Project, real_media: Path, instance: dg.DagsterInstance
) -> None:
    update_sources(real)
    apply_partitions(instance, real)
    for batch in real.root.batches():
        run(real, instance, "ingest", batch)

    media = read_tables(real.root, "media", None, Media)
    listed = sum(path.is_file() for path in (real_media / "broken").rglob("*"))
    broken = media.filter(pl.col("dataset") == "broken")
    assert 0 < broken.height <= listed
    assert broken.filter(pl.col("status") != "ok", pl.col("reason").is_null()).is_empty()
    assert broken.filter(pl.col("status") == "quarantined").height >= 10
    assert set(media.filter(pl.col("status") == "ok")["decoder"].cast(pl.String)) == {"decord", "pyav", "pillow"}
    shots = read_tables(real.root, "shots", None, Shots)
    assert set(shots["media_id"]) == set(media.filter(pl.col("status") == "ok")["media_id"])
    clips = read_tables(real.root, "clips", None, Clips)
    assert clips.filter(pl.col("status") != "ok", pl.col("reason").is_null()).is_empty()

    run(real, instance, "freeze", None)
    run(real, instance, "mask_plan", "demo")
    trained = run(real, instance, "pretrain", "demo", {"overrides": STEPS})
    for asset in ("probes", "samples", "report"):
        report = run(real, instance, asset, "demo")
    (score,) = Path(real.root.probes("demo", trained["run"])).rglob("score.json")
    assert read_json(str(score))["trainset"] == trained["trainset"]
    assert trained["trainset"] in Path(report["page"]).read_text()
