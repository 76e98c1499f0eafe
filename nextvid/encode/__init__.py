"""The clips table to committed shards of latents and pixels, and their statistics."""
