"""What the command line prints of outcomes: one line each, what was left out and why, what to look at."""

from typing import Any

from nextvid.making.outcome import Check, Outcome, line, to_look_at

FILMS = "films.000000"


def test_an_outcome_is_one_line() -> None:
    failed = (Check("budget", False), Check("finite", True))
    said = line(Outcome("media", FILMS, True, rows=7, size_bytes=1, seconds=1.25, quarantined=2, checks=failed))
    assert said.split() == [
        "media",
        FILMS,
        "made",
        "7",
        "rows,",
        "2",
        "quarantined",
        "1.2",
        "s,",
        "failed:",
        "budget",
    ]


def test_a_failed_check_says_what_it_found() -> None:
    failed = Check("checkpoint_loads", False, {"step": 5}, description="step_000000005/ema.safetensors: bytes differ")
    (first, second) = line(Outcome("pretrain", "demo", False, 1, 1, 0.0, checks=(failed,))).splitlines()
    assert first.endswith("failed: checkpoint_loads")
    assert second == "    failed: checkpoint_loads: step_000000005/ema.safetensors: bytes differ"


def test_what_was_left_out_is_a_second_line() -> None:
    numbers = {"ok": 4, "rejected": 3, "quarantined": 1, "reason_frozen": 3, "reason_corrupt": 1}
    clips = Outcome("clips", FILMS, True, rows=8, size_bytes=1, seconds=1.0, numbers=numbers)
    assert line(clips).splitlines()[1:] == ["    left out: 3 rejected and 1 quarantined (frozen 3, corrupt 1)"]
    labels: dict[str, int | str] = {"labels_without_file": 2, "labels_without_file_such_as": "d: 'gone.mp4'"}
    sources = Outcome("sources", None, True, rows=8, size_bytes=1, seconds=1.0, numbers=labels)
    assert line(sources).endswith("left out: 2 labels without a file (such as d: 'gone.mp4')")
    assert "\n" not in line(Outcome("clips", FILMS, True, rows=8, size_bytes=1, seconds=1.0, numbers={"ok": 8}))


def test_what_stood_there_is_up_to_date() -> None:
    assert "up to date" in line(Outcome("sources", None, False, rows=7, size_bytes=1, seconds=0.0))


def outcome(asset: str, *checks: Check, partition: str | None = None, **numbers: Any) -> Outcome:
    return Outcome(asset, partition, True, rows=8, size_bytes=1, seconds=1.0, numbers=numbers, checks=checks)


def test_held_out_is_its_own_word_and_a_warning_its_own_line() -> None:
    warning = Check("same_frames", False, {"rows": 4}, description="a.mp4: differs")
    found = line(outcome("clips", warning, rejected=2, held_out=5, reason_frozen=2)).splitlines()
    assert "failed" not in found[0]
    assert found[1:] == [
        "    warning: same_frames: a.mp4: differs",
        "    left out: 2 rejected (frozen 2); 5 held out of training by their split",
    ]


def test_each_kind_of_number_is_said_with_its_reasons() -> None:
    sources: dict[str, Any] = {"ignored": 3, "ignored_.txt": 2, "ignored_no extension": 1}
    assert line(outcome("sources", **sources)).endswith(
        "left out: 3 files ignored by extension (.txt 2, no extension 1)"
    )
    trainset: dict[str, Any] = {
        "batches_left_out": 1,
        "left_out": "d.000001: no latents",
        "dropped": 3,
        "dropped_copy": 3,
    }
    assert line(outcome("trainset", **trainset)).endswith(
        "left out: 1 batches (d.000001: no latents); 3 rows dropped (copy 3)"
    )
    assert line(outcome("clips", unlabelled=2, unlabelled_pets=2)).endswith(
        "left out: 2 clips without a benchmark's label (pets 2)"
    )
    assert "left out" not in line(outcome("clips", ok=3, rejected=0, ignored=0, dropped=0))


def test_the_last_line_names_checks_and_counts() -> None:
    fine = outcome("sources", Check("a", True), ignored=0)
    assert to_look_at([fine]) == "nothing to look at: all checks passed, nothing was left out"
    bad = [outcome("media", Check("budget", False), partition=f"d.{n:06d}", quarantined=2) for n in range(7)]
    warned = outcome("latents", Check("same_frames", False), partition="d.000000", rejected=4)
    named = ", ".join(f"media d.{n:06d}: budget" for n in range(5))
    assert to_look_at([fine, *bad, warned]) == (
        f"to look at: 7 failed checks ({named}, and 2 more); 1 warning (latents d.000000: same_frames); "
        "14 quarantined (media); 4 rejected (latents)"
    )
