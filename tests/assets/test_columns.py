"""Every column of every table means something, and nothing is explained that no table has."""

import dataframely as dy

from assets.columns import MEANINGS, columns
from storage import schemas

TABLES: tuple[type[dy.Schema], ...] = (
    schemas.Sources, schemas.Media, schemas.Labels, schemas.Shots, schemas.Clips, schemas.Plan, schemas.Commits,
    schemas.Duplicates, schemas.Lineage,
)  # fmt: skip


def test_a_schema_becomes_the_columns_tab() -> None:
    schema = columns(schemas.Media)["dagster/column_schema"]
    assert [column.name for column in schema.columns] == list(schemas.Media.column_names())
    assert {column.name: column.constraints.nullable for column in schema.columns}["media_id"] is True
    assert all(column.description for column in schema.columns)


def test_each_name_has_one_meaning_and_each_meaning_a_column() -> None:
    named = {name for table in TABLES for name in table.column_names()}
    assert named == set(MEANINGS)
    assert len(set(MEANINGS.values())) == len(MEANINGS)
