"""What is on disk: tables, stores of latents and pixels, trainsets; how each is written whole and read back.

The data root, as `root.py` builds it (every path of the project comes from there):

    <root>/accepted.json                              the accepted encoding, curation, pixels
           caps/<dataset>.json                        which rows a `cap` takes
           notices/<time>.json                        what a person accepted or withdrew, for Dagster to report
           sources/<batch>.parquet                    batch = <dataset>.<nnnnnn>: the listing, append-only
           sources/changes/ sources/pending.json      each change of a listing by its number, and what is being made
           media/ labels/ shots/ clips/               <batch>.parquet, <batch>.json: outcome of its checks, pictures
           latents/<spec>/spec.json                   the encoding spec as JSON
           latents/<spec>/<batch>.json                outcome of the checks of the batch in this spec
           latents/<spec>/<batch>/f16/<part>/         Zarr v3 group with array `latent`; plan.parquet,
                                                      commits/<shard>.parquet; sealed.json and sealed.parquet
                                                      once all of these are there
           pixels/<spec>/                             as latents, with JPEG chunks in array `pixels`
           latent_stats/<digest>/  duplicates/<digest>/  mask_plan/<digest>/  withdrawn/<media>.json
           trainset/<digest>/                         trainset.json rows.f16.npy lineage.parquet, and
                                                      pixels.<spec>.json pixels.<spec>.f16.npy once frozen
    <runs_root>/pretrain/<recipe>/<run>/              config.json events.jsonl checkpoints/ encoder/ lock
           probes/ samples/ report/<recipe>/<run>/

JSON files are records with a seal (records.py), tables have a checksum in their metadata (tables.py).

Every path is a string that fsspec understands. atomic.py publishes files, locks.py locks, listing.py lists, remote.py
speaks to object stores, cache.py keeps local copies of a bucket's files. Of latents and pixels store.py has the stores,
part.py their parts, seal.py their seals, shard.py the bytes of a shard; reader.py reads rows fast, verify.py reads
every byte.

`latest.json` in latent_stats/, duplicates/, trainset/ and pretrain/<recipe>/ points to the newest complete one.
"""
