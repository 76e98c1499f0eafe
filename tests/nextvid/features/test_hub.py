"""The Hub's conventions: folders and repositories, safetensors alone, and a card that says what the encoder is."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import nextvid
from nextvid.config.project import Project
from nextvid.features import encoder as module
from nextvid.features.encoder import NExTVidEncoder, load_encoder
from nextvid.report.hub_card import hub_card
from nextvid.train.run import find_run
from storage import atomic
from storage.errors import ConflictError, UpstreamError
from tests.nextvid.conftest import Command
from tests.nextvid.features.exported import export_of_pixels, export_with_autoencoder
from tests.nextvid.tiny_project import RECIPE

FRAMES = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_folder_comes_back_with_its_autoencoder_and_a_card(tmp_path: Path) -> None:
    first = nextvid.NExTVidEncoder.from_pretrained(export_with_autoencoder(tmp_path))
    first.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "encoder")
    second = NExTVidEncoder.from_pretrained(str(tmp_path / "saved"))
    torch.testing.assert_close(second(FRAMES), first(FRAMES), rtol=0, atol=0)
    files = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.*")}
    assert files == {
        "config.json", "model.safetensors", "README.md",
        "autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    found = ModelCard.load(tmp_path / "saved" / "README.md")
    assert found.data.library_name == "nextvid"
    assert "Not recorded in this folder" in found.text
    with pytest.raises(ConflictError, match="name another"):
        second.save_pretrained(tmp_path / "saved")
    assert load_encoder(tmp_path / "saved").layers == 2


def test_pushing_and_pulling_go_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(export_of_pixels(tmp_path))
    hub = tmp_path / "hub"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id}))

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, hub / repo_id)
        return "https://hub/commit"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert encoder.push_to_hub("someone/nextvid") == "https://hub/commit"
    monkeypatch.setattr(module, "snapshot_download", lambda name, **_: str(hub / name))
    pulled = NExTVidEncoder.from_pretrained("someone/nextvid", revision="main")
    torch.testing.assert_close(pulled(FRAMES), encoder(FRAMES), rtol=0, atol=0)


def test_what_is_nowhere_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("someone/nothing", str(tmp_path / "no" / "folder"), "no such name"):
        with pytest.raises(UpstreamError, match="is no folder, and the Hub gives no such repository") as raised:
            NExTVidEncoder.from_pretrained(name, local_files_only=True, cache_dir=tmp_path)
        assert "\n" not in str(raised.value)


def test_the_card_names_data_licences_scores_and_trainset(own_copy: Project, nextvid: Command, tmp_path: Path) -> None:
    run = find_run(own_copy, RECIPE)
    score = {
        "run": run.id,
        "benchmark": "species",
        "rows": "a" * 32,
        "checkpoint": "step_000000005",
        "encoders": {"ema": {"accuracy": 0.75, "standard_error": 0.02}, "random": {"accuracy": 0.5}},
        "clips": {"test": 40},
    }
    atomic.publish_json(f"{own_copy.root.probe(RECIPE, run.id, 5, 'species', 'a' * 32)}/score.json", score)
    command = ("export", run.id, str(tmp_path / "out"), "--corpus", str(own_copy.path))
    assert nextvid(*command)[0] == 0
    found = ModelCard.load(tmp_path / "out" / "README.md")
    said = found.data.to_dict()
    assert [(one["name"], one["licence"]) for one in said["nextvid"]["data"]] == [
        ("pets", "CC0-1.0"),
        ("stills", "unknown"),
    ]
    assert (said["nextvid"]["run"], said["nextvid"]["trainset"]) == (run.id, run.trainset)
    assert found.data.eval_results[0].metric_value == 0.75
    assert "| species | 0.750 ± 0.020 | 0.500 | 40 |" in found.text
    assert "| pets | CC0-1.0 | 0.9 |" in found.text
    for heading in ("## Data and licences", "## Scores", "## Limits"):
        assert heading in found.text
    load_encoder(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == (tmp_path / "out" / "README.md").read_text()
    tuned = score | {"finetune": {}, "limit": 1000}
    atomic.publish_json(f"{own_copy.root.probe(RECIPE, run.id, 5, 'species', 'b' * 32)}/score.json", tuned)
    text = hub_card(own_copy, run)
    assert "| species, fine-tuned, at most 1,000 shots of each split | 0.750 ± 0.020 | 0.500 | 40 |" in text
    assert "name: fine-tuned\n" in text
    shutil.rmtree(own_copy.root.pointed("trainset", run.trainset))
    assert "Not recorded in this folder" in hub_card(own_copy, run)
