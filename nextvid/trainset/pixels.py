"""The pixels of a frozen trainset: the address of each of its rows in a pixel store, under a digest of its own.

Frozen for the first recipe that reads pixels, and not changed afterwards. Files of addresses are in the order of the
trainset's rows; the record `pixels.<spec>.json` is written last. A row without pixels refuses the whole: no clip is
left out or replaced.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from nextvid.config.project import Project
from nextvid.config.recipe import RecipeConfig
from nextvid.config.recipes import RECIPES
from nextvid.encode.plan import pixel_spec
from nextvid.trainset.files import Frozen, gone_shards, new_array, read_sealed
from nextvid.trainset.trainset import Trainset
from storage import atomic, listing
from storage.digest import crc32c, digest_bytes, digest_config
from storage.errors import DamagedError, RefusedError, UpstreamError
from storage.reader import PIXEL_ADDRESS, pixel_addresses, row_id
from storage.records import publish_record
from storage.root import DataRoot
from storage.spec import PixelSpec
from storage.store import PixelStore

NAMED = 3  # rows without pixels that a message names


@dataclass(frozen=True)
class TrainsetPixels:
    """Pixels of a trainset, opened for reading: addresses are memory-mapped, so opening costs the same at any size."""

    root: DataRoot
    trainset: Trainset
    folder: str
    digest: str
    spec: PixelSpec
    psnr_mean_db: float | None  # of the JPEGs against their frames, over the rows that were measured; None without any
    psnr_rows: int
    files: Mapping[str, int]  # crc32c of each file of addresses, by its name

    @property
    def path(self) -> str:
        """Path of the record."""
        return _record_path(self.folder, self.spec)

    @property
    def words(self) -> str:
        """How they were stored, and how close they are to the frames, in words."""
        psnr = "PSNR not measured" if self.psnr_mean_db is None else f"{self.psnr_mean_db:.1f} dB PSNR"
        return f"JPEG of quality {self.spec.quality}, {self.spec.subsampling}, {psnr} over {self.psnr_rows} clips"

    def rows(self, frames: int) -> np.ndarray:
        """PIXEL_ADDRESS of each of the trainset's rows of a clip length, in their order.

        Raises DamagedError where the file is not what was frozen.
        """
        return self._frozen.open(_addresses_name(self.spec, frames), PIXEL_ADDRESS, len(self.trainset.rows(frames)))

    def check(self) -> None:
        """Read every file of addresses; DamagedError where one is not what was frozen."""
        self._frozen.check()

    def gone(self) -> list[str]:
        """One line for each part of the pixel store that lacks shards of these rows: which, and what to do."""
        store, rows = PixelStore(self.root, self.spec), {frames: self.rows(frames) for frames in self.trainset.lengths}
        whose = f"the pixels of trainset {self.trainset.digest}"
        return gone_shards(store, self.trainset.batches, rows, whose, "ask for the run again")

    @property
    def _frozen(self) -> Frozen:
        return Frozen(self.root, self.folder, self.files, _remedy(self.path))


def freeze_pixels(project: Project, trainset: Trainset, recipe: RecipeConfig) -> TrainsetPixels:
    """The pixels of a trainset for a recipe, in the accepted spec; frozen now if they are not yet.

    Raises RefusedError where corpus.yaml asks for none, they do not fit the recipe, or a row has none.
    """
    spec = pixel_spec(project, trainset.spec)
    if spec is None and project.asked.encoding.pixels is not None:
        raise RefusedError(
            f"recipe {recipe.name} reads pixels, which {project.path} asks for and are not accepted yet: accept "
            f"them with 'nextvid plan --accept'; then make 'latents' again{_twin(recipe)}"
        )
    if spec is None:
        raise RefusedError(
            f"recipe {recipe.name} reads pixels, and {project.path} asks for none: put 'pixels: {{quality: 90}}' under "
            f"'encoding', make 'latents' again (it adds pixels and touches no latent), then ask again{_twin(recipe)}"
        )
    side = recipe.model.grid_height * recipe.model.patch, recipe.model.grid_width * recipe.model.patch
    if side != (spec.resolution, spec.resolution):
        raise RefusedError(
            f"recipe {recipe.name} reads frames of {side[0]} x {side[1]} pixels, and the trainset's have "
            f"{spec.resolution} x {spec.resolution}: choose another recipe, or set 'encoding.resolution' and make "
            "'latents' and 'trainset' again"
        )
    folder = project.root.pointed("trainset", trainset.digest)
    path = _record_path(folder, spec)
    if atomic.exists(path):
        found = _opened(project.root, trainset, folder, path)
        found.check()
        if not found.gone():
            return found
    _freeze(PixelStore(project.root, spec), trainset, folder, recipe.name)  # also where rows moved within the store
    return _opened(project.root, trainset, folder, path)


def open_pixels(root: DataRoot, trainset: Trainset, digest: str) -> TrainsetPixels:
    """The frozen pixels of this digest. Raises UpstreamError where the trainset has none such."""
    for found in frozen_pixels(root, trainset):
        if found.digest == digest:
            return found
    raise UpstreamError(
        f"trainset {trainset.digest} has no pixels {digest}: they were removed. Put them back, or start a new run"
    )


def frozen_pixels(root: DataRoot, trainset: Trainset) -> Iterator[TrainsetPixels]:
    """Each frozen set of a trainset's pixels, by spec."""
    folder = root.pointed("trainset", trainset.digest)
    for name in listing.files(folder):
        if name.startswith("pixels.") and name.endswith(".json"):
            yield _opened(root, trainset, folder, f"{folder}/{name}")


