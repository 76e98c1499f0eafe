"""Exported encoders, used without a corpus: features of any video, streams, other formats."""
