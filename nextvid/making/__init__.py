"""What all makers share: outcomes, batches, publication of results, progress."""
