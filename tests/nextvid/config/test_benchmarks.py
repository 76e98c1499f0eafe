"""Protocols fill a benchmark's fields, which what is written beside them changes one by one; digests stay."""

from pathlib import Path
from typing import Any

import pytest

from nextvid.config.benchmarks import PROTOCOLS, BenchmarkConfig
from nextvid.config.corpus import load_corpus
from nextvid.config.strict import parse
from storage.digest import digest_config
from storage.errors import ConfigError

PAPER = Path(__file__).parents[3] / "examples" / "paper" / "corpus.yaml"


def benchmark(**values: Any) -> BenchmarkConfig:
    return parse(BenchmarkConfig, {"datasets": ["d"]} | values, "corpus.yaml")


@pytest.mark.parametrize(
    ("name", "segments", "views", "frames", "stride", "batch", "epochs", "levels", "heads"),
    [  # Tab. 10, and the sweeps of docs/method.md 9
        ("k400", 8, 3, 16, 4, 192, 20, 1, 20),
        ("in1k", 1, 1, 1, None, 384, 20, 1, 21),
        ("ssv2", 2, 3, 16, 4, 96, 20, 1, 20),
        ("diving48", 4, 3, 32, 2, 48, 100, 4, 3),
    ],
)
def test_a_protocol_is_that_of_the_paper(
    name: str, segments: int, views: int, frames: int, stride: int, batch: int, epochs: int, levels: int, heads: int
) -> None:
    found = benchmark(protocol=name)
    policy = found.policy
    assert (policy.clips_per_shot, policy.views, policy.frames, policy.stride) == (segments, views, frames, stride)
    assert (found.batch, found.epochs, found.levels, found.attention_heads) == (batch, epochs, levels, 16)
    assert sum(len(grid.rates) * len(grid.weight_decays) for grid in found.sweep) == heads
    assert found.augment == ("image" if name == "in1k" else "video")
    assert found.test_crop == (256 / 292 if name == "in1k" else 1)
    assert (found.target, found.train_views, found.judged, policy.crop) == ("class", "one", "file", "centre")
    assert policy.cut_from == ("shot" if name == "in1k" else "file"), "an image has no cut"


def test_every_field_of_a_protocol_can_be_written_beside_it() -> None:
    sweep = [{"rates": [1e-3], "weight_decays": [0.1]}]
    changed = {"target": "verb", "epochs": 3, "batch": 7, "levels": 2, "augment": "none", "sweep": sweep, "seeds": 4}
    found = benchmark(protocol="diving48", policy={"frames": 8, "views": 1}, **changed)
    assert (found.policy.frames, found.policy.views, found.policy.stride, found.policy.clips_per_shot) == (8, 1, 2, 4)
    assert {name: found.model_dump(mode="json")[name] for name in changed} == changed | {
        "sweep": [sweep[0] | {"warm_up_epochs": 0.0, "warm_up_from": 0.0}]
    }
    by_rate = benchmark(protocol="ssv2", policy={"fps": 3})
    assert (by_rate.policy.fps, by_rate.policy.stride) == (3, None), "a rate takes the place of the stride"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"protocol": "k4000"}, "there is no protocol 'k4000'; did you mean 'k400'"),
        ({"protocol": "SSv2"}, "did you mean 'ssv2'"),
        ({"protocol": "ucf101"}, "known: k400, ssv2, diving48, in1k, finetune"),
        ({"protocol": 400}, "'protocol': Input should be"),
        ({"protocol": "k400", "policy": {"frmes": 8}}, "did you mean 'frames'"),
        ({"protocol": "k400", "policy": 3}, "'policy'"),
        ({"protocol": "k400", "sweep": [{"rates": [], "weight_decays": [0.1]}]}, "'sweep.0.rates'"),
        ({}, "'target': Field required"),
        ({"protocol": "k400", "judged": "shot"}, "segments of whole files have one answer a file"),
        ({"protocol": "finetune", "seeds": 3}, "one seed and one level: 'seeds' has 3"),
        ({"protocol": "finetune", "levels": 4}, "'levels' has 4"),
        ({"protocol": "k400", "finetune": {}}, "'sweep' has 20"),
        ({"protocol": "finetune", "finetune": {"layer_decy": 1}}, "did you mean 'layer_decay'"),
    ],
)
def test_what_is_refused_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark(**values)


def test_fine_tuning_is_videomae_s_public_recipe_and_changes_field_by_field() -> None:
    found = benchmark(protocol="finetune", policy={"frames": 8}, finetune={"drop_path": 0.2})
    assert (found.policy.frames, found.policy.stride, found.policy.clips_per_shot, found.policy.views) == (8, 4, 5, 3)
    assert (found.batch, found.epochs, found.seeds, found.held_out, found.augment) == (512, 100, 1, 0.0, None)
    assert found.sweep[0].rates == (1e-3 * 512 / 256,)
    assert found.values()["finetune"] == {"layer_decay": 0.75, "drop_path": 0.2, "smoothing": 0.1}
    assert "finetune" not in benchmark(protocol="k400").values()


def test_a_benchmark_without_a_protocol_keeps_its_digest() -> None:
    policy = {"frames": 4, "fps": 4.0, "stride": None, "clips_per_shot": 1, "starts": "tile", "views": 1,
              "crop": "centre", "flip": False, "pad": "fit"}  # fmt: skip
    plain = {"datasets": ["d"], "target": "t", "policy": policy, "epochs": 20, "batch": 32, "seeds": 3}
    assert digest_config(benchmark(**plain).values()) == digest_config(plain)


def test_a_protocol_s_name_is_in_no_digest_and_its_values_are() -> None:
    named = benchmark(protocol="k400")
    written = benchmark(**PROTOCOLS["k400"])
    assert written.values() == named.values() != benchmark(protocol="ssv2").values()
    assert named.values()["train_views"] == "one"


def test_the_paper_s_corpus_names_the_four_protocols_and_the_public_layouts() -> None:
    corpus = load_corpus(PAPER)
    assert {name: found.protocol for name, found in corpus.benchmarks.items()} == {
        name: name for name in PROTOCOLS if name != "finetune"
    }
    layouts = {corpus.datasets[found.datasets[0]].labels.layout for found in corpus.benchmarks.values()}
    assert layouts == {"kinetics400", "imagenet", "ssv2", "diving48"}
