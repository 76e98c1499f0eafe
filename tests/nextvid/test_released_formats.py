"""What release 0.1.0 wrote is read: a store, trainset, mask plan, run, checkpoint, exported encoder and score.

The files in tests/golden/release_0_1_0 (765 kB) are of tests/nextvid/tiny_project.py with widths of 16, and were made
by release 0.1.0. They are never written again: a version that cannot read them needs a way to.
"""

from pathlib import Path

import pytest
import torch

from nextvid.features.encoder import load_encoder
from nextvid.report.scores import read_score
from nextvid.train import checkpoint
from nextvid.train.events import read_events
from nextvid.train.run import open_run
from nextvid.trainset.mask_plan import grid_of, open_mask_plan
from nextvid.trainset.trainset import Trainset
from storage.root import DataRoot
from storage.store import LatentStore


@pytest.fixture
def released(repository: Path) -> DataRoot:
    return DataRoot.open(str(repository / "tests" / "golden" / "release_0_1_0"))


def test_what_0_1_0_wrote_is_read(released: DataRoot, caplog: pytest.LogCaptureFixture) -> None:
    (store,) = LatentStore.every(released)
    assert store.verify() == []
    assert store.commits("stills.000000").height == 6
    trainset = Trainset.open(released)
    trainset.check()
    assert (trainset.lineage().height, trainset.lengths) == (66, (1, 8))
    (folder,) = Path(released.url).glob("pretrain/demo/*")
    run = open_run(folder)
    assert [event["kind"] for event in read_events(folder)][-1] == "end"
    plan = open_mask_plan(released, run.recipe.masks, grid_of(run.recipe.model))
    assert (plan.digest, set(plan.raw)) == (run.mask_plan, {"long", "short"})
    (path,) = checkpoint.complete(run.checkpoints)
    checkpoint.refuse_other(path, run.identity)
    assert checkpoint.read_progress(path).step == 5
    average = checkpoint.weights(path, "ema")
    encoder = load_encoder(folder / "encoder")
    assert "without checksums" in caplog.text
    own = encoder.encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in average.items())
    frames = torch.zeros(1, 8, 64, 64, 3, dtype=torch.uint8)
    assert encoder(frames).isfinite().all()
    (score,) = Path(released.url).glob("probes/*/*/*/*/*/score.json")
    assert read_score(str(score)).record["run"] == run.id
