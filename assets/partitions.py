"""Partition sets: batches of files (dynamic, equal to the folder sources/), recipes, and recipe x benchmark."""

import dagster as dg

from nextvid.config.recipes import RECIPES

BATCHES = dg.DynamicPartitionsDefinition(name="batch")
RECIPE = dg.StaticPartitionsDefinition(list(RECIPES))
BENCHMARK = dg.DynamicPartitionsDefinition(name="benchmark")
RECIPE_BENCHMARK = dg.MultiPartitionsDefinition({"recipe": RECIPE, "benchmark": BENCHMARK})
