"""Events reach the file, the curves, and whoever watches: Dagster where it listens, plain lines elsewhere."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from dagster_pipes import encode_param
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nextvid.config.overrides import apply_how
from nextvid.config.recipe import ExecutionConfig, SinkName
from nextvid.train import sinks
from nextvid.train.diagnose import collapsed
from nextvid.train.events import PIPES_VARIABLE, Reporter, describe, read_events
from nextvid.train.sinks import open_sink, refuse_missing
from storage.errors import ConfigError

STEP = {
    "stage": "warmup", "draws": 8, "align": 1.0, "flow": 2.0, "loss": {"align/short": 1.25}, "norm": {"encoder": 0.5},
    "lr": 1e-4, "decoder_lr": 1e-4, "clips_per_s": 40.0, "step_s": 0.2, "wait_share": 0.01,
}  # fmt: skip


def test_without_dagster_plain_lines_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(tmp_path, "tensorboard", 0, [2])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "training: step 0/10 start run=abc",
        "training: step 2/10 warmup align 2.0000 flow 2.0000 lr 1.00e-04 40.0 clips/s wait 1.0%",
    ]
    assert [event["kind"] for event in read_events(tmp_path)] == ["start", "step"]
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert "step/loss/align/short" in curves.Tags()["scalars"]
    assert [(point.step, point.value) for point in curves.Scalars("step/norm/encoder")] == [(2, 0.5)]
    assert "step/time_s" not in curves.Tags()["scalars"]


def attempt(folder: Path, sink: SinkName, first: int, steps: list[int]) -> None:
    """An attempt at a run, from a checkpoint of step `first`."""
    with Reporter(
        folder, 10, open_sinks=lambda stack: [open_sink(sink, folder, "abc", {"seed": 0}, stack)]
    ) as reporter:
        reporter.event("start", first, {"run": "abc"})
        for step in steps:
            reporter.event("step", step, STEP | {"align": step})


@pytest.mark.parametrize("sink", ["tensorboard", "wandb", "trackio"])
def test_a_resumed_run_has_each_step_once(sink: SinkName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(sink)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    attempt(tmp_path, sink, 0, [2, 4, 6, 8])
    attempt(tmp_path, sink, 4, [6, 8, 10])
    assert points(sink, tmp_path) == [(step, float(step)) for step in (2, 4, 6, 8, 10)]


def points(sink: SinkName, folder: Path) -> list[tuple[int, float]]:
    """The curve `step/align` as a sink keeps it."""
    match sink:
        case "tensorboard":
            curves = EventAccumulator(str(folder / sink))
            curves.Reload()
            return [(point.step, point.value) for point in curves.Scalars("step/align")]
        case "wandb":
            import wandb
            from wandb.proto.wandb_internal_pb2 import Record

            wandb.teardown()  # its service writes when it ends
            (path,) = folder.glob("wandb/offline-run-*/*.wandb")
            data, at, part, found = path.read_bytes(), 7, b"", list[tuple[int, float]]()
            while at + 7 <= len(data):  # a log of LevelDB's, in blocks of 32 KiB, behind a header of 7 bytes
                if (rest := -at % 32768) and rest < 7:
                    at += rest
                length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
                part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
                if kind in (1, 4):  # whole, or the last part
                    record, part = Record.FromString(part), b""
                    values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                    if "step/align" in values:
                        found.append((record.history.step.num, float(values["step/align"])))
            return found
        case "trackio":
            from trackio.sqlite_storage import SQLiteStorage

            return [(row["step"], row["step/align"]) for row in SQLiteStorage.get_logs("nextvid", "abc")]


def test_a_sink_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_missing(["tensorboard"])
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="names wandb, and its package is not installed: pip install wandb"):
        refuse_missing(["wandb"])
    for given in ("tensorboard,wandb", "[tensorboard,wandb]", '["tensorboard","wandb"]'):
        assert apply_how(ExecutionConfig(), [f"sinks={given}"]).sinks == ("tensorboard", "wandb")
    with pytest.raises(ConfigError, match="'tensorboard', 'wandb' or 'trackio'"):
        apply_how(ExecutionConfig(), ["sinks=mlflow"])


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
