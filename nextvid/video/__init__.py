"""Files to frames and facts: probe, decode, sandbox, shots, quality, duplicates, clips. No torch, no tables' paths."""
