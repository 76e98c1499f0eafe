"""corpus.yaml: what is refused, how paths resolve, and what changes the curation digest."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nextvid.config.corpus import CorpusConfig, corpus_path, encoder_names, load_corpus
from nextvid.config.project import open_project
from storage.errors import ConfigError

POLICY: dict[str, Any] = {"frames": 4, "fps": 4}
GOOD: dict[str, Any] = {
    "root": "data",
    "encoding": {"autoencoder": "ae"},
    "datasets": {
        "films": {
            "uri": "films",
            "weight": 1,
            "clips": [POLICY],
            "labels": {"layout": "csv", "file": "l.csv", "path_base": ".", "targets": {"action": "label"}},
        },
        "web": {"uri": "s3://bucket/web"},
    },
    "benchmarks": {"acts": {"datasets": ["films"], "target": "action", "policy": POLICY}},
}


def changed(*path: str, value: Any) -> dict[str, Any]:
    """GOOD with one value set, or removed for None."""
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(GOOD))
    place = result
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return result


def load(folder: Path, values: Any) -> CorpusConfig:
    file = folder / "corpus.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_corpus(file)


def test_files_are_held_out_where_a_benchmark_tests_or_corpus_yaml_says_so(tmp_path: Path) -> None:
    films, web = (load(tmp_path, GOOD).datasets[name].split for name in ("films", "web"))
    assert (films.test, web.test, web.val) == (0.2, 0.0, 0.0)
    without = load(tmp_path, changed("benchmarks", value={}))
    assert without.datasets["films"].split.test == 0.0
    written = load(tmp_path, changed("datasets", "web", "split", value={"val": 0.1}))
    assert (written.datasets["web"].split.test, written.datasets["web"].split.val) == (0.2, 0.1)
    assert without.curation_digest("films") != load(tmp_path, GOOD).curation_digest("films"), "it waits for acceptance"


def test_the_default_clock_is_in_no_digest_and_another_is(tmp_path: Path) -> None:
    given, default, other = (
        load(tmp_path, changed("datasets", "films", "labels", value=GOOD["datasets"]["films"]["labels"] | more))
        for more in ({}, {"clock": "first_frame"}, {"clock": "file"})
    )
    assert given.curation_digest() == default.curation_digest() != other.curation_digest()


def test_paths_resolve_against_the_file_and_urls_stay(tmp_path: Path) -> None:
    corpus = load(tmp_path, GOOD)
    films, web = corpus.datasets["films"], corpus.datasets["web"]
    assert (corpus.root, corpus.encoding.autoencoder) == (str(tmp_path / "data"), str(tmp_path / "ae"))
    assert (films.uri, films.labels.file, films.labels.path_base) == (
        str(tmp_path / "films"),
        str(tmp_path / "l.csv"),
        str(tmp_path),
    )
    assert web.uri == "s3://bucket/web"
    assert corpus.weights() == {"films": 1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("encodign", value={}), "unknown key 'encodign'; did you mean 'encoding'"),
        (changed("datasets", "films", "wieght", value=1), "did you mean 'weight'"),
        (changed("datasets", "films", "clips", value=[]), "a dataset with a weight needs at least one clip policy"),
        (changed("datasets", "films", "weight", value=0), "greater than 0"),
        (changed("datasets", "Films!", value={"uri": "x"}), "'Films!' is not a name"),
        (changed("datasets", "films", "clips", value=[{"frames": 4}]), "exactly one of 'fps' and 'stride'"),
        (changed("datasets", "films", "clips", value=[POLICY | {"stride": 2}]), "exactly one of 'fps' and 'stride'"),
        (changed("datasets", "films", "split", value={"val": 0.5, "test": 0.6}), "add up to more than 1"),
        (changed("datasets", "films", "labels", value={"layout": "csv"}), "need 'file'"),
        (changed("datasets", "films", "labels", value={"layout": "folders", "file": "x"}), "belong to layout 'csv'"),
        (
            changed("datasets", "films", "labels", value={"layout": "folders", "targets": {"a": "", "b": ""}}),
            "one target",
        ),
        (changed("datasets", "films", "labels", "targets", value={"split": "s"}), "reserved"),
        (changed("benchmarks", "acts", "datasets", value=["film"]), "names dataset 'film'"),
        (changed("benchmarks", "acts", "policy", value=POLICY | {"flip": True}), "never flipped"),
        (changed("benchmarks", "acts", "datasets", value=[]), "at least 1 item"),
        (changed("benchmarks", "acts", "seeds", value=0), "greater than or equal to 1"),
        (changed("encoding", "resolution", value=-5), "greater than or equal to 1"),
        (changed("execution", value={"batch_frames": 0}), "greater than or equal to 1"),
        (changed("encoding", "batch_frames", value=64), "'encoding.batch_frames' is 'execution.batch_frames' now"),
        (changed("encoding", "device", value="cpu"), "move it to the block 'execution'"),
        (changed("min_complete", value=7), "less than or equal to 1"),
        (changed("cache", value={"size_gb": float("inf")}), "finite"),
        (changed("curation", value={"shots": {"sample_hz": 0}}), "greater than 0"),
        (changed("curation", value={"filters": {"motion_min": float("nan")}}), "finite"),
        (changed("curation", value={"duplicates": {"distance": 32}}), "less than or equal to 31"),
        ([1], "expected keys such as 'root"),
        (changed("root", value="http://[::1"), "root: not a URL"),
        (changed("root", value="simplecache::s3://bucket/a"), "root: protocol 'simplecache::s3' is not among"),
        (changed("datasets", "web", "uri", value="github://owner:repo@main/x"), "protocol 'github' is not among"),
        (changed("datasets", "web", "uri", value="zip://a.mp4::https://host/b.zip"), "protocol 'zip' is not among"),
        (changed("datasets", "web", "uri", value="http://[::1"), "datasets.web.uri: not a URL"),
        (changed("root", value=["s3://me:password@bucket/a"]), r"valid string \(got \['s3://\*\*\*@bucket/a'\]\)"),
        ({1: 2} | GOOD, "Keys should be strings"),
        (GOOD | {f"k{n}": n for n in range(1000)}, "and 990 problems more"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, values)


def test_no_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no corpus\.yaml"):
        load_corpus(tmp_path / "corpus.yaml")
    (tmp_path / "corpus.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_corpus(tmp_path / "corpus.yaml")


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("films", "films", True),
        ("films/", "films", True),
        ("films", "films/train", True),
        ("films/train", "films", True),
        ("films", "films2", False),
        ("films/a", "films/b", False),
        ("s3://bucket/a", "s3://bucket/a/b", True),
    ],
)
def test_two_datasets_that_list_the_same_files_are_refused(
    tmp_path: Path, first: str, second: str, refused: bool
) -> None:
    values = GOOD | {"datasets": {"one": {"uri": first}, "two": {"uri": second}}, "benchmarks": {}}
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(values))
    if not refused:
        assert set(load_corpus(tmp_path / "corpus.yaml").datasets) == {"one", "two"}
        return
    with pytest.raises(ConfigError, match="would belong to both") as caught:
        load_corpus(tmp_path / "corpus.yaml")
    assert "'one'" in str(caught.value)
    assert "'two'" in str(caught.value)


def test_the_file_is_found_by_argument_then_variable_then_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEXTVID_CORPUS", raising=False)
    assert corpus_path() == tmp_path / "corpus.yaml"
    monkeypatch.setenv("NEXTVID_CORPUS", str(tmp_path / "other.yaml"))
    assert corpus_path() == tmp_path / "other.yaml"
    assert corpus_path("third.yaml") == tmp_path / "third.yaml"


def test_a_benchmark_looks_at_the_centre_unless_its_protocol_says_so(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).benchmarks["acts"].policy.crop == "centre"
    asked = changed("benchmarks", "acts", "policy", value=POLICY | {"crop": "random"})
    assert load(tmp_path, asked).benchmarks["acts"].policy.crop == "random"
    assert load(tmp_path, GOOD).datasets["films"].clips[0].crop == "random"


def test_the_curation_digest_follows_what_decides_rows_and_no_path(tmp_path: Path) -> None:
    digest = load(tmp_path, GOOD).curation_digest()
    same = [
        changed("root", value="elsewhere"),
        changed("datasets", "films", "uri", value="elsewhere"),
        changed("datasets", "films", "labels", "file", value="m.csv"),
        changed("datasets", "films", "labels", "path_base", value=None),
        changed("datasets", "films", "weight", value=2),
        changed("benchmarks", "acts", "epochs", value=5),
    ]
    other = [
        changed("curation", value={"filters": {"motion_min": 0.2}}),
        changed("datasets", "films", "clips", value=[POLICY, {"frames": 8, "fps": 4}]),
        changed("datasets", "films", "split", value={"test": 0.3}),
        changed("datasets", "films", "labels", "targets", value={"action": "verb"}),
        changed("benchmarks", "acts", "policy", value=POLICY | {"clips_per_shot": 2}),
    ]
    assert {load(tmp_path, values).curation_digest() for values in same} == {digest}
    digests = {load(tmp_path, values).curation_digest() for values in other}
    assert len(digests) == len(other)
    assert digest not in digests


def test_the_curation_digest_of_a_dataset_is_its_own(tmp_path: Path) -> None:
    digest = load(tmp_path, GOOD).curation_digest("films")
    more = load(tmp_path, changed("datasets", "added", value={"uri": "added"}))
    assert more.curation_digest("films") == digest
    assert more.curation_digest() != load(tmp_path, GOOD).curation_digest()
    cut = load(tmp_path, changed("datasets", "films", "split", value={"test": 0.3}))
    probed = load(tmp_path, changed("benchmarks", "acts", "policy", value=POLICY | {"clips_per_shot": 2}))
    assert len({digest, cut.curation_digest("films"), probed.curation_digest("films")}) == 3


def test_a_project_opens_its_root(tmp_path: Path) -> None:
    load(tmp_path, GOOD)
    project = open_project(tmp_path / "corpus.yaml")
    assert (project.root.url, project.root.runs_url) == (str(tmp_path / "data"), str(tmp_path / "data"))
    bucket = changed("root", value="s3://bucket/root")
    load(tmp_path, bucket)
    with pytest.raises(ConfigError, match="'runs_root'"):
        open_project(tmp_path / "corpus.yaml")


def test_encoders_have_paths_names_and_are_partitions_where_the_file_is_valid(tmp_path: Path) -> None:
    encoders = {"control": {"family": "vit_mae", "folder": "mae"}, "colours": {"family": "pixels"}}
    found = load(tmp_path, GOOD | {"encoders": encoders})
    assert (found.encoders["control"].folder, found.encoders["colours"].folder) == (str(tmp_path / "mae"), None)
    assert found.curation_digest() == load(tmp_path, GOOD).curation_digest()
    load(tmp_path, GOOD | {"encoders": encoders})
    assert set(encoder_names(tmp_path / "corpus.yaml")) == {"control", "colours"}
    with pytest.raises(ConfigError, match="'Mine!' is not a name"):
        load(tmp_path, GOOD | {"encoders": {"Mine!": {"family": "pixels"}}})
    assert encoder_names(tmp_path / "corpus.yaml") == ()
