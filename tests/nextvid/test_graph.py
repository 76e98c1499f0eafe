"""The graph: its order, its makers, Dagster's view of it and the README's table."""

import contextvars
import re
from pathlib import Path
from typing import get_args

import pytest

from nextvid.graph import BY_BATCH, GRAPH, NON_BLOCKING, Asset, chain, maker, readme_table


def test_every_asset_is_there_once_and_follows_what_it_reads() -> None:
    assert set(GRAPH) == set(get_args(Asset))
    order = list(GRAPH)
    for asset, node in GRAPH.items():
        assert all(order.index(upstream) < order.index(asset) for upstream in node.reads)


@pytest.mark.parametrize("asset", GRAPH)
def test_a_chain_is_the_asset_and_its_ancestors_in_order(asset: Asset) -> None:
    found = chain(asset)
    ancestors = set(GRAPH[asset].reads).union(*(chain(upstream) for upstream in GRAPH[asset].reads))
    assert set(found) == {asset} | ancestors
    assert found == [name for name in GRAPH if name in found]


@pytest.mark.parametrize("asset", GRAPH)
def test_the_maker_has_the_name_of_its_asset(asset: Asset) -> None:
    found = maker(asset)
    assert found.__module__ == f"nextvid.{GRAPH[asset].package}.{asset}"
    assert found.__name__ == f"make_{asset}"


def test_checks_have_names_of_their_own() -> None:
    names = [name for node in GRAPH.values() for name in node.checks]
    assert len(names) == len(set(names))
    assert set(names) >= NON_BLOCKING


def test_dagster_is_told_of_the_same_graph() -> None:
    from orchestration.definitions import build_defs

    graph = contextvars.Context().run(build_defs().resolve_asset_graph)  # away from other tests' instances
    for asset, node in GRAPH.items():
        (key,) = [key for key in graph.get_all_asset_keys() if key.to_user_string() == asset]
        found = graph.get(key)
        assert {parent.to_user_string() for parent in found.parent_keys} == set(node.reads)
        assert found.group_name == node.group
        assert found.description == node.description
    assert set(BY_BATCH) == {asset for asset, node in GRAPH.items() if node.partition == "batch"} - {"sources"}


def test_the_table_of_the_readme_is_the_graph(repository: Path) -> None:
    (written,) = re.findall(
        r"<!-- assets -->\n(.*?)\n<!-- /assets -->", (repository / "README.md").read_text(), re.DOTALL
    )
    assert written.splitlines() == list(readme_table()), "run `python -m nextvid.graph` and put its table in README.md"
