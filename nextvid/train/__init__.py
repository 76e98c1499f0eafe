"""Rows to weights: loader, optimiser, checkpoints, loop. `python -m nextvid.train` is torchrun's entry."""
