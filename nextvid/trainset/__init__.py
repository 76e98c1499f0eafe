"""Clips to the frozen training set: duplicates, mask plans, the trainset, and the order in which it is drawn."""
