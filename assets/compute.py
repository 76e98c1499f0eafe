"""What each step asks for: CPUs, memory and GPUs, as tags that Ray and Kubernetes read.

One machine needs no such tags: there the pools of dagster.yaml bound what runs at once.
"""

import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from nextvid.config.strict import AtLeastZero, Positive, Strict, parse
from nextvid.config.yaml_file import read_yaml
from nextvid.graph import GRAPH, Asset
from nextvid.machine import CORES
from storage.errors import ConfigError

OVERRIDES = "NEXTVID_COMPUTE"  # a YAML file such as {pretrain: {gpus: 4}}
TRAIN_ON = "NEXTVID_TRAIN_ON"  # empty: beside the step; `slurm`; else the address of a Ray cluster's job server


class Compute(Strict):
    """What one step occupies while it runs."""

    cpus: Positive = 2.0
    memory_gib: Positive = 4.0
    gpus: AtLeastZero = 0.0


_DEVICE = Compute(cpus=8, memory_gib=32, gpus=1)
# Our choice, for the recipes of the paper on nodes of eight GPUs; what is not named asks for what Compute says.
COMPUTE: Mapping[Asset, Compute] = {
    "shots": Compute(memory_gib=8),
    "latents": _DEVICE,
    "pretrain": Compute(cpus=64, memory_gib=256, gpus=8),
    "probes": _DEVICE,
    "samples": _DEVICE,
}


def compute_of(asset: Asset) -> Compute:
    """What a step of the asset asks for: COMPUTE, with the values of the file that NEXTVID_COMPUTE names.

    Raises ConfigError for an unknown asset or key in that file.
    """
    known = COMPUTE.get(asset, Compute())
    if asset in ("pretrain", "probes") and os.environ.get(TRAIN_ON):
        known = Compute()  # the step waits for a job of its own, which asks for a GPU a rank
    return parse(Compute, {**known.model_dump(), **_overrides().get(asset, {})}, f"{OVERRIDES}: {asset}")


@cache
def _overrides() -> Mapping[str, Mapping[str, Any]]:
    path = os.environ.get(OVERRIDES)
    if not path:
        return {}
    try:
        found = read_yaml(Path(path))
    except OSError as error:
        raise ConfigError(f"{OVERRIDES}={path} cannot be read: {error}") from error
    if not all(isinstance(value, dict) for value in found.values()):
        raise ConfigError(f"{OVERRIDES}={path}: expected one line an asset, such as 'pretrain: {{gpus: 4}}'")
    if unknown := sorted(set(found) - set(GRAPH)):
        raise ConfigError(f"{OVERRIDES}={path}: {unknown[0]} is no asset; known: {', '.join(GRAPH)}")
    return found


def tags(compute: Compute) -> dict[str, Any]:
    """The tags of an op by which Ray's and Kubernetes' executors ask for it."""
    cores = str(math.ceil(compute.cpus))  # neither cluster shows a step fewer cores than its node has
    ray: dict[str, Any] = {
        "num_cpus": compute.cpus,
        "num_gpus": compute.gpus,
        "memory": int(compute.memory_gib * 2**30),
    }
    ray |= {"runtime_env": {"env_vars": {CORES: cores}}}
    requests = {"cpu": f"{compute.cpus:g}", "memory": f"{int(compute.memory_gib * 1024)}Mi"}
    resources: dict[str, Any] = {"requests": requests}
    pod: dict[str, Any] = {"container_config": {"resources": resources, "env": [{"name": CORES, "value": cores}]}}
    if compute.gpus:
        resources["limits"] = {"nvidia.com/gpu": f"{compute.gpus:g}"}
    if compute.gpus > 1:  # the loader's ring and NCCL need more than the 64 MB of a container
        pod["container_config"]["volume_mounts"] = [{"name": "shm", "mount_path": "/dev/shm"}]  # noqa: S108
        pod["pod_spec_config"] = {"volumes": [{"name": "shm", "empty_dir": {"medium": "Memory"}}]}
    return {"dagster-ray/config": ray, "dagster-k8s/config": pod}
