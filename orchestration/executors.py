"""Where steps run: on this machine, as jobs of a Ray cluster, or as jobs of Kubernetes.

An environment variable chooses, since definitions are loaded before any Dagster instance is known. Where runs are
stored and launched is configured in the instance's own file (deploy/*/dagster.yaml).
"""

import os
import sys
from pathlib import Path

import dagster as dg

from assets.compute import TRAIN_ON
from storage.errors import ConfigError
from storage.remote import S3_PLACE

WHERE = "NEXTVID_STEPS"  # multiprocess | ray | kubernetes
RAY_ADDRESS = "RAY_ADDRESS"  # Ray's own variable: http://<head>:8265
# With these variables a step on another machine finds project and instance (deploy/README.md).
PASSED_ON = (
    "DAGSTER_HOME",
    "NEXTVID_CORPUS",
    "NEXTVID_PROJECT",
    "NEXTVID_COMPUTE",
    TRAIN_ON,
    "PYTHONPATH",
    "DAGSTER_POSTGRES_URL",
    "DAGSTER_COMPUTE_LOGS",
    *S3_PLACE,
)


def executor(where: str | None) -> dg.ExecutorDefinition:
    """The executor of every job: as given, else as NEXTVID_STEPS says, else processes of this machine."""
    match where or os.environ.get(WHERE, "multiprocess"):
        case "multiprocess":
            return dg.multiprocess_executor
        case "ray":
            return _ray()
        case "kubernetes":
            from dagster_k8s import k8s_job_executor

            return k8s_job_executor
        case other:
            raise ConfigError(f"{WHERE}={other}: steps run on 'multiprocess', 'ray' or 'kubernetes'")


def _ray() -> dg.ExecutorDefinition:
    """One Ray job per step, for which the tags of assets/compute.py ask; CPUs given here would replace theirs."""
    from dagster_ray import ray_executor

    address = os.environ.get(RAY_ADDRESS)
    if not address:
        raise ConfigError(f"{WHERE}=ray needs {RAY_ADDRESS}, the address of the cluster's job server: http://host:8265")
    passed = [name for name in PASSED_ON if name in os.environ]
    # a step runs `dagster api execute_step` of this environment, which has the same path on every machine
    passed.append(f"PATH={Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    found: dg.ExecutorDefinition = ray_executor.configured(
        {"ray": {"address": address, "env_vars": passed}, "retries": {"enabled": {}}}
    )
    return found
