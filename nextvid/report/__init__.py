"""The model card of a run: scores, curves, samples and lineage as HTML."""
