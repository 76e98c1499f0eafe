"""The assets, one file each: what Dagster needs beside nextvid/graph.py, and a step that calls the maker.

A step opens the project, calls `make_<asset>` in nextvid and reports the outcome. Makers read and write files by path,
so there are no IO managers. Nothing here imports torch: definitions load in under two seconds.
"""
