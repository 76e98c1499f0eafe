"""`nextvid inspect`: the numbers of the model, in words and as JSON."""

import json
import re
import subprocess
import sys

import pytest

from nextvid.commands import inspect
from nextvid.config.recipe import ExecutionConfig
from nextvid.config.recipes import recipe
from nextvid.model.cost import cost, summary
from nextvid.model.memory import CARDS_GB, report


def test_every_part_and_stage_is_named() -> None:
    found, reckoned = recipe("nextvid_l_latent"), cost(recipe("nextvid_l_latent"))
    text = summary(found, reckoned)
    assert text.splitlines()[0] == f"nextvid_l_latent  {found.digest()}"
    assert re.search(r"encoder +302\.38 M", text)  # 303.9 less the embedding of 1536 numbers, plus one of 64
    for stage in reckoned.stages:
        assert f"stage {stage.name}: {stage.clips} clips of {stage.frames} frames" in text
        assert f"{stage.clip_flops / 1e12:.3f} TFLOP" in text
    assert re.search(r"short \(60 cells\), encoder +420 tokens", text)
    assert max(map(len, text.splitlines())) <= 100


def test_every_stage_is_weighed_on_usual_devices() -> None:
    found = recipe("nextvid_g")
    lines = report(found, ExecutionConfig()).splitlines()
    assert max(map(len, lines)) <= 100
    for stage in found.stages:
        (row,) = (line for line in lines if line.startswith(f"  {stage.name}, "))
        remedies = [line for line in lines if line.startswith(f"  {stage.name} on ")]
        assert all("add --how " in line for line in remedies)
        assert row.count("no") == len(remedies) < len(CARDS_GB)


def test_parts_that_are_not_there_are_not_listed() -> None:
    text = summary(recipe("ablation_gen_isolated"), cost(recipe("ablation_gen_isolated")))
    assert ", predictor" not in text
    assert "reference encoder" not in text
    assert ", decoder" in text


def test_flops_of_a_small_model_do_not_read_as_zero() -> None:
    found = cost(recipe("demo"))
    text = summary(recipe("demo"), found)
    assert f"{found.stages[0].clip_flops / 1e9:.3f} GFLOP" in text
    assert not re.search(r" 0\.000 [TG]FLOP", text)


def test_command_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    inspect("demo")
    assert capsys.readouterr().out.startswith("demo  ")
    inspect("demo", json_=True)
    found = json.loads(capsys.readouterr().out)
    assert found["digest"] == recipe("demo").digest()
    assert found["model"]["encoder"]["width"] == 128
    assert found["cost"]["parameters"] == cost(recipe("demo")).parameters
    assert found["cost"]["stages"][3]["name"] == "cooldown"
    assert found["memory"]["cooldown"]["share"] == 8


def test_the_command_takes_overrides_and_knows_the_recipes() -> None:
    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nextvid", "inspect", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    smaller = ran("demo", "--set", "model.encoder.depth=2", "--json")
    assert json.loads(smaller.stdout)["model"]["encoder"]["depth"] == 2
    misspelt = ran("demo", "--set", "model.encoder.depht=2")
    assert (misspelt.returncode, misspelt.stdout) == (2, "")
    assert "did you mean 'depth'?" in misspelt.stderr
    assert ran("trainset").returncode == 2
