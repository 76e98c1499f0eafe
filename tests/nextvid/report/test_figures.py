"""Curves and scatter plots: drawn from events with gaps, and t-SNE that keeps apart what is apart."""

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from nextvid.lineage.compare import Reached
from nextvid.pictures import png
from nextvid.report import curves, training
from nextvid.report.scores import colour, scatter_png, tsne
from nextvid.report.training import curves_png


def events() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"kind": "stage", "step": 0}, {"kind": "stage", "step": 2}]
    for step in range(1, 5):
        loss = {"align/short": 1.0 / step, "flow/short": "nan" if step == 2 else 2.0 / step}
        found.append(
            {"kind": "step", "step": step, "loss": loss, "norm": {"encoder": 1.0}, "lr": 1e-3, "decoder_lr": 1e-3}
        )
    found.append({"kind": "diagnostics", "step": 0, "effective_rank": 20.0, "online_effective_rank": 20.0})
    return [*found, {"kind": "diagnostics", "step": 4, "effective_rank": 18.0, "online_effective_rank": 21.0}]


def test_curves_follow_the_events() -> None:
    steps = [event for event in events() if event["kind"] == "step"]
    found = {name: y for name, _, y in training._nested(steps, "loss")}
    assert found["align, short"] == [1.0, 0.5, 1 / 3, 0.25]
    assert np.isnan(found["flow, short"][1])  # a gap, not a zero
    image = Image.open(io.BytesIO(curves_png(events())))
    assert image.mode == "RGBA"
    assert image.getpixel((2, 2)) == (255, 255, 255, 0) or image.getpixel((2, 2))[3] == 0  # type: ignore[index]


def test_curves_of_a_run_that_logged_nothing() -> None:
    Image.open(io.BytesIO(curves_png([]))).verify()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures of curves as they were drawn."""
    return kept(monkeypatch, "nextvid.report.curves.png")


def kept(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Figure]:
    found: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        found.append(figure)
        return png(figure)

    monkeypatch.setattr(name, keep)
    return found


def test_stages_are_shaded_under_every_curve_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kept(monkeypatch, "nextvid.report.training.png")
    curves_png(
        [event | {"name": f"stage_{event['step']}"} if event["kind"] == "stage" else event for event in events()]
    )
    losses, *others = found[0].axes
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in losses.patches]  # type: ignore[attr-defined]
    assert spans == [(0, 2), (2, 4)]
    assert [text.get_text() for text in losses.texts] == ["stage 0", "stage 2"]
    assert all(len(panel.patches) == 2 for panel in others)


def test_scores_while_training_have_panels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kept(monkeypatch, "nextvid.report.training.png")
    accuracy = {"motion/knn": 0.1, "motion/knn_by_change": 0.5, "motion/linear": 0.6, "things/knn": 0.3}
    curves_png([*events(), {"kind": "scores", "step": 4, "accuracy": accuracy | {"things/linear": 0.4}}])
    drawn = [{line.get_label(): line.get_ydata() for line in panel.lines} for panel in found[0].axes[4:]]
    assert drawn == [{"motion": [0.6], "things": [0.4]}, {"motion": [0.5], "things": [0.3]}]


def test_accuracy_over_clips_has_a_curve_for_each_encoder_and_chance_level_of_random(drawn: list[Figure]) -> None:
    def record(accuracy: float) -> dict[str, Any]:
        encoders = {"ema": accuracy, "online": accuracy - 0.1, "random": 0.3}
        return {"encoders": {name: {"accuracy": v, "standard_error": 0.01} for name, v in encoders.items()}}

    names = {"ema": "EMA", "online": "online", "random": "random"}
    curves.over_clips_png({"k400": [(10, record(0.4)), (20, record(0.6))], "ssv2": [(10, record(0.5))]}, names)
    panel = drawn[0].axes[0]
    assert panel.lines[0].get_xydata().tolist() == [[10, 0.4], [20, 0.6]]  # type: ignore[union-attr]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["random", "EMA", "online"]  # type: ignore[union-attr]
    assert [axes.get_title(loc="left").split(":")[0] for axes in drawn[0].axes[:2]] == ["k400", "ssv2"]


def test_accuracy_over_size_joins_what_two_runs_share(drawn: list[Figure]) -> None:
    runs = [
        Reached("b", "large", 300_000_000, 1, {"k400[a]": 0.8, "ssv2[a]": 0.6}),
        Reached("a", "small", 30_000_000, 1, {"k400[a]": 0.7}),
    ]
    Image.open(io.BytesIO(curves.over_size_png(runs))).verify()
    assert [axes.get_title(loc="left").split(":")[0] for axes in drawn[0].axes if axes.axison] == ["k400[a]"]
    assert drawn[0].axes[0].lines[0].get_xydata().tolist() == [[30, 0.7], [300, 0.8]]  # type: ignore[union-attr]
    Image.open(io.BytesIO(curves.over_size_png([]))).verify()


def test_t_sne_keeps_groups_apart_and_is_repeatable() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    features = rng.normal(size=(60, 12)) + 12 * labels[:, None]
    places = tsne(features)
    centres = np.stack([places[labels == n].mean(0) for n in (0, 1)])
    nearest = np.linalg.norm(places[:, None] - centres, axis=-1).argmin(1)
    np.testing.assert_array_equal(nearest, labels)
    np.testing.assert_allclose(tsne(features), places)


def test_a_handful_of_clips_still_gives_a_picture() -> None:
    for clips in (1, 2, 4):
        features = np.random.default_rng(0).normal(size=(clips, 5)).astype(np.float32)
        Image.open(io.BytesIO(scatter_png({"a": features}, np.zeros(clips, int), ["one", "never seen"]))).verify()


def test_colours_differ() -> None:
    assert len({colour(n, 12) for n in range(12)}) == 12
