"""The configuration explains itself: every field is described, the documents and the schema follow."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from nextvid.config.corpus import CorpusConfig
from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.config.reference import DOCS, documents
from nextvid.config.strict import inner_model

EXAMPLES = DOCS.parent / "examples"


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and those inside it."""
    yield model
    for field in model.model_fields.values():
        if inner := inner_model(field.annotation):
            yield from models(inner)


@pytest.mark.parametrize("model", [CorpusConfig, RecipeConfig, ExecutionConfig])
def test_every_field_is_described(model: type[BaseModel]) -> None:
    found = {(one.__name__, name): field for one in models(model) for name, field in one.model_fields.items()}
    assert len(found) > 10
    assert [place for place, field in found.items() if not field.description] == []


def test_documents_follow_the_fields() -> None:
    for name, text in documents().items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, "run python -m nextvid.config.reference"


def problems(value: Any, schema: dict[str, Any], named: dict[str, Any], place: str = "") -> Iterator[str]:
    """How a value breaks a JSON schema, by as much of the standard as pydantic uses for corpus.yaml."""
    schema = named[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if options := schema.get("anyOf"):
        found = [list(problems(value, option, named, place)) for option in options]
        yield from [] if [] in found else found[0]
        return
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    if "type" in schema and not isinstance(value, kinds.get(schema["type"], type(None))):
        yield f"{place} is not of type {schema['type']}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{place} is not one of {schema['enum']}"
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from problems(one, schema["items"], named, f"{place}[{number}]")
    elif isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        yield from (f"{place}.{key} is missing" for key in schema.get("required", []) if key not in value)
        for key, one in value.items():
            if key in known or isinstance(others, dict):
                yield from problems(one, known.get(key, others), named, f"{place}.{key}")
            else:
                yield f"{place}.{key} is unknown"


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What `nextvid schema` prints."""
    done = subprocess.run([sys.executable, "-m", "nextvid", "schema"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/corpus.yaml")), ids=lambda path: path.parent.name)
def test_the_schema_takes_the_examples(printed: dict[str, Any], file: Path) -> None:
    assert list(problems(yaml.safe_load(file.read_text()), printed, printed["$defs"])) == []


def test_the_schema_refuses_what_the_models_refuse(printed: dict[str, Any]) -> None:
    value = yaml.safe_load((EXAMPLES / "demo" / "corpus.yaml").read_text())
    value["encoding"] |= {"posterior": "median", "device": "cpu"}
    value["datasets"]["demo_videos"]["clips"][0].pop("frames")
    del value["root"]
    assert set(problems(value, printed, printed["$defs"])) == {
        ".root is missing",
        ".encoding.posterior is not one of ['mean', 'sample']",
        ".encoding.device is unknown",
        ".datasets.demo_videos.clips[0].frames is missing",
    }
