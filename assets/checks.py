"""The checks that stand on each asset, by name, with what they mean; makers in nextvid report their outcomes.

Dagster needs the names before anything runs; a test compares them with what the makers return. Blocking checks stop
what reads the asset, here and, through the outcome files, on the command line too.
"""

import dagster as dg

CHECKS: dict[str, dict[str, str]] = {
    "media": {
        "rows_are_files_listed": "One row for every file that the listing shows",
        "quarantined_within_budget": "The share of quarantined files is within the dataset's budget",
        "spans_inside_video": "No labelled span lies outside of its video",
    },
    "shots": {
        "intervals_inside_file": "Every shot lies inside its file",
        "no_overlap": "No two shots of a file overlap",
    },
    "clips": {
        "no_clip_crosses_a_cut": "Every clip's times lie inside its shot",
        "ids_derive_from_content": "Ids drawn again from media, times and crops are the same, and none repeats",
        "every_shot_has_a_row": "Every shot has a row: a clip, or the reason why not",
    },
    "latents": {
        "finite": "No stored value is NaN or infinite, no row is constant",
        "counts": "Every wanted row is committed, or failed with a reason within the budget",
        "round_trip": "Decoded again and encoded again, sampled rows equal what is stored",
        "no_orphan": "No committed row is without a clip that wants it",
        "pixels": "Every wanted row has pixels too, where corpus.yaml asks for them",
    },
    "latent_stats": {
        "std_positive": "Every channel varies",
        "enough_rows": "Enough rows for stable statistics",
    },
    "duplicates": {"groups_are_small": "No group holds more than 1,000 files"},
    "mask_plan": {
        "budgets_exact": "Every entry keeps exactly the budget",
        "tubes_constant": "The visible set is the same in every tubelet",
        "thinning_uniform": "Thinning favours no visible cell",
        "raw_statistics": "The raw sampler reproduces the paper's statistics, on its grid",
    },
    "trainset": {
        "no_test_duplicate": "No row is a near-duplicate of a probe test clip",
        "weights_sum_to_one": "Mixture weights sum to one",
    },
    "pretrain": {
        "checkpoint_loads": "The last checkpoint opens and is complete",
        "losses_finite": "Every logged loss is finite",
        "rank_above_alarm": "Effective rank stays above the alarm, relative to initialisation",
    },
}

# Orphans follow from a changed curation, and the sweep frees them; recipes that read latents do without pixels; spans
# outside of their video label nothing.
NON_BLOCKING = {("latents", "no_orphan"), ("latents", "pixels"), ("media", "spans_inside_video")}


def specs(asset: str) -> list[dg.AssetCheckSpec]:
    """Check specifications of an asset."""
    return [
        dg.AssetCheckSpec(name=name, asset=asset, description=text, blocking=(asset, name) not in NON_BLOCKING)
        for name, text in CHECKS.get(asset, {}).items()
    ]
