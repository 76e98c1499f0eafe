"""What steps ask Ray and Kubernetes for: one table, changed in one file."""

import contextvars
import json
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon
from dagster._utils.tags import TagConcurrencyLimitsCounter

from assets import compute
from assets.compute import OVERRIDES, TRAIN_ON, Compute, compute_of, tags
from nextvid.graph import GRAPH
from orchestration.definitions import build_defs
from orchestration.jobs import ingest
from storage.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The file of overrides is read once a process."""
    compute._overrides.cache_clear()
    yield
    compute._overrides.cache_clear()


def override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "compute.yaml").write_text(text)
    monkeypatch.setenv(OVERRIDES, str(tmp_path / "compute.yaml"))


def test_every_executable_asset_asks_for_what_the_table_says() -> None:
    graph = contextvars.Context().run(build_defs().resolve_asset_graph)  # tests/orchestration/conftest.py says why
    ops = [node.op for node in graph.assets_defs if node.is_executable and node.op]
    tagged = {op.name: op.tags for op in ops if op.name != "sources"}  # the sensor reports it, no step runs
    assert set(tagged) == set(GRAPH) - {"sources"}
    asked = {name: (found["dagster-ray/config"], found["dagster-k8s/config"]) for name, found in tagged.items()}
    given = {"runtime_env": {"env_vars": {"NEXTVID_CORES": "8"}}}
    assert json.loads(asked["latents"][0]) == {"num_cpus": 8, "num_gpus": 1, "memory": 32 * 2**30} | given
    pod = json.loads(asked["latents"][1])["container_config"]
    assert pod["env"] == [{"name": "NEXTVID_CORES", "value": "8"}]
    resources = json.loads(asked["pretrain"][1])["container_config"]["resources"]
    assert resources == {"requests": {"cpu": "64", "memory": "262144Mi"}, "limits": {"nvidia.com/gpu": "8"}}
    assert json.loads(asked["clips"][0])["num_gpus"] == 0
    assert "limits" not in json.loads(asked["clips"][1])["container_config"]["resources"]


def test_a_file_changes_single_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override(tmp_path, monkeypatch, "pretrain: {gpus: 4}\nclips: {cpus: 1}")
    assert compute_of("pretrain") == Compute(cpus=64, memory_gib=256, gpus=4)
    assert compute_of("clips") == Compute(cpus=1)
    assert compute_of("latents").gpus == 1


def test_a_step_whose_training_is_a_job_of_ray_holds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would keep the GPUs that its job waits for."""
    monkeypatch.setenv(TRAIN_ON, "http://head:8265")
    assert compute_of("pretrain") == Compute()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrain: {gpu: 4}", "did you mean 'gpus'"),
        ("pretrian: {gpus: 4}", "pretrian is no asset"),
        ("pretrain: {gpus: -1}", "greater than or equal to 0"),
        ("pretrain: 4", "expected one line an asset"),
        ("- 4", "expected keys such as"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    override(tmp_path, monkeypatch, text)
    with pytest.raises(ConfigError, match=message):
        compute_of("pretrain")


def test_a_missing_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDES, "/nowhere.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        compute_of("clips")


def test_a_gpu_needs_no_limit_where_none_is_asked_for() -> None:
    assert "pod_spec_config" not in tags(Compute(gpus=1))["dagster-k8s/config"]
    assert "pod_spec_config" in tags(Compute(gpus=2))["dagster-k8s/config"]


def queued(tags: dict[str, str]) -> dg.DagsterRun:
    return dg.DagsterRun(job_name="a", tags=tags)


def test_a_training_behind_fifty_batches_starts_next() -> None:
    """By the queue's own order, and by its count of the limits in each instance file."""
    batches = [queued({str(key): str(value) for key, value in (ingest.tags or {}).items()}) for _ in range(50)]
    training = queued({})
    ordered = QueuedRunCoordinatorDaemon._priority_sort(None, [*batches, training])  # type: ignore[arg-type]
    assert ordered[0] is training
    for name in ("dagster.yaml", "deploy/postgres/dagster.yaml", "deploy/ray/dagster.yaml"):  # as Kubernetes' values
        runs = yaml.safe_load((REPOSITORY / name).read_text())["concurrency"]["runs"]
        (limit,) = runs["tag_concurrency_limits"]
        assert limit["limit"] < runs["max_concurrent_runs"]
        counter = TagConcurrencyLimitsCounter([limit], batches[: limit["limit"]])
        assert counter.is_blocked(batches[-1])
        assert not counter.is_blocked(training)
