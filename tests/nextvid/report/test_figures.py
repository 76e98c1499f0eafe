"""Curves and scatter plots: drawn from events with gaps, and t-SNE that keeps apart what is apart."""

import io
from typing import Any

import numpy as np
from PIL import Image

from nextvid.report import training
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
