"""A project whose clips, latents and duplicates are written by hand: what the trainset reads, without any file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from nextvid.config.project import Project, open_project
from nextvid.encode.plan import encoding_spec
from nextvid.making.publishing import publish_latest
from storage import atomic
from storage.digest import digest, digest_bytes
from storage.latents import LatentStore
from storage.schemas import Commits, Duplicates
from storage.tables import publish_checks, write_table
from tests.nextvid.encode.small_corpus import clip_row, publish_clips

FRAMES = 4


def write_autoencoder(folder: Path) -> Path:
    """As much of an autoencoder's folder as planning reads: 3 channels, 8 pixels a cell."""
    folder.mkdir()
    config = {"_class_name": "AutoencoderKL", "latent_channels": 3, "block_out_channels": [8] * 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    return folder


class Corpus:
    """One such project, and what is stored in it."""

    def __init__(self, folder: Path, autoencoder: Path) -> None:
        self.folder, self.autoencoder = folder, autoencoder
        self.project = self.configure()
        self.latents: dict[bytes, np.ndarray] = {}

    def configure(self, **changes: Any) -> Project:
        policy = [{"frames": FRAMES, "fps": 4}]
        said = {
            "root": "root",
            "encoding": {"autoencoder": str(self.autoencoder), "resolution": 16},
            "datasets": {
                "films": {"uri": "films", "weight": 3.0, "clips": policy},
                "stills": {"uri": "stills", "weight": 1.0, "clips": [{"frames": 1}]},
                "empty": {"uri": "empty", "weight": 4.0, "clips": policy},
                "probe": {"uri": "probe"},
            },
        } | changes
        (self.folder / "corpus.yaml").write_text(yaml.safe_dump(said))
        self.project = open_project(self.folder / "corpus.yaml")
        return self.project

    def row(self, batch: str, index: int, **changes: Any) -> dict[str, Any]:
        name = batch.split(".")[0]
        frames = 1 if name == "stills" else FRAMES
        media = bytes.fromhex(digest([name, index // 2]))  # two clips a file
        here: dict[str, Any] = {
            "batch": batch,
            "dataset": name,
            "frames": frames,
            "times_us": list(range(frames)),
            "media_id": media,
            "shot_id": bytes.fromhex(digest([media.hex(), "shot"])),
            "clip_id": bytes.fromhex(digest([batch, index, "clip"])),
            "row_id": bytes.fromhex(digest([batch, index])),
        }
        return clip_row(Path(f"/{name}/{index // 2}.{'png' if frames == 1 else 'mp4'}"), index, **(here | changes))

    def clips(self, batch: str, rows: Sequence[dict[str, Any]]) -> None:
        publish_clips(self.project, batch, rows)
        publish_checks(self.project.root.checks("shots", batch), "shots", [{"name": "by hand", "passed": True}])
        atomic.publish_bytes(self.project.root.table("shots", batch), b"shots of " + batch.encode())

    def encode(
        self,
        batch: str,
        rows: Sequence[dict[str, Any]],
        failed: Sequence[int] = (),
        passed: bool = True,
        seed: int = 0,
        encode_s: float = 0.0,
        decode_s: float = 0.0,
    ) -> None:
        """Commit random latents; channel c of dataset-dependent mean and width."""
        spec = encoding_spec(self.project)
        store = LatentStore(self.project.root, spec)
        store.create()
        rng = np.random.default_rng([seed, len(batch)])
        part = store.plan_part(batch, rows[0]["frames"], [row["row_id"] for row in rows])
        shape = (len(rows), *spec.row_shape(rows[0]["frames"]))
        scale = 0.5 + np.arange(spec.channels)[:, None, None]
        latents = rng.standard_normal(shape) * scale + len(batch) * 0.1 + rng.standard_normal((len(rows), 1, 1, 1, 1))
        latents = latents.astype(np.float16)
        empty = Commits.create_empty().schema
        commits = pl.DataFrame(
            {
                "row_id": [row["row_id"] for row in rows],
                "slot": range(len(rows)),
                "status": ["quarantined" if i in failed else "ok" for i in range(len(rows))],
                "reason": ["timeout" if i in failed else None for i in range(len(rows))],
                "crc32c": None,
                "sums": [[]] * len(rows),
                "sums_squared": [[]] * len(rows),
                "posterior_std": 0.01,
                "psnr_db": 30.0,
                "decode_s": decode_s,
                "encode_s": encode_s,
            },
            schema=empty,
        )
        part.write_shard(0, latents, commits)
        self.latents |= {row["row_id"]: latents[i] for i, row in enumerate(rows) if i not in failed}
        path = self.project.root.latents_checks(spec.digest(), batch)
        publish_checks(path, "latents", [{"name": "by hand", "passed": passed}])

    def duplicates(self, rows: Sequence[dict[str, Any]] = (), without: Sequence[str] = ()) -> str:
        """Publish a duplicates table that knows every batch as it is now, except those in `without`."""
        root = self.project.root
        inputs = {
            batch: [digest_bytes(atomic.read_bytes(root.table(noun, batch))) for noun in ("shots", "clips")]
            for batch in root.batches("clips")
            if batch not in without
        }
        table = pl.DataFrame(list(rows), schema=Duplicates.create_empty().schema)
        key = digest([inputs, [[row["shot_id"].hex(), row["dropped_from"]] for row in rows]])
        folder = root.pointed("duplicates", key)
        write_table(f"{folder}/duplicates.parquet", table, Duplicates)
        atomic.publish_json(f"{folder}/duplicates.json", {"inputs": inputs})
        publish_checks(f"{folder}/checks.json", "duplicates", [{"name": "by hand", "passed": True}])
        publish_latest(root, "duplicates", key)
        return key


def doubled(row: dict[str, Any], group: int, drop: bool, reason: str | None = None) -> dict[str, Any]:
    """A row of Duplicates for the shot of a clip row."""
    return {
        "shot_id": row["shot_id"],
        "media_id": row["media_id"],
        "dataset": row["dataset"],
        "batch": row["batch"],
        "group": group,
        "split": row["split"],
        "benchmarks": [use for use in row["uses"] if use != "pretrain"],
        "pretrain": "pretrain" in row["uses"],
        "dropped_from": ["pretrain"] if drop else [],
        "reason": reason,
    }
