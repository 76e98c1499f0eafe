"""Where steps run: on this machine, as jobs of a Ray cluster, or as jobs of Kubernetes.

Chosen by one variable of the deployment, since definitions are loaded before any instance is known; the instance's own
file (deploy/*/dagster.yaml) says where runs are kept and launched. Holds no addresses beyond those variables.
"""

import os
import sys
from pathlib import Path

import dagster as dg

from storage.errors import ConfigError
from storage.remote import S3_PLACE

WHERE = "NEXTVID_STEPS"  # multiprocess | ray | kubernetes
RAY_ADDRESS = "RAY_ADDRESS"  # Ray's own variable: http://<head>:8265
# What a step on another machine has to know to find project and instance (deploy/README.md).
TRAIN_ON = "NEXTVID_TRAIN_ON"  # empty: beside the step; else the address of a Ray cluster's job server
PASSED_ON = ("DAGSTER_HOME", "NEXTVID_CORPUS", "PYTHONPATH", "DAGSTER_POSTGRES_URL", *S3_PLACE)


def executor(where: str | None = None) -> dg.ExecutorDefinition:
    """The executor of every job; as named, else by the variable NEXTVID_STEPS, else this machine's processes."""
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
    """One Ray job a step, of one CPU unless the asset's tag `dagster-ray/config` asks for other things."""
    from dagster_ray import ray_executor

    address = os.environ.get(RAY_ADDRESS)
    if not address:
        raise ConfigError(f"{WHERE}=ray needs {RAY_ADDRESS}, the address of the cluster's job server: http://host:8265")
    passed = [name for name in PASSED_ON if name in os.environ]
    # a step is `dagster api execute_step`: the one of this environment, which stands at the same path everywhere
    passed.append(f"PATH={Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    found: dg.ExecutorDefinition = ray_executor.configured(
        {"ray": {"address": address, "num_cpus": 1.0, "env_vars": passed}, "retries": {"enabled": {}}}
    )
    return found
