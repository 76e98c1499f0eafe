"""Assets as Dagster is told of them: columns with descriptions, and the condition under which automation follows."""

import dagster as dg
import pytest

from assets.declare import TABLES, columns, follows
from storage import schemas


def test_a_schema_becomes_the_columns_tab() -> None:
    schema = columns(schemas.Media)["dagster/column_schema"]
    assert [column.name for column in schema.columns] == list(schemas.Media.column_names())
    assert {column.name: column.constraints.nullable for column in schema.columns}["media_id"] is True


def test_each_column_is_described_once_where_its_name_first_occurs() -> None:
    described: dict[str, str] = {}
    for table in TABLES:
        inherited = {name for base in table.__mro__[1:] for name in vars(base)}
        for name, column in table.columns().items():
            if name not in described:
                assert column.description, f"{table.__name__}.{name} has no description"
                described[name] = column.description
            else:
                repeated = column.description and name not in inherited
                assert not repeated, f"{table.__name__}.{name} is described a second time"
    assert len(set(described.values())) == len(described)
    for table in TABLES:
        shown = {column.name: column.description for column in columns(table)["dagster/column_schema"].columns}
        assert shown == {name: described[name] for name in table.column_names()}


@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # of Dagster's own test function
def test_a_raised_version_of_its_maker_is_followed_once() -> None:
    counts = []
    cursor: dg.AssetDaemonCursor | None = None
    with dg.instance_for_test() as instance:
        for version in ("1", "1", "2", "2"):

            @dg.asset(code_version=version, automation_condition=follows())
            def stats() -> None: ...

            seen = dg.evaluate_automation_conditions(defs=dg.Definitions([stats]), instance=instance, cursor=cursor)
            counts.append(seen.total_requested)
            cursor = seen.cursor
    assert counts == [0, 0, 1, 0]


@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")
def test_an_update_is_followed_whatever_else_happened_since_the_tick_before() -> None:
    batches = dg.DynamicPartitionsDefinition(name="batch")

    @dg.asset(deps=[dg.AssetSpec("latents", partitions_def=batches)], automation_condition=follows())
    def stats() -> None: ...

    defs = dg.Definitions([dg.AssetSpec("latents", partitions_def=batches), stats])
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions("batch", ["a", "b"])
        cursor: dg.AssetDaemonCursor | None = None

        def asked() -> int:
            nonlocal cursor
            seen = dg.evaluate_automation_conditions(defs=defs, instance=instance, cursor=cursor)
            cursor = seen.cursor
            return seen.total_requested

        def made(asset: str, batch: str | None = None) -> None:
            instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=batch))

        assert [asked(), asked()] == [0, 0], "what stood before is not followed"
        made("latents", "a")
        assert asked() == 1
        made("stats")  # what was asked for, while another batch is made
        made("latents", "b")
        assert [asked(), asked()] == [1, 0]
        made("stats")
        assert [asked(), asked()] == [0, 0]
