"""Declare an asset to Dagster: nextvid/graph.py says what it is, storage/schemas.py what its columns are."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import dagster as dg
import dataframely as dy

from assets.compute import compute_of, tags
from nextvid.config.corpus import corpus_path, encoder_names
from nextvid.config.recipes import RECIPES, own_recipes
from nextvid.graph import GRAPH, NON_BLOCKING, Asset
from storage import schemas

# In the order of storage/schemas.py: a column is described where its name first occurs.
TABLES: tuple[type[dy.Schema], ...] = (
    schemas.Sources, schemas.Media, schemas.Labels, schemas.Shots, schemas.Clips, schemas.Plan, schemas.Commits,
    schemas.Duplicates, schemas.Lineage,
)  # fmt: skip
# Two projects that share a Dagster instance each set NEXTVID_PROJECT; it begins names of partitions and keys of runs.
PREFIX = f"{os.environ['NEXTVID_PROJECT']}_" if os.environ.get("NEXTVID_PROJECT") else ""
BATCHES = dg.DynamicPartitionsDefinition(name=f"{PREFIX}batch")  # kept equal to the batches of sources/
# A recipe or encoder that is added is a partition once the definitions are reloaded. Encoders of corpus.yaml are among
# them since a job has one kind of partitions; of an encoder only `probes` is made, and the others say so.
RECIPE = dg.StaticPartitionsDefinition(
    list(dict.fromkeys((*RECIPES, *own_recipes(corpus_path()), *encoder_names(corpus_path()))))
)
OWNERS = ["team:nextvid"]
CRASHES = dg.RetryPolicy(max_retries=2, delay=1)  # of a step whose process died; as many as run_retries (dagster.yaml)


def asset(
    name: Asset,
    *,
    schema: type[dy.Schema] | None = None,
    **for_dagster: Any,  # noqa: ANN401 - what dg.asset takes
) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """`dg.asset` for an asset of the graph: what its file adds is for Dagster alone."""
    return dg.asset(
        name=name,
        **described(name, schema),
        check_specs=check_specs(name),
        owners=OWNERS,
        retry_policy=CRASHES,
        code_version=str(GRAPH[name].version),
        op_tags=tags(compute_of(name)),
        **for_dagster,
    )


def described(name: Asset, schema: type[dy.Schema] | None = None) -> dict[str, Any]:
    """What every kind of asset definition takes: group, upstream, partitions, description and columns."""
    of_one = GRAPH[name].partition not in ("none", "batch")  # which reads all batches; else Dagster's mapping is right
    every = {upstream for upstream in GRAPH[name].reads if of_one and GRAPH[upstream].partition == "batch"}
    return {
        "group_name": GRAPH[name].group,
        "deps": [
            dg.AssetDep(upstream, partition_mapping=dg.AllPartitionMapping() if upstream in every else None)
            for upstream in GRAPH[name].reads
        ],
        "partitions_def": _partitions(name),
        "description": GRAPH[name].description,
        "metadata": columns(schema) if schema else {},
    }


def check_specs(name: Asset) -> list[dg.AssetCheckSpec]:
    """The checks of an asset, which its maker reports by these names; each partition has a status of its own."""
    with warnings.catch_warnings(action="ignore", category=dg.PreviewWarning):  # of partitions_def (dagster 1.13.27)
        return [
            dg.AssetCheckSpec(
                name=check,
                asset=name,
                description=text,
                blocking=check not in NON_BLOCKING,
                partitions_def=_partitions(name),
            )
            for check, text in GRAPH[name].checks.items()
        ]


def _partitions(name: Asset) -> dg.PartitionsDefinition[Any] | None:
    match GRAPH[name].partition:
        case "none":
            return None
        case "batch":
            return BATCHES
        case "recipe":
            return RECIPE


def columns(schema: type[dy.Schema]) -> dict[str, Any]:
    """The column schema of a table, as the UI's Columns tab shows it."""
    meanings: dict[str, str] = {}
    for table in TABLES:
        meanings = {name: found.description for name, found in table.columns().items() if found.description} | meanings
    described = [
        dg.TableColumn(
            name=name,
            type=str(column.dtype),
            description=meanings[name],
            constraints=dg.TableColumnConstraints(nullable=column.nullable, unique=False),
        )
        for name, column in schema.columns().items()
    ]
    return {"dagster/column_schema": dg.TableSchema(columns=described)}


def follows(nightly: str | None = None) -> dg.AutomationCondition:  # type: ignore[type-arg]
    """Request the asset whenever something upstream, or the maker, is new; a missing or running batch does not matter.

    `dg.AutomationCondition.eager()` would forget an update where the asset itself was requested or made since the same
    tick. Here only a request clears what waits, and none that came before the update: at worst the asset is made once
    more and finds nothing to do. `all_deps_blocking_checks_passed` does not fit: check status is not by partition, so
    one stopped batch would stop the corpus. With `nightly`, a cron line, the asset is requested at that time too.
    """
    updated = (
        dg.AutomationCondition.newly_missing()
        | dg.AutomationCondition.any_deps_updated()
        | dg.AutomationCondition.code_version_changed()  # at the first tick of a release that raised it
    )
    handled = dg.AutomationCondition.newly_requested() & ~updated  # a request is of the tick before: updates came after
    asked: dg.AutomationCondition[Any] = updated.since(handled | dg.AutomationCondition.initial_evaluation())
    if nightly:
        asked = asked | dg.AutomationCondition.cron_tick_passed(nightly)
    return (asked & ~dg.AutomationCondition.in_progress()).with_label("follows")
