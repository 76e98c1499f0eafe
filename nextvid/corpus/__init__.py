"""Files to the clips table: listings, batches, labels, media facts, shots and clips."""
