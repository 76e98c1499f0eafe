"""More than one machine, on one: history in Postgres, steps on a Ray cluster of two workers; both real, both ours."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from assets.resources import TrainerResource
from examples.demo.write_corpus import write_corpus
from nextvid.config.overrides import apply_overrides, as_overrides
from nextvid.config.project import Project, open_project
from nextvid.config.recipe import ExecutionConfig
from nextvid.encode.plan import accepted_spec
from nextvid.make import Request, make
from nextvid.planning.acceptance import ensure_accepted
from nextvid.train.events import read_events
from nextvid.train.job import RUN, carry_out_on
from nextvid.train.pretrain import prepare_run
from nextvid.trainset.mask_plan import make_plan
from orchestration.definitions import build_defs
from storage import atomic, remote
from storage.errors import LostError
from storage.schemas import Shots
from storage.store import LatentStore
from storage.tables import read_table
from tests.factories import DEMO
from tests.nextvid.tiny_project import OVERRIDES
from tests.services.conftest import Live, instance_settings, live_dagster, trainset_project, wait_for
from tests.services.postgres import binaries, postgres
from tests.services.ray_cluster import RayCluster, ray_cluster
from tests.services.s3.server import forget_clients, s3_server, variables_of

POSTGRES = binaries()
BATCHES = 8
CORPUS = """
root: {root}
encoding: {{autoencoder: {autoencoder}, resolution: 64}}
execution: {{device: cpu}}
curation: {{filters: {{motion_min: null, motion_max: null, luma_min: null, luma_max: null, blur_min: null}}}}
datasets:
  films:
    uri: {films}
    weight: 1.0
    clips: [{{frames: 8, fps: 4, crop: whole, pad: skip}}]
    max_batch_videos: 1
"""

pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(POSTGRES is None, reason="Postgres is not installed: apt-get install postgresql"),
    pytest.mark.skipif(find_spec("dagster_postgres") is None, reason="the extra 'postgres' is not installed"),
    pytest.mark.skipif(find_spec("dagster_ray") is None, reason="the extra 'ray' is not installed"),
    pytest.mark.skipif(find_spec("moto") is None, reason="moto, an S3 server, is not installed"),
    pytest.mark.skipif(find_spec("aiohttp_cors") is None, reason="ray[default], its job server, is not installed"),
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a bucket; whatever is started from here on finds its server and credentials in the environment."""
    with s3_server(tmp_path_factory.mktemp("moto")) as port, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        for name, value in variables_of(f"http://127.0.0.1:{port}").items():
            patch.setenv(name, value)
        forget_clients()
        fs, _ = remote.connect("s3://films")
        fs.mkdir("films")
        yield "s3://films"
    forget_clients()


@pytest.fixture(scope="module")
def projects(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Project]:
    """Two roots over the same eight films, made up to their clips: a folder, with latents too, and a bucket."""
    folder = tmp_path_factory.mktemp("films")
    write_corpus(folder / "written", videos=2 * BATCHES, images=8)
    films = folder / "films"
    films.mkdir()
    for number, path in enumerate(sorted((folder / "written").rglob("scene_*.mp4"))[:BATCHES]):
        shutil.copy(path, films / f"{number}.mp4")
    said = CORPUS.format(root=folder / "here", films=films, autoencoder=DEMO / "autoencoder")
    (folder / "here.yaml").write_text(said)
    here = open_project(folder / "here.yaml")
    assert all(outcome.passed for outcome in make(here, Request("clips")))
    for path in (path for path in Path(here.root.url).rglob("*") if path.is_file()):
        atomic.publish_bytes(f"{bucket}/there/{path.relative_to(here.root.url)}", path.read_bytes())
    elsewhere = f"root: {bucket}/there\nruns_root: {folder / 'runs'}"
    (folder / "there.yaml").write_text(said.replace(f"root: {folder / 'here'}", elsewhere))
    there = open_project(folder / "there.yaml")
    ensure_accepted(there)
    assert all(outcome.passed for outcome in make(here, Request("latents")))
    return here, there


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[RayCluster]:
    """Its nodes have the bucket's credentials, as machines of their own would."""
    with ray_cluster(workers=2) as found:
        yield found


