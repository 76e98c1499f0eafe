"""Training on a trainset whose store or files are gone, moved, changed or half there: one clear error, no batch."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nextvid.trainset.mask_plan import make_plan
from storage.errors import DamagedError, NExTVidError, UpstreamError
from storage.shard import INDEX_BYTES
from tests.nextvid.train.corpus import loading, make_project, tiny_spec
from tests.nextvid.train.tiny import tiny_recipe


def store_folder(root: Path) -> Path:
    return root / "latents" / tiny_spec().digest()


def shards(root: Path) -> list[Path]:
    return sorted(path for path in store_folder(root).rglob("latent/c.*"))


def of_another_spec(root: Path) -> None:
    """Somebody put another store's spec.json there."""
    path = store_folder(root) / "spec.json"
    path.write_text(path.read_text().replace("bicubic", "nearest"))


def half_copied(root: Path) -> None:
    """A copy that was interrupted: commits came over, shards did not."""
    for path in shards(root)[1:]:
        path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_rows(path: Path) -> None:
    """Another bit in every byte of every row."""
    data = path.read_bytes()
    path.write_bytes(bytes(byte ^ 1 for byte in data[:-INDEX_BYTES]) + data[-INDEX_BYTES:])


def each(harm: Callable[[Path], object], paths: Sequence[Path]) -> None:
    for path in paths:
        harm(path)


def trainset_file(root: Path, name: str) -> Path:
    (found,) = root.glob(f"trainset/*/{name}")
    return found


CASES: dict[str, tuple[Callable[[Path], object], type[NExTVidError], str]] = {
    "store gone": (lambda root: shutil.rmtree(root / "latents"), UpstreamError, r"are gone.*Put the folder back"),
    "store moved": (lambda root: (root / "latents").rename(root / "moved"), UpstreamError, r"are gone"),
    "of another spec": (of_another_spec, DamagedError, r"spec\.json was changed"),
    "half copied": (half_copied, DamagedError, r"cannot be read.*Remedy: remove"),
    "shard cut": (lambda root: each(cut, shards(root)), DamagedError, r"is short or its index"),
    "shard changed": (
        lambda root: each(change_rows, shards(root)),
        DamagedError,
        r"other bytes than were",
    ),
    "no commits": (
        lambda root: each(Path.unlink, list(store_folder(root).rglob("commits/*"))),
        DamagedError,
        r"is not committed",
    ),
    "rows cut": (lambda root: cut(trainset_file(root, "rows.f4.npy")), DamagedError, r"rows\.f4\.npy.*make 'trainset'"),
    "rows gone": (lambda root: trainset_file(root, "rows.f4.npy").unlink(), DamagedError, r"rows\.f4\.npy"),
    "rows are another array": (
        lambda root: shutil.copy(trainset_file(root, "rows.f8.npy"), trainset_file(root, "rows.f4.npy")),
        DamagedError,
        r"9 addresses were frozen",
    ),
    "trainset.json torn": (
        lambda root: cut(trainset_file(root, "trainset.json")),
        DamagedError,
        r"trainset\.json is not JSON",
    ),
    "trainset gone": (lambda root: shutil.rmtree(root / "trainset"), UpstreamError, r"make 'trainset' first"),
    "trainset half copied": (
        lambda root: trainset_file(root, "trainset.json").unlink(),
        UpstreamError,
        r"trainset\.json does not exist",
    ),
}


@pytest.mark.parametrize(("harm", "kind", "said"), CASES.values(), ids=CASES)
def test_no_batch_comes_out_of_it(
    tmp_path: Path, harm: Callable[[Path], object], kind: type[NExTVidError], said: str
) -> None:
    project, recipe = make_project(tmp_path), tiny_recipe()
    make_plan(project.root, recipe)
    handed_out: list[int] = []
    harm(Path(project.root.url))

    def batches() -> None:
        with loading(project, recipe) as loader:
            for batch in loader.batches(0):
                handed_out.append(batch.step)

    with pytest.raises(kind, match=said) as caught:
        batches()
    assert len(str(caught.value).splitlines()) == 1
    assert handed_out == [] or harm is half_copied  # what came over may be read until a missing shard is drawn
