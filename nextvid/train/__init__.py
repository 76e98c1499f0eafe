"""Trainset to weights: loader, optimiser, loop, checkpoints, export. torchrun starts `python -m nextvid.trainer`."""
