"""Events reach the file, the curves, and whoever watches: Dagster where it listens, plain lines elsewhere."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from dagster_pipes import encode_param
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nextvid.train.diagnose import collapsed
from nextvid.train.events import PIPES_VARIABLE, Reporter, describe, read_events

STEP = {
    "stage": "warmup", "draws": 8, "align": 1.0, "flow": 2.0, "loss": {"align/short": 1.25}, "norm": {"encoder": 0.5},
    "lr": 1e-4, "decoder_lr": 1e-4, "clips_per_s": 40.0, "step_s": 0.2, "wait_share": 0.01,
}  # fmt: skip


def test_without_dagster_plain_lines_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(tmp_path, 10) as reporter:
        reporter.event("start", 0, {"run": "abc"})
        reporter.event("step", 2, STEP)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "training: step 0/10 start run=abc",
        "training: step 2/10 warmup align 1.0000 flow 2.0000 lr 1.00e-04 40.0 clips/s wait 1.0%",
    ]
    assert [event["kind"] for event in read_events(tmp_path)] == ["start", "step"]
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert "step/loss/align/short" in curves.Tags()["scalars"]
    assert [(point.step, point.value) for point in curves.Scalars("step/norm/encoder")] == [(2, 0.5)]
    assert "step/time_s" not in curves.Tags()["scalars"]


def test_a_loss_that_is_no_number_is_told_as_it_is() -> None:
    line = describe({"kind": "step", "step": 1, **STEP, "align": "nan"}, 4)
    assert "align nan flow 2.0000" in line


def test_dagster_gets_every_event_as_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = {
        "asset_keys": ["pretrain"], "code_version_by_asset_key": {"pretrain": "1"}, "run_id": "r", "job_name": None,
        "provenance_by_asset_key": {"pretrain": None}, "partition_key": "demo", "partition_key_range": None,
        "partition_time_window": None, "retry_number": 0, "extras": {},
    }  # fmt: skip
    messages = tmp_path / "messages"
    monkeypatch.setenv(PIPES_VARIABLE, encode_param({"data": context}))
    monkeypatch.setenv("DAGSTER_PIPES_MESSAGES", encode_param({"path": str(messages)}))
    with Reporter(tmp_path, 10) as reporter:
        reporter.event("step", 2, STEP)
    sent = [json.loads(line) for line in messages.read_text().splitlines()]
    methods = [message["method"] for message in sent]
    assert (methods[0], methods[-1]) == ("opened", "closed")
    payload = next(m["params"]["payload"] for m in sent if m["method"] == "report_custom_message")
    assert (payload["kind"], payload["step"], payload["loss"]) == ("step", 2, {"align/short": 1.25})
    assert any(m["method"] == "log" and "step 2/10" in m["params"]["message"] for m in sent)
    assert capsys.readouterr().out == ""


def test_dagster_pipes_is_imported_only_where_it_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nextvid.train.events import Reporter\n"
        "with Reporter(Path(sys.argv[1]), 1) as r: r.event('start', 0, {})\n"
        "assert not [name for name in sys.modules if name.startswith('dagster')]"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("rank", "step", "sounds"), [(5.9, 25, True), (6.0, 25, False), (5.9, 24, False), (math.nan, 99, True)]
)
def test_alarm_below_three_tenths_of_the_first_after_a_quarter(rank: float, step: int, sounds: bool) -> None:
    assert collapsed(rank, 20.0, step, 100) is sounds
