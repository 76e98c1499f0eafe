"""docs/corpus.md, recipes.md and ablations.md, made from the fields and recipes, and the JSON schema that editors take.

`python -m nextvid.config.reference` writes the documents; a test compares them with the fields and recipes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nextvid.config.corpus import CorpusConfig
from nextvid.config.overrides import flat
from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.config.recipes import recipe
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

A project adds its own as files in a folder `recipes` beside corpus.yaml. `recipes/longer.yaml` is the recipe `longer`:

```yaml
base: nextvid_s_latent  # one of the named recipes
overrides: {{seed: 1, stages: {{warmup: {{steps: 2000}}}}}}  # the fields that differ
```

A new file is a new partition once the definitions are reloaded (Deployment, Reload definitions).

Training goes on from what exists by `init`; the run's id, `nextvid lineage` both ways and the model card say from what.
Steps, rates, draws and AdamW's moments start at zero, so give such a recipe a warm-up, or rates that the
weights are used to. Only the cool-down, from step 30,000 of a run (checkpoints at the ends of stages are kept):

```yaml
base: nextvid_s_latent
overrides:
  init: {{run: 0123456789ab, step: 30000, reference: average}}
  stages: {{warmup: null, stable1: null, stable2: null}}  # null removes a stage
```

On the trainset as it has grown since (the newest is taken), with draws of another order:

```yaml
base: nextvid_s_latent
overrides:
  init: {{run: 0123456789ab}}
  seed: 1
  stages: {{warmup: {{steps: 500}}, stable1: null, stable2: {{steps: 4000}}, cooldown: {{steps: 1000}}}}
```

{MADE_BY}"""
EXECUTION = """# How a run is carried out

The run's file keeps these under the key `how`; `how` of the asset `pretrain` in Dagster changes them."""
BASE = "ablation_full"


class PaperRow(NamedTuple):
    """A row of the paper's ablation tables, its scores (ImageNet-1K / SSv2, docs/method.md 10), and our recipe."""

    table: str
    row: str
    scores: str
    recipe: str


ROWS: tuple[PaperRow, ...] = (
    PaperRow("2", "r1: generation", "76.8 / 61.1", "ablation_gen_only"),
    PaperRow("2", "r2: generation, isolated context", "75.0 / 58.7", "ablation_gen_isolated"),
    PaperRow("2", "r2, second reading: with predictor", "75.0 / 58.7", "ablation_gen_predictor"),
    PaperRow("2", "r3: alignment", "74.7 / 62.8", "ablation_align_only"),
    PaperRow("2", "r4: alignment, isolated context", "73.1 / 61.9", "ablation_align_isolated"),
    PaperRow("2", "r5: everything", "75.1 / 63.8", BASE),
    PaperRow("3", "target VA-VAE", "as Tab. 2, r5", "ablation_full_pixels"),
    PaperRow("3", "target pixels", "73.5 / 62.4", "ablation_target_pixels"),
    PaperRow("3", "target SigLIP2", "73.2 / 62.5", "ablation_target_siglip2"),
    PaperRow("3", "target Cosmos", "71.7 / 54.8", "ablation_target_cosmos"),
    PaperRow("4", "without masking", "31.0 / 14.7", "ablation_unmasked"),
    PaperRow("4", "with masking", "75.0 / 58.7", "ablation_gen_isolated"),
    PaperRow("5", "cross-attention", "75.0 / 58.7", "ablation_gen_isolated"),
    PaperRow("5", "cross- and self-attention", "72.6 / 54.2", "ablation_cross_self"),
    PaperRow("11", "k = 1, 15K steps", "75.3 / 63.8", "ablation_one_copy"),
    PaperRow("11", "k = 4, 15K steps", "75.1 / 63.8", BASE),
    PaperRow("11", "k = 1, 30K steps", "79.3 / 67.1", "ablation_one_copy_30k"),
    PaperRow("11", "k = 4, 30K steps", "79.4 / 67.7", "ablation_full_30k"),
    PaperRow("12", "with moving average", "as Tab. 2, r5", BASE),
    PaperRow("12", "without moving average", "< 10", "ablation_no_average"),
)

ABLATIONS = f"""# Ablations

`python -m nextvid.config.reference` makes this page from the recipes; a test compares the two.

Scores are the paper's (ImageNet-1K / Something-Something-v2, attentive probe, almost surely ViT-G after 15K steps).
Ours start from `{BASE}`: ViT-B with latents as input, the one-GPU schedule of `nextvid_b` stopped at the same
share of its steps, 3,750 steps of 256 clips (`nextvid/config/ablations.py` says why). Compare rows with each other, not
with the paper's numbers.

Recipes of Tab. 3 read stored pixels (`encoding.pixels` in corpus.yaml). Their targets are what the trainset's encoding
holds: SigLIP2 and Cosmos need a trainset of an encoding by that network, targets of pixels need no latents at all.

| table | row | paper | recipe | differs from `{BASE}` in |
|---|---|---|---|---|
"""


def schema() -> dict[str, Any]:
    """The JSON schema of corpus.yaml, with every description."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **CorpusConfig.model_json_schema()}


def documents() -> dict[str, str]:
    """The pages by file name."""
    corpus = [CORPUS, *_sections(CorpusConfig, "")]
    recipes = [RECIPES, *_sections(RecipeConfig, ""), EXECUTION, *_sections(ExecutionConfig, "")]
    base, ablations = recipe(BASE), ABLATIONS
    for row in ROWS:
        changed = ", ".join(f"`{path}={value}`" for path, value in differences(recipe(row.recipe), base).items())
        ablations += f"| {row.table} | {row.row} | {row.scores} | `{row.recipe}` | {changed or 'nothing'} |\n"
    return {
        "corpus.md": "\n\n".join(corpus) + "\n",
        "recipes.md": "\n\n".join(recipes) + "\n",
        "ablations.md": ablations,
    }


def differences(found: RecipeConfig, base: RecipeConfig) -> dict[str, Any]:
    """Fields, apart from the name, that have another value than in the base."""
    before = dict(flat(base.model_dump(mode="json")))
    return {path: v for path, v in flat(found.model_dump(mode="json")) if path != "name" and before.get(path) != v}


def _sections(model: type[BaseModel], place: str) -> Iterator[str]:
    """A table of the fields of a model, then the sections of the models inside it, each under its place in the file."""
    if place:
        yield f"## `{place}`"
    yield " ".join((model.__doc__ or "").split())
    whole = model.model_json_schema()
    values = {name: _kind(found, whole.get("$defs", {})) for name, found in whole["properties"].items()}
    rows = [
        f"| `{name}` | {values[name]} | {_default(field)} | {(field.description or '').replace('|', '/')} |"
        for name, field in model.model_fields.items()
    ]
    yield "\n".join(["| key | values | default | what it is |", "|---|---|---|---|", *rows])
    for name, field in model.model_fields.items():
        if inner := inner_model(field.annotation):
            several = {"dict": ".NAME", "tuple": "[]"}.get(getattr(field.annotation, "__name__", ""), "")
            yield from _sections(inner, f"{place}.{name}{several}".lstrip("."))


def _kind(found: dict[str, Any], named: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in found:
        return "block"
    if "anyOf" in found:
        return " or ".join(_kind(one, named) for one in found["anyOf"])
    if "const" in found:
        return f"`{found['const']}`"
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
    if isinstance(value, BaseModel) or (isinstance(value, tuple) and value and isinstance(value[0], BaseModel)):
        return "see below"
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    for file, text in documents().items():
        (DOCS / file).write_text(text, encoding="utf-8")