@pytest.fixture(scope="module")
def scaled(
    projects: tuple[Project, Project], cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    """Webserver and daemon with deploy/ray/dagster.yaml: Postgres holds the history, Ray runs the steps."""
    assert POSTGRES is not None
    compute = tmp_path_factory.mktemp("compute") / "compute.yaml"
    compute.write_text(
        "latents: {cpus: 1, memory_gib: 0.1}\nshots: {cpus: 1, memory_gib: 0.1}"
    )  # latents: one GPU, too
    variables = {
        "NEXTVID_STEPS": "ray", "RAY_ADDRESS": cluster.address, "NEXTVID_TRAIN_ON": cluster.address,
        "NEXTVID_COMPUTE": str(compute),
    }  # fmt: skip
    with (
        postgres(POSTGRES) as url,
        live_dagster(
            tmp_path_factory.mktemp("scaled"), projects[1].path, instance_settings("deploy/ray/dagster.yaml"),
            DAGSTER_POSTGRES_URL=url, DAGSTER_COMPUTE_LOGS=str(compute.parent / "logs"), **variables,
        ) as found,
    ):  # fmt: skip
        yield found


def rows(project: Project) -> pl.DataFrame:
    """Every committed row with the checksum of its bytes, wherever it stands."""
    store = LatentStore(project.root, accepted_spec(project))
    commits = pl.concat([store.commits(batch) for batch in store.batches()])
    return commits.select("row_id", "batch", "frames", "status", "crc32c").sort("batch", "row_id")


def test_an_encode_over_ray_into_a_bucket_equals_the_local_one_and_survives_a_killed_worker(
    projects: tuple[Project, Project], cluster: RayCluster, scaled: Live
) -> None:
    from ray.util.state import list_actors

    here, there = projects
    batches = there.root.batches("clips")
    assert len(batches) == BATCHES
    launched = []
    for batch in batches:
        scaled.add_batch(batch)
        said = scaled.launch("latents", batch)
        assert said["__typename"] == "LaunchRunSuccess", said
        launched.append(said["run"]["runId"])

    def steps() -> list[str]:
        """Names of the events of steps so far."""
        return [event["__typename"] for run in launched for event in scaled.events(run)]

    wait_for(lambda: "ExecutionStepStartEvent" in steps(), 400, every_s=0.5)
    cluster.kill()
    for _ in range(2):
        cluster.add()
    wait_for(lambda: {scaled.run(run)["status"] for run in launched} == {"SUCCESS"}, 600)
    assert "ExecutionStepUpForRetryEvent" in steps(), "what ran on the killed worker was tried again"
    actors = list_actors(cluster.address, detail=True)  # a job's own actor holds what the job asks for
    asked = [actor.required_resources for actor in actors if "dagster-step" in (actor.name or "")]
    # the sensor `follow` launches steps, too, and those ask for none
    assert {(found or {}).get("GPU") for found in asked} in ({1.0}, {1.0, None})
    assert rows(there).equals(rows(here))
    assert LatentStore(there.root, accepted_spec(there)).verify() == []


@pytest.mark.faults
def test_a_worker_killed_in_shots_costs_a_retry_and_no_row(
    projects: tuple[Project, Project], cluster: RayCluster, scaled: Live
) -> None:
    here, there = projects
    batches = there.root.batches("clips")[:3]
    for batch in batches:
        atomic.remove_tree(there.root.table("shots", batch))
        atomic.remove_tree(there.root.checks("shots", batch))
    runs = []
    for batch in batches:
        scaled.add_batch(batch)
        runs.append(scaled.launch("shots", batch)["run"]["runId"])

    def steps() -> list[str]:
        return [event["__typename"] for run in runs for event in scaled.events(run)]

    wait_for(lambda: "ExecutionStepStartEvent" in steps(), 400, every_s=0.2)
    cluster.kill()
    for _ in range(2):
        cluster.add()
    wait_for(lambda: {scaled.run(run)["status"] for run in runs} == {"SUCCESS"}, 600)
    assert "ExecutionStepUpForRetryEvent" in steps(), "what ran on the killed worker was tried again"
    for batch in batches:
        made, known = (read_table(project.root.table("shots", batch), Shots) for project in (there, here))
        assert made.equals(known)


def test_the_history_is_in_postgres(scaled: Live) -> None:
    home = Path(scaled.environment["DAGSTER_HOME"])
    assert not list(home.rglob("*.db"))
    assert scaled.runs()
    assert list(Path(scaled.environment["DAGSTER_COMPUTE_LOGS"]).rglob("*.err")), (
        "and the steps' logs are in one folder"
    )
    assert os.environ.get("DAGSTER_POSTGRES_URL") != scaled.environment["DAGSTER_POSTGRES_URL"]


def test_training_is_a_job_of_the_cluster_and_stops_what_trains_for_nobody(cluster: RayCluster, tmp_path: Path) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    project = trainset_project(tmp_path)
    chosen = {"stages": {str(stage): {"steps": 1} for stage in range(4)}}
    how = {"device": "cpu", "log_every_steps": 1, "diagnose_every_steps": 1, "ranks": 2, "nodes": 2}  # one a worker
    prepared = prepare_run(project, "demo", as_overrides(chosen))
    client = JobSubmissionClient(cluster.address)
    leftover = client.submit_job(entrypoint="sleep 600", metadata={RUN: prepared.title}, entrypoint_num_cpus=1)
    defs = build_defs(
        str(project.path), steps="multiprocess", resources={"trainer": TrainerResource(on=cluster.address)}
    )
    with dg.instance_for_test() as instance:
        result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            partition_key="demo",
            asset_selection=[dg.AssetKey("pretrain")],
            run_config={"ops": {"pretrain": {"config": {"overrides": chosen, "how": how}}}},
        )
        assert result.success
        logged = {record.user_message: record.timestamp for record in instance.all_logs(result.run_id)}
    assert client.get_job_status(leftover) == JobStatus.STOPPED
    jobs = [job for job in client.list_jobs() if (job.metadata or {}).get(RUN) == prepared.title]
    assert sorted(job.status for job in jobs) == [JobStatus.STOPPED, JobStatus.SUCCEEDED]
    (trained,) = [job for job in jobs if job.status == JobStatus.SUCCEEDED]
    ended_s = (trained.end_time or 0) / 1000
    steps = [at_s for line, at_s in sorted(logged.items()) if re.match(r"step \d/4 [a-z0-9]+ align", line)]
    assert len(steps) == 4, "every step is in the run's log"
    assert steps[0] < ended_s, "while the job trains"
    (made,) = result.get_asset_materialization_events()
    assert made.materialization.metadata["run"].value == prepared.run_id
    (start,) = [event for event in read_events(Path(prepared.folder)) if event["kind"] == "start"]
    assert start["ranks"] == 2


