"""The files of deploy/: each instance file is one that Dagster accepts, the Kubernetes ones fit what will read them.

No cluster here runs them. The chart's values are held against the names that Dagster's chart 1.13 gives them (a short
list, below), and everything that ends in a pod against dagster-k8s' own configuration and the models of the Kubernetes
API that the client package carries.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.instance.config import dagster_instance_config

pytest.importorskip("dagster_k8s", reason="the extra 'kubernetes' is not installed")

import kubernetes.client
from dagster._config import process_config
from dagster_k8s.job import UserDefinedDagsterK8sConfig
from dagster_k8s.launcher import K8sRunLauncher

from assets.compute import compute_of, tags
from nextvid.config.overrides import apply_how
from nextvid.config.recipe import ExecutionConfig
from nextvid.graph import GRAPH

pytestmark = pytest.mark.services

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART: dict[str, set[str]] = {  # helm/dagster/values.yaml and its charts/dagster-user-deployments/values.yaml
    "": {
        "dagster-user-deployments", "computeLogManager", "dagsterWebserver", "concurrency", "runLauncher",
        "dagsterDaemon", "telemetry", "postgresql", "global",
    },
    "computeLogManager": {"type", "config"},
    "computeLogManager.config": {"customComputeLogManager"},
    "dagsterWebserver": {"volumes", "volumeMounts"},
    "concurrency": {"enabled", "runs", "pools"},
    "concurrency.runs": {"maxConcurrentRuns", "tagConcurrencyLimits"},
    "concurrency.pools": {"defaultLimit", "granularity"},
    "telemetry": {"enabled"},
    "dagster-user-deployments.deployments": {
        "name", "image", "dagsterApiGrpcArgs", "port", "env", "envSecrets", "volumes", "volumeMounts",
        "includeConfigInLaunchedRuns",
    },
    "runLauncher": {"type", "config"},
    "dagsterDaemon": {"enabled", "runCoordinator", "runMonitoring", "runRetries"},
    "dagsterDaemon.runMonitoring": {"enabled", "startTimeoutSeconds", "maxResumeRunAttempts", "pollIntervalSeconds"},
    "dagsterDaemon.runRetries": {"enabled", "maxRetries", "retryOnAssetOrOpFailure"},
    "postgresql": {"enabled", "postgresqlHost", "postgresqlUsername", "postgresqlDatabase", "service"},
    "global": {"postgresqlSecretName"},
}  # fmt: skip


def read(path: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / path).read_text())
    return found


def at(values: Mapping[str, Any], dotted: str) -> Any:
    for name in filter(None, dotted.split(".")):
        values = values[name]
    return values


def snake(name: str) -> str:
    """`containerConfig` as `container_config`: the chart writes the one, dagster-k8s reads the other."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def snaked(values: Mapping[str, Any]) -> dict[str, Any]:
    return {snake(key): value for key, value in values.items()}


@pytest.mark.parametrize("name", ["postgres", "ray"])
def test_dagster_accepts_the_instance_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql+psycopg2://nobody@localhost/nothing")
    (tmp_path / "dagster.yaml").write_text((DEPLOY / name / "dagster.yaml").read_text())
    monkeypatch.setenv("DAGSTER_COMPUTE_LOGS", str(tmp_path))
    config, _ = dagster_instance_config(str(tmp_path))  # raises where a key is unknown or of another type
    assert "postgres" in config["storage"]
    assert config["run_retries"] == {"enabled": True, "max_retries": 2, "retry_on_asset_or_op_failure": False}
    assert config["run_monitoring"]["enabled"]
    assert config["concurrency"]["pools"]["granularity"] == "op"
    assert config["compute_logs"] == instance_logs({"env": "DAGSTER_COMPUTE_LOGS"})


def instance_logs(folder: object) -> dict[str, Any]:
    """The part `compute_logs` of an instance whose steps write to this folder."""
    module = "dagster._core.storage.local_compute_log_manager"
    return {"module": module, "class": "LocalComputeLogManager", "config": {"base_dir": folder}}


def test_kubernetes_has_the_same_pools_limits_and_logs() -> None:
    chart, ray = read("kubernetes/values.yaml"), read("ray/dagster.yaml")
    written = {"runs": snaked(chart["concurrency"]["runs"]), "pools": snaked(chart["concurrency"]["pools"])}
    assert written == ray["concurrency"]
    logs = chart["computeLogManager"]["config"]["customComputeLogManager"]
    assert logs == instance_logs("/data/dagster/compute_logs")
    (mount,) = chart["dagsterWebserver"]["volumeMounts"]
    assert mount["mountPath"] == "/data"
    assert [volume["name"] for volume in chart["dagsterWebserver"]["volumes"]] == [mount["name"]]


