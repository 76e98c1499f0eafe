"""docs/corpus.md and docs/recipes.md from the descriptions of the fields, and the JSON schema that editors take.

`python -m nextvid.config.reference` writes both documents; a test compares them with the fields.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nextvid.config.corpus import CorpusConfig
from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.config.strict import inner_model

DOCS = Path(__file__).parents[2] / "docs"
MADE_BY = "`python -m nextvid.config.reference` makes this page from the descriptions of the fields: edit those."
CORPUS = f"""# Every key of corpus.yaml

One file configures a project: where files and labels are, how clips are cut, which autoencoder encodes them, what is
probed. An unknown key is an error that names the nearest known one. Relative paths start from the file's folder.
Examples: [the demo's](../examples/demo/corpus.yaml), [the paper's](../examples/paper/corpus.yaml).

Editors complete and check the file by the schema that `nextvid schema > corpus.schema.json` prints; for those with the
YAML language server the file begins with `# yaml-language-server: $schema=corpus.schema.json`.

{MADE_BY}"""
RECIPES = f"""# Every field of a recipe

A recipe is a complete training configuration, and all of it enters the digest of a run. `nextvid inspect NAME --json`
prints one in full, `nextvid make pretrain --recipe NAME --set stages.warmup.steps=100` changes a field; the
named recipes are in `nextvid/config/recipes.py`.

{MADE_BY}"""
EXECUTION = """# How a run is carried out

The run's file keeps these under the key `how`; `how` of the asset `pretrain` in Dagster changes them."""


def schema() -> dict[str, Any]:
    """The JSON schema of corpus.yaml, with every description."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **CorpusConfig.model_json_schema()}


def documents() -> dict[str, str]:
    """The pages by file name."""
    corpus = [CORPUS, *_sections(CorpusConfig, "")]
    recipes = [RECIPES, *_sections(RecipeConfig, ""), EXECUTION, *_sections(ExecutionConfig, "")]
    return {"corpus.md": "\n\n".join(corpus) + "\n", "recipes.md": "\n\n".join(recipes) + "\n"}


def _sections(model: type[BaseModel], place: str) -> Iterator[str]:
    """A table of the fields of a model, then the sections of the models inside it, each under its place in the file."""
    if place:
        yield f"## `{place}`"
    yield " ".join((model.__doc__ or "").split())
    rows = [
        f"| `{name}` | {_values(model, name)} | {_default(field)} | {(field.description or '').replace('|', '/')} |"
        for name, field in model.model_fields.items()
    ]
    yield "\n".join(["| key | values | default | what it is |", "|---|---|---|---|", *rows])
    for name, field in model.model_fields.items():
        if inner := inner_model(field.annotation):
            several = {"dict": ".NAME", "tuple": "[]"}.get(getattr(field.annotation, "__name__", ""), "")
            yield from _sections(inner, f"{place}.{name}{several}".lstrip("."))


def _values(model: type[BaseModel], name: str) -> str:
    """The values that a field takes, from its JSON schema."""
    whole = model.model_json_schema()
    return _kind(whole["properties"][name], whole.get("$defs", {}))


def _kind(found: dict[str, Any], named: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in found:
        return "block"
    if "anyOf" in found:
        return " or ".join(_kind(one, named) for one in found["anyOf"])
    if "enum" in found:
        return ", ".join(f"`{value}`" for value in found["enum"])
    match found["type"]:
        case "array":
            return f"list of {_kind(found['items'], named)}s"
        case "object":
            return f"{_kind(found['additionalProperties'], named)} by name"
        case "integer" | "number" | "string" | "boolean" | "null" as plain:
            signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
            limits = [f"{sign} {found[key]:g}" for key, sign in signs.items() if key in found]
            return " ".join([plain, *limits])
        case other:
            raise AssertionError(f"no words for a JSON schema of type {other}")


def _default(field: FieldInfo) -> str:
    """The default as it is written in YAML; blocks have those of their own fields."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel) or (isinstance(value, tuple) and value):
        return "see below"
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    for file, text in documents().items():
        (DOCS / file).write_text(text, encoding="utf-8")