def _freeze(store: PixelStore, trainset: Trainset, folder: str, recipe: str) -> None:
    """Write the addresses of every clip length, then the record."""
    contents, files, psnr_db = {}, {}, []
    for frames in trainset.lengths:
        name = _addresses_name(store.spec, frames)
        with atomic.staged_file(f"{folder}/{name}") as temporary:
            found = _write_addresses(temporary, store, trainset, frames, recipe)
            contents[f"f{frames}"] = digest_bytes(found["crc"].tobytes())
            files[name] = crc32c(np.memmap(temporary, np.uint8, "r"))
        for batch in np.unique(trainset.rows(frames)["batch"]).tolist():
            psnr_db.append(store.commits(trainset.batches[batch], frames, ["psnr_db"])["psnr_db"])
    measured = pl.concat(psnr_db).drop_nulls()
    record = {
        "trainset": trainset.digest,
        "digest": digest_config({"trainset": trainset.digest, "spec": store.digest, "rows": contents}),
        "spec": store.spec.to_json(),
        "psnr_mean_db": measured.mean(),
        "psnr_rows": len(measured),
        "files": files,
    }
    publish_record(_record_path(folder, store.spec), record)


def _write_addresses(path: Path, store: PixelStore, trainset: Trainset, frames: int, recipe: str) -> np.ndarray:
    """Addresses in a new file, written batch by batch, so that only one batch's commits are in memory."""
    rows = trainset.rows(frames)
    found = new_array(path, PIXEL_ADDRESS, len(rows))
    order = np.argsort(rows["batch"], kind="stable")
    ends = np.flatnonzero(np.diff(rows["batch"][order])) + 1
    lacking: list[str] = []
    for places in np.split(order, ends) if len(order) else ():
        batch = trainset.batches[int(rows["batch"][places[0]])]
        commits = store.commits(batch, frames, ["offset", "size_bytes", "crc32c"])
        good, own = commits.filter(pl.col("status") == "ok"), rows[places]["row_id"]
        halves = np.frombuffer(b"".join(good["row_id"].to_list()), ">u8").reshape(-1, 2).astype("<u8")
        known = good.with_columns(high=pl.Series(halves[:, 0]), low=pl.Series(halves[:, 1]))
        asked = pl.DataFrame({"high": own[:, 0], "low": own[:, 1], "at": np.arange(len(own))})
        joined = asked.join(known, on=["high", "low"], how="left", maintain_order="left")
        without = joined.filter(pl.col("crc32c").is_null())["at"]
        lacking += [f"{row_id(rows[places[at]]).hex()} of {batch}" for at in without]
        if not lacking:
            found[places] = pixel_addresses(joined, trainset.batches)
    if lacking:
        named = ", ".join(lacking[:NAMED]) + (", ..." if len(lacking) > NAMED else "")
        raise RefusedError(
            f"recipe {recipe} reads pixels, and {len(lacking)} of the {len(rows)} rows with {frames} frames of "
            f"trainset {trainset.digest} have none of quality {store.spec.quality} ({named}): make 'latents' of their "
            "batches again (it adds pixels and touches no latent), then ask again"
        )
    found.flush()
    return found


def _opened(root: DataRoot, trainset: Trainset, folder: str, path: str) -> TrainsetPixels:
    record = read_sealed(path, _remedy(path))
    try:
        spec = PixelSpec.from_json(record["spec"])
        mean_db, measured, files = record["psnr_mean_db"], record["psnr_rows"], record["files"]
        found = TrainsetPixels(root, trainset, folder, record["digest"], spec, mean_db, measured, files)
        of = record["trainset"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is not a record of pixels ({error}); {_remedy(path)}") from error
    if (of, found.path) != (trainset.digest, path):
        raise DamagedError(f"{path} describes pixels of another trainset or another quality; {_remedy(path)}")
    return found


def _twin(recipe: RecipeConfig) -> str:
    twin = f"{recipe.name}_latent"
    return f"; or train {twin}, which reads latents" if twin in RECIPES else ""


def _record_path(folder: str, spec: PixelSpec) -> str:
    return f"{folder}/pixels.{spec.digest()}.json"


def _addresses_name(spec: PixelSpec, frames: int) -> str:
    return f"pixels.{spec.digest()}.f{frames}.npy"


def _remedy(path: str) -> str:
    return f"remove {path} and ask for the run again"