@pytest.mark.faults
def test_a_killed_worker_ends_the_job_and_any_number_of_nodes_resumes(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nextvid make pretrain --on ray`: two nodes, one of them killed; then one node; then two again, cancelled."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    project = trainset_project(tmp_path)
    changes = ["stages.warmup.steps=1000000", *(change for change in OVERRIDES if "warmup" not in change)]
    make_plan(project.root, apply_overrides(project.recipe("demo"), changes))

    def train(nodes: int, then: Callable[[], None]) -> None:
        """Train until two checkpoints were made, do this, and wait for the end."""
        saved = 0

        def shown(line: str) -> None:
            nonlocal saved
            saved += " checkpoint " in line
            if saved == 2 and " checkpoint " in line:
                then()

        how = ExecutionConfig(
            device="cpu",
            ranks=nodes,
            nodes=nodes,
            log_every_steps=1,
            diagnose_every_steps=1000,
            checkpoint_every_steps=5,
        )
        prepared = prepare_run(project, "demo", changes, how)
        carry_out_on(prepared, "ray", 10**6, shown)

    def cancel() -> None:
        raise KeyboardInterrupt

    with pytest.raises(LostError, match="asking again resumes it"):
        train(2, lambda: cluster.kill(1))
    with pytest.raises(KeyboardInterrupt):
        train(1, cancel)
    cluster.add()
    with pytest.raises(KeyboardInterrupt):
        train(2, cancel)
    (folder,) = Path(project.root.recipe_folder("demo")).iterdir()
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    starts = [event for event in lines if event["kind"] == "start"]
    assert [event["ranks"] for event in starts] == [2, 1, 2]
    assert 0 == starts[0]["step"] < starts[1]["step"] < starts[2]["step"]
