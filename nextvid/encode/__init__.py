"""Frames to latents: autoencoders, views, plan, shard, statistics, previews."""
