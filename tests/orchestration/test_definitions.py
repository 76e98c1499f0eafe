"""The Definitions: what they hold, that they load without torch, and that checks are those the makers report."""

import ast
import contextvars
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import dagster as dg
from dagster._core.definitions.freshness import TimeWindowFreshnessPolicy

from nextvid.graph import GRAPH
from orchestration.definitions import build_defs

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "definitions.json"


def snapshot(defs: dg.Definitions) -> dict[str, object]:
    """Everything a user of the UI would miss if it went: keys, groups, upstream, partitions, checks, jobs."""
    graph = defs.resolve_asset_graph()
    assets = {}
    for key in sorted(graph.get_all_asset_keys(), key=lambda k: k.to_user_string()):
        node = graph.get(key)
        assets[key.to_user_string()] = {
            "group": node.group_name,
            "version": node.code_version,
            "upstream": sorted(parent.to_user_string() for parent in node.parent_keys),
            "partitions": type(node.partitions_def).__name__ if node.partitions_def else None,
            "checks": sorted(check.name for check in node.check_keys),
            "kinds": sorted(node.kinds),
            "described": bool(node.description),
            "owners": sorted(node.owners),
            "stale_after_h": stale_after_h(node.freshness_policy_or_from_metadata),
        }
    repository = defs.get_repository_def()
    return {
        "assets": assets,
        "jobs": sorted(job for job in repository.job_names if not job.startswith("__")),
        "sensors": sorted(sensor.name for sensor in repository.sensor_defs),
        "schedules": sorted(schedule.name for schedule in repository.schedule_defs),
    }


def stale_after_h(policy: dg.FreshnessPolicy | None) -> float | None:
    """Hours after which the UI calls an asset stale."""
    return (
        policy.fail_window.to_timedelta() / timedelta(hours=1)
        if isinstance(policy, TimeWindowFreshnessPolicy)
        else None
    )


def test_definitions_are_as_pinned() -> None:
    found = contextvars.Context().run(snapshot, build_defs())  # conftest.load_defs says why
    assert found == json.loads(GOLDEN.read_text()), (
        f"if this is meant, write {GOLDEN.name} anew and say why in the CHANGELOG"
    )


def test_loading_definitions_leaves_torch_unloaded() -> None:
    heavy = "torch", "diffusers", "transformers", "decord", "sklearn", "matplotlib"
    code = f"import orchestration.definitions, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_definitions_load_in_under_two_seconds() -> None:
    """Of CPU time, so that a busy machine does not turn this red; 2 s is our aim."""
    code = (
        "import time; began = time.process_time(); import orchestration.definitions as d; d.defs.get_repository_def(); "
    )
    command = [sys.executable, "-c", code + "print(time.process_time() - began)"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.0


def test_makers_report_the_checks_of_the_graph() -> None:
    """A check that Dagster waits for and no maker reports would fail every step of its asset."""
    reported = set()
    for path in (REPOSITORY / "nextvid").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            match call:
                case ast.Call(func=ast.Name("Check"), args=[ast.Constant(str(name)), *_]):
                    reported.add(name)
    assert reported == {name for node in GRAPH.values() for name in node.checks}


def test_every_step_that_computes_waits_in_a_pool() -> None:
    pools = {
        key.to_user_string(): definition.op.pool
        for definition in contextvars.Context().run(build_defs().resolve_asset_graph).assets_defs
        if definition.is_executable
        for key in definition.keys
        if definition.op
    }
    assert {name: pool for name, pool in pools.items() if pool} == {
        "media": "decode", "shots": "decode", "latents": "gpu",
        "pretrain": "gpu", "probes": "gpu", "samples": "gpu",
    }  # fmt: skip
