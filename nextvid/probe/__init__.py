"""Frozen features to accuracies: features, attentive probe, nearest neighbours."""
