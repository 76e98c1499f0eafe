"""Which recipe is which row of the paper's ablation tables, as Markdown: `python -m nextvid.config.ablation_table`.

The paper's scores are ImageNet-1K / SSv2 at 15K steps (docs/method.md 10); what differs from the base is read from the
recipes.
"""

import sys
from typing import Any, NamedTuple

from nextvid.config.overrides import flat
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import recipe

BASE = "ablation_full"


class Row(NamedTuple):
    """A row of the paper, its scores, and the recipe that repeats it."""

    table: str
    row: str
    scores: str
    recipe: str


ROWS: tuple[Row, ...] = (  # docs/method.md 10
    Row("2", "r1: generation", "76.8 / 61.1", "ablation_gen_only"),
    Row("2", "r2: generation, isolated context", "75.0 / 58.7", "ablation_gen_isolated"),
    Row("2", "r2, second reading: with predictor", "75.0 / 58.7", "ablation_gen_predictor"),
    Row("2", "r3: alignment", "74.7 / 62.8", "ablation_align_only"),
    Row("2", "r4: alignment, isolated context", "73.1 / 61.9", "ablation_align_isolated"),
    Row("2", "r5: everything", "75.1 / 63.8", BASE),
    Row("3", "target VA-VAE", "as Tab. 2, r5", "ablation_full_pixels"),
    Row("3", "target pixels", "73.5 / 62.4", "ablation_target_pixels"),
    Row("3", "target SigLIP2", "73.2 / 62.5", "ablation_target_siglip2"),
    Row("3", "target Cosmos", "71.7 / 54.8", "ablation_target_cosmos"),
    Row("4", "without masking", "31.0 / 14.7", "ablation_unmasked"),
    Row("4", "with masking", "75.0 / 58.7", "ablation_gen_isolated"),
    Row("5", "cross-attention", "75.0 / 58.7", "ablation_gen_isolated"),
    Row("5", "cross- and self-attention", "72.6 / 54.2", "ablation_cross_self"),
    Row("11", "k = 1, 15K steps", "75.3 / 63.8", "ablation_one_copy"),
    Row("11", "k = 4, 15K steps", "75.1 / 63.8", BASE),
    Row("11", "k = 1, 30K steps", "79.3 / 67.1", "ablation_one_copy_30k"),
    Row("11", "k = 4, 30K steps", "79.4 / 67.7", "ablation_full_30k"),
    Row("12", "with moving average", "as Tab. 2, r5", BASE),
    Row("12", "without moving average", "< 10", "ablation_no_average"),
)

HEAD = f"""# Ablations

Written by `python -m nextvid.config.ablation_table > docs/ablations.md`; a test compares this file with the recipes.

Scores are the paper's (ImageNet-1K / Something-Something-v2, attentive probe, almost surely ViT-G after 15K steps).
Ours start from `{BASE}`: ViT-B with latents as input, the one-GPU schedule of `nextvid_b` stopped at the same
share of its steps, 3,750 steps of 256 clips (`nextvid/config/ablations.py` says why). Compare rows with each other, not
with the paper's numbers.

Recipes of Tab. 3 read stored pixels (`encoding.pixels` in corpus.yaml). Their targets are what the trainset's encoding
holds: SigLIP2 and Cosmos need a trainset of an encoding by that network, targets of pixels need no latents at all.

| table | row | paper | recipe | differs from `{BASE}` in |
|---|---|---|---|---|
"""


def differences(found: RecipeConfig, base: RecipeConfig) -> dict[str, Any]:
    """Fields, apart from the name, that have another value than in the base."""
    before = dict(flat(base.model_dump(mode="json")))
    return {path: v for path, v in flat(found.model_dump(mode="json")) if path != "name" and before.get(path) != v}


def markdown() -> str:
    """The whole document."""
    base = recipe(BASE)
    lines = []
    for row in ROWS:
        changed = ", ".join(f"`{path}={value}`" for path, value in differences(recipe(row.recipe), base).items())
        lines.append(f"| {row.table} | {row.row} | {row.scores} | `{row.recipe}` | {changed or 'nothing'} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown())
