"""Every kind of file under a root x every kind of damage x every command that reads: an error of ours, or none.

Commands run in this process, so that whatever a library raises fails the test. What a case is follows from the seed.
By default a sample, under the marker `faults` the whole product. The files are those of tests/nextvid/tiny_project.py.
"""

import random
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

from nextvid.config.project import Project, open_project
from nextvid.encode.latent_stats import make_latent_stats
from nextvid.features.encoder import load_encoder
from nextvid.report.report import gather
from nextvid.train.pretrain import finish_run
from nextvid.train.run import find_run
from nextvid.trainset.dataset import open_latents
from nextvid.trainset.mask_plan import make_plan
from storage.errors import NExTVidError
from tests.damage import DAMAGE, kinds, swapped
from tests.factories import copy_project
from tests.nextvid.conftest import Command
from tests.nextvid.tiny_project import FRAMES, RECIPE, probe, uri_of

SEED, SAMPLE = 23, 40
REMEDY = re.compile(r"remov|restore|delet|again|first|put |update|correct")


class Damaged(NamedTuple):
    project: Project
    run: str
    pristine: Path


@pytest.fixture(scope="module")
def scored(evaluated: Project, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """A copy with a score and latent statistics, and a second copy to restore from."""
    project = copy_project(evaluated, tmp_path_factory.mktemp("rot") / "copy")
    probe(project, RECIPE)
    make_latent_stats(project)
    base = project.path.parent
    (base / "other.yaml").write_text(project.path.read_text().replace(f"{base}/root", f"{base}/other"))
    pristine = base.with_name("pristine")
    shutil.copytree(project.root.url, pristine)
    return Damaged(project, find_run(project, RECIPE).id, pristine)


def commands(scored: Damaged, out: Path) -> dict[str, list[str]]:
    """Everything on the command line that reads what is stored."""
    project, run, file = scored.project, scored.run, uri_of(0)
    here = ["--corpus", str(project.path)]
    trainset = next((scored.pristine / "trainset").glob("*/trainset.json")).parent.name
    pull = ["pull", trainset, project.root.url, "--corpus", str(project.path.parent / "other.yaml")]
    asked = {
        "verify": ["verify"], "verify --quick": ["verify", "--quick"], "status": ["status"], "plan": ["plan"],
        "compare": ["compare", run, run], "lineage of a run": ["lineage", run], "lineage of a file": ["lineage", file],
        "show": ["show", file, "--out", f"{out}/shown.png"], "draws": ["draws", "--recipe", RECIPE, "--first", "2"],
        "export": ["export", run, f"{out}/encoder"], "sweep": ["sweep"], "withdraw": ["withdraw", file],
        "export-latents": ["export-latents", f"{out}/latents", "--frames", str(FRAMES)],
    }  # fmt: skip
    return {name: words + here for name, words in asked.items()} | {"pull": pull}


def calls(scored: Damaged) -> dict[str, Callable[[Project], object]]:
    """What makers, trainers and libraries read, without the makers above them."""
    encoder = Path(scored.project.root.run(RECIPE, scored.run)) / "encoder"
    return {
        "latent_stats": make_latent_stats,
        "mask_plan": lambda project: make_plan(project.root, find_run(project, RECIPE).recipe),
        "pretrain": lambda project: finish_run(project, RECIPE, scored.run),
        "probes": lambda project: probe(project, RECIPE),
        "report": lambda project: gather(project, find_run(project, RECIPE)),
        "load_encoder": lambda _: load_encoder(encoder),
        "open_latents": lambda project: open_latents(project.path, FRAMES)[0],
    }


def restore(scored: Damaged, before: dict[Path, tuple[int, int]]) -> None:
    """Put back what is not as it was."""
    root = Path(scored.project.root.url)
    after = stamps(root)
    for path in after.keys() - before.keys():
        path.unlink()
    for path in (path for path, stamp in before.items() if after.get(path) != stamp):
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(scored.pristine / path.relative_to(root), path)
        before[path] = stamps(path)[path]


def stamps(root: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of the files below, or of one file."""
    paths: Iterator[Path] = iter([root]) if root.is_file() else root.rglob("*")
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()}


def check(scored: Damaged, nextvid: Command, tmp_path: Path, most: int | None) -> None:
    root, chosen = Path(scored.project.root.url), random.Random(SEED)
    before, called, files = stamps(root), calls(scored), kinds(Path(root))
    names = [*commands(scored, tmp_path), *called]
    cases = list(product(files, (*DAMAGE, Path.unlink), names))
    for number, (kind, damage, name) in enumerate(chosen.sample(cases, most or len(cases))):
        path = chosen.choice(files[kind])
        damage(path)
        out, what = tmp_path / str(number), f"{damage.__name__} of {path}, {name}"
        try:
            if name in called:
                code, said = 0, ""
                try:
                    called[name](open_project(scored.project.path))
                except NExTVidError as error:
                    code, said = 1, str(error)
            else:
                code, *printed = nextvid(*commands(scored, out)[name])
                said = "".join(printed)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__} reached the user") from error
        finally:
            restore(scored, before)
        assert code == 0 or REMEDY.search(said), f"{what} says no remedy: {said}"
        if name == "verify" and damage not in (Path.unlink, swapped):
            assert code, f"{what} is not found"
        shutil.rmtree(out, ignore_errors=True)


def test_damage_is_told_by_every_command(scored: Damaged, nextvid: Command, tmp_path: Path) -> None:
    check(scored, nextvid, tmp_path, SAMPLE)


@pytest.mark.faults
def test_every_damage_of_every_file_is_told_by_every_command(scored: Damaged, nextvid: Command, tmp_path: Path) -> None:
    check(scored, nextvid, tmp_path, None)