@pytest.mark.parametrize("place", sorted(CHART))
def test_the_chart_knows_every_value(place: str) -> None:
    found = at(read("kubernetes/values.yaml"), place)
    for values in found if isinstance(found, list) else [found]:
        assert set(values) <= CHART[place]


def test_the_run_launcher_accepts_its_part() -> None:
    said = read("kubernetes/values.yaml")["runLauncher"]["config"]["k8sRunLauncher"]
    launcher = snaked({key: value for key, value in said.items() if key != "runK8sConfig"})
    pod = snaked(said["runK8sConfig"])
    filled = {"service_account_name": "dagster", "instance_config_map": "dagster", "postgres_password_secret": "pg"}
    config = {**launcher, **filled, "dagster_home": "/opt/dagster/dagster_home", "run_k8s_config": pod}
    schema = dg.Shape(K8sRunLauncher.config_type())
    found = process_config(schema, config)
    assert found.success, found.errors
    UserDefinedDagsterK8sConfig.from_dict(pod)  # raises on what the Kubernetes API does not know


def test_the_executor_accepts_what_steps_ask_for() -> None:
    for asset in GRAPH:
        UserDefinedDagsterK8sConfig.from_dict(tags(compute_of(asset))["dagster-k8s/config"])
    wrong: dict[str, Any] = {"container_config": {"resource": {}}}
    with pytest.raises(Exception, match="resource"):
        UserDefinedDagsterK8sConfig.from_dict(wrong)


def test_volumes_and_variables_of_the_code_server_are_kubernetes_own() -> None:
    (server,) = read("kubernetes/values.yaml")["dagster-user-deployments"]["deployments"]
    volumes = [snaked(volume) for volume in server["volumes"]]
    config = {
        "pod_spec_config": {"volumes": server["volumes"]},
        "container_config": {"volume_mounts": server["volumeMounts"], "env": server["env"]},
    }
    UserDefinedDagsterK8sConfig.from_dict(config)
    assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in volumes}
    assert {variable["name"] for variable in server["env"]} == {"NEXTVID_STEPS", "NEXTVID_CORPUS"}


MODELS = {"Service": "V1Service", "Job": "V1Job"}


def unknown(value: Any, model: str, path: str) -> list[str]:
    """Fields that the model of the Kubernetes API does not have, or of another type than it says."""
    if wrapped := re.fullmatch(r"(list\[|dict[\[(]str, )(.*)[\])]", model):
        if not isinstance(value, list if model.startswith("list") else dict):
            return [f"{path} is no {model}"]
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return [error for key, item in inside for error in unknown(item, wrapped[2], f"{path}.{key}")]
    if model in (plain := {"str": str, "int": int, "bool": bool, "object": object}):
        return [] if isinstance(value, plain[model]) else [f"{path} is no {model}"]
    found = getattr(kubernetes.client, model)
    names = {name: field for field, name in found.attribute_map.items()}
    if not isinstance(value, dict):
        return [f"{path} is no {model}"]
    wrong = [f"{path}.{name} is unknown" for name in value if name not in names]
    given = {names[name]: item for name, item in value.items() if name in names}
    found(**given)  # raises where a field that must be there is not
    return wrong + [
        error for field, item in given.items() for error in unknown(item, found.openapi_types[field], f"{path}.{field}")
    ]


def test_the_training_job_is_as_the_kubernetes_api_has_it() -> None:
    service, job = yaml.safe_load_all((DEPLOY / "kubernetes" / "pretrain.yaml").read_text())
    assert [error for one in (service, job) for error in unknown(one, MODELS[one["kind"]], one["kind"])] == []
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    how = apply_how(ExecutionConfig(), container["args"][1:])
    assert container["args"][0] == "--how"
    assert how.nodes == spec["completions"] == spec["parallelism"]
    assert str(how.ranks // how.nodes) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert how.rendezvous == f"{job['metadata']['name']}-0.{pod['subdomain']}:29400"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    pod["containers"][0]["ports"] = [{"containerPort": "29400", "host": 1}]
    ports = "Job.spec.template.spec.containers.0.ports.0"
    assert unknown(job, "V1Job", "Job") == [f"{ports}.host is unknown", f"{ports}.container_port is no int"]


def test_the_image_is_built_from_what_there_is() -> None:
    lines = (DEPLOY / "kubernetes" / "Containerfile").read_text().splitlines()
    assert next(line for line in lines if line.startswith("FROM")) == "FROM python:3.11-slim"
    assert "USER nextvid" in lines, "no step runs as root"
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    (extras,) = [line.split('".[')[1].split(']"')[0] for line in lines if '".[' in line]
    assert all(f"\n{extra} = [" in project for extra in extras.split(","))
