"""Public data sets' lists on small trees of the shapes in which they are published."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextvid.config.datasets import DatasetConfig, LabelConfig
from nextvid.corpus.labels import contradictions, doubled, label_digests, label_files, read_labels
from storage.errors import ConfigError, CorpusError
from tests.factories import write_project

Rows = list[tuple[Any, ...]]


def rows(config: DatasetConfig, *paths: str) -> Rows:
    return list(read_labels(config, paths).iter_rows())


def without_file(config: DatasetConfig, paths: list[str]) -> list[str]:
    return sorted(name for file in label_files(config, paths) for name in file.without)


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """A function that writes the label files (split or `classes` -> (name, text)) and configures a dataset of them."""

    def configure(layout: str, files: dict[str, tuple[str, str]] | None = None, **labels: Any) -> DatasetConfig:
        written = {}
        for role, (name, text) in (files or {}).items():
            (tmp_path / name).write_text(text, encoding="utf-8")
            written[role] = str(tmp_path / name)
        given = {"layout": layout, "files": written} | labels
        return DatasetConfig(uri=str(tmp_path / "d"), labels=LabelConfig.model_validate(given))

    return configure


def test_imagenet(dataset: Callable[..., DatasetConfig]) -> None:
    solution = (
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00048981,n03995372 85 1 499 272 \n"
        "ILSVRC2012_val_00037956,n03481172 131 0 499 254 n03481172 0 0 9 9 \n"
    )
    config = dataset("imagenet", {"val": ("LOC_val_solution.csv", solution)}, split_names={"val": "test"})
    found = rows(
        config,
        "ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_10026.JPEG",
        "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00048981.JPEG",
        "val/n01443537/ILSVRC2012_val_00000236.JPEG",
        "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG",
        "elsewhere.jpg",
    )
    assert found == [
        ("ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG", None, None, "split", "test"),
        ("ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_10026.JPEG", None, None, "class", "n01440764"),
        ("ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_10026.JPEG", None, None, "split", "train"),
        ("ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00048981.JPEG", None, None, "class", "n03995372"),
        ("ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00048981.JPEG", None, None, "split", "test"),
        ("val/n01443537/ILSVRC2012_val_00000236.JPEG", None, None, "class", "n01443537"),
        ("val/n01443537/ILSVRC2012_val_00000236.JPEG", None, None, "split", "test"),
    ]
    renamed = dataset("imagenet", split_names={"Held": "test", "val": "test"})
    paths = [f"{folder}/n01440764/{folder}.JPEG" for folder in ("Training", "validation", "held", "other")]
    assert [row[0::4] for row in rows(renamed, *paths) if row[3] == "split"] == [
        ("Training/n01440764/Training.JPEG", "train"),
        ("held/n01440764/held.JPEG", "test"),
        ("validation/n01440764/validation.JPEG", "test"),
    ]
    assert rows(dataset("imagenet"), "n01440764/n01440764_1.JPEG") == [
        ("n01440764/n01440764_1.JPEG", None, None, "class", "n01440764")
    ]


def test_class_folders_may_hold_files_of_one_name(dataset: Callable[..., DatasetConfig]) -> None:
    config = dataset("imagenet", split_names={"val": "test"})
    paths = ["train/n01440764/0.png", "train/n01443537/0.png", "val/n01440764/0.png"]
    assert doubled(config, [*paths, "0.png"]) == {}
    assert rows(config, *paths) == [
        ("train/n01440764/0.png", None, None, "class", "n01440764"),
        ("train/n01440764/0.png", None, None, "split", "train"),
        ("train/n01443537/0.png", None, None, "class", "n01443537"),
        ("train/n01443537/0.png", None, None, "split", "train"),
        ("val/n01440764/0.png", None, None, "class", "n01440764"),
        ("val/n01440764/0.png", None, None, "split", "test"),
    ]
    assert doubled(config, ["a/0.png", "b/0.png"]) == {"a/0.png": "b/0.png", "b/0.png": "a/0.png"}


def test_kinetics400(dataset: Callable[..., DatasetConfig]) -> None:
    train = (
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "testifying,---QUuC4vJs,84,94,train,0\n"
        '"eating, spaghetti",--3ouPhoy2A,20,30,train,0\n'
        "abseiling,gone0000000,1,11,train,0\n"
    )
    val = "label,youtube_id,time_start,time_end,split\nabseiling,-3B32lodo2M,59,69,validate\n"
    test = "youtube_id,time_start,time_end,split\n--8fdQdpxiM,20,30,test\n"
    config = dataset(
        "kinetics400",
        {"train": ("train.csv", train), "all": ("val.csv", val), "test": ("test.csv", test)},
        targets={"action": ""},
    )
    paths = [
        "train/---QUuC4vJs_000084_000094.mp4",
        "train/eating, spaghetti/--3ouPhoy2A.mp4",
        "val/abseiling/-3B32lodo2M_000059_000069.mkv",
        "test/--8fdQdpxiM_000020_000030.mp4",
    ]
    assert rows(config, *paths) == [
        ("test/--8fdQdpxiM_000020_000030.mp4", None, None, "group", "--8fdQdpxiM"),
        ("test/--8fdQdpxiM_000020_000030.mp4", None, None, "split", "test"),
        ("train/---QUuC4vJs_000084_000094.mp4", None, None, "action", "testifying"),
        ("train/---QUuC4vJs_000084_000094.mp4", None, None, "group", "---QUuC4vJs"),
        ("train/---QUuC4vJs_000084_000094.mp4", None, None, "split", "train"),
        ("train/eating, spaghetti/--3ouPhoy2A.mp4", None, None, "action", "eating, spaghetti"),
        ("train/eating, spaghetti/--3ouPhoy2A.mp4", None, None, "group", "--3ouPhoy2A"),
        ("train/eating, spaghetti/--3ouPhoy2A.mp4", None, None, "split", "train"),
        ("val/abseiling/-3B32lodo2M_000059_000069.mkv", None, None, "action", "abseiling"),
        ("val/abseiling/-3B32lodo2M_000059_000069.mkv", None, None, "group", "-3B32lodo2M"),
        ("val/abseiling/-3B32lodo2M_000059_000069.mkv", None, None, "split", "val"),
    ]
    assert without_file(config, paths) == ["gone0000000_000001_000011"]
    found = [(Path(one.file).name, len(one.with_file), len(one.without)) for one in label_files(config, paths[:2])]
    assert found == [("val.csv", 0, 1), ("test.csv", 0, 1), ("train.csv", 2, 1)]  # each file by itself


SSV2 = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "42326", "label": "putting a pen", "template": "Putting [something] on a surface", "placeholders": ["pen"]},
]
SSV2_CLASSES = {"Holding something next to something": "0", "Putting something on a surface": "1"}


def test_something_something(dataset: Callable[..., DatasetConfig]) -> None:
    config = dataset(
        "ssv2",
        {
            "train": ("something-something-v2-train.json", json.dumps(SSV2[:1])),
            "val": ("something-something-v2-validation.json", json.dumps(SSV2[1:])),
            "test": ("something-something-v2-test.json", '[{"id": "151201"}]'),
            "classes": ("something-something-v2-labels.json", json.dumps(SSV2_CLASSES)),
        },
    )
    assert rows(config, "78687.webm", "20bn-something-something-v2/42326.webm", "151201.webm", "1.webm") == [
        ("151201.webm", None, None, "split", "test"),
        ("20bn-something-something-v2/42326.webm", None, None, "class", "Putting something on a surface"),
        ("20bn-something-something-v2/42326.webm", None, None, "split", "val"),
        ("78687.webm", None, None, "class", "Holding something next to something"),
        ("78687.webm", None, None, "split", "train"),
    ]
    answers = dataset("ssv2", {"test": ("test-answers.csv", "151201;Putting something on a surface\n1420;Holding\n")})
    assert rows(answers, "151201.webm") == [
        ("151201.webm", None, None, "class", "Putting something on a surface"),
        ("151201.webm", None, None, "split", "test"),
    ]


def test_diving48(dataset: Callable[..., DatasetConfig]) -> None:
    vocabulary = [["Back", "15som", "05Twis", "FREE"], ["Forward", "25som", "NoTwis", "PIKE"]]
    train = [{"vid_name": "_8Vy3dlHg2w_00000", "label": 1, "start_frame": 0, "end_frame": 166}]
    test = [{"vid_name": "nDhgYUXzWpU_00012", "label": 0, "start_frame": 0, "end_frame": 130}]
    files = {
        "train": ("Diving48_V2_train.json", json.dumps(train)),
        "test": ("Diving48_V2_test.json", json.dumps(test)),
    }
    config = dataset("diving48", files | {"classes": ("Diving48_vocab.json", json.dumps(vocabulary))})
    assert rows(config, "rgb/_8Vy3dlHg2w_00000.mp4", "rgb/nDhgYUXzWpU_00012.mp4") == [
        ("rgb/_8Vy3dlHg2w_00000.mp4", None, None, "class", "Forward_25som_NoTwis_PIKE"),
        ("rgb/_8Vy3dlHg2w_00000.mp4", None, None, "group", "_8Vy3dlHg2w"),
        ("rgb/_8Vy3dlHg2w_00000.mp4", None, None, "split", "train"),
        ("rgb/nDhgYUXzWpU_00012.mp4", None, None, "class", "Back_15som_05Twis_FREE"),
        ("rgb/nDhgYUXzWpU_00012.mp4", None, None, "group", "nDhgYUXzWpU"),
        ("rgb/nDhgYUXzWpU_00012.mp4", None, None, "split", "test"),
    ]
    assert ("_8Vy3dlHg2w_00000.mp4", None, None, "class", "1") in rows(
        dataset("diving48", files), "_8Vy3dlHg2w_00000.mp4"
    )


INTERNVID = [
    {
        "YoutubeID": "HdYoyzCSWyw",
        "Start_timestamp": "00:03:10.567",
        "End_timestamp": "00:03:11.200",
        "Caption": "woman using a computer mouse and keyboard",
        "Aesthetic_Score": 4.589844,
        "UMT_Score": 0.397949,
    },
    {
        "YoutubeID": "HdYoyzCSWyw",
        "Start_timestamp": "01:00:00.000",
        "End_timestamp": "01:00:02.5",
        "Caption": "a „mouse“\nruns",
    },
    {"YoutubeID": "other", "Start_timestamp": "00:00:00.000", "End_timestamp": "00:00:01.000", "Caption": "no"},
]


def test_internvid(dataset: Callable[..., DatasetConfig]) -> None:
    text = "\n".join(json.dumps(entry) for entry in INTERNVID) + "\n\n"
    config = dataset("internvid", {"all": ("InternVid-10M-flt.jsonl", text)})
    assert rows(config, "videos/HdYoyzCSWyw.mp4", "unlisted.mp4") == [
        (
            "videos/HdYoyzCSWyw.mp4",
            190_567_000,
            191_200_000,
            "caption",
            "woman using a computer mouse and keyboard",
        ),
        ("videos/HdYoyzCSWyw.mp4", 3_600_000_000, 3_602_500_000, "caption", "a „mouse“\nruns"),
    ]
    assert without_file(config, ["videos/HdYoyzCSWyw.mp4"]) == ["other"]


def test_double_lines_are_one_label_and_contradictions_are_found(dataset: Callable[..., DatasetConfig]) -> None:
    head = "label,youtube_id,time_start,time_end,split\n"
    twice = "run,a,0,10,train\nrun,a,0,10,train\n"
    against = "run,b,0,10,train\nsit,b,0,10,train\n"
    both = {
        "train": ("t.csv", head + twice + against + "run,c,0,10,train\n"),
        "test": ("u.csv", head + "run,c,0,10,\n"),
    }
    labels = read_labels(dataset("kinetics400", both), ["a.mp4", "b.mp4", "c.mp4"])
    assert labels.filter(labels["path"] == "a.mp4").height == 3
    assert dict(contradictions(labels, "path").iter_rows()) == {
        "b.mp4": "class is run and sit",
        "c.mp4": "split is test and train",
    }


def test_two_files_of_one_name_are_named(dataset: Callable[..., DatasetConfig]) -> None:
    config = dataset("ssv2", {"train": ("t.json", "[]")})
    assert doubled(config, ["x/1.webm", "y/1.mp4", "2.webm"]) == {"x/1.webm": "y/1.mp4", "y/1.mp4": "x/1.webm"}
    assert doubled(DatasetConfig(uri="/d"), ["x/1.webm", "y/1.webm"]) == {}


@pytest.mark.parametrize(
    ("layout", "name", "text", "message"),
    [
        ("imagenet", "a.csv", "Id,PredictionString\n", "no column ImageId; it has Id, PredictionString"),
        ("imagenet", "a.csv", "ImageId,PredictionString\nx,cat 1 2\n", "line 2: 'cat' is not a class"),
        ("kinetics400", "a.csv", "", "no column youtube_id, time_start, time_end; it has none"),
        ("kinetics400", "a.csv", "youtube_id,time_start,time_end\na,1\n", "line 2: another number of cells"),
        ("kinetics400", "a.csv", "youtube_id,time_start,time_end\na,1,2,3\n", "line 2: another number of cells"),
        ("kinetics400", "a.csv", "youtube_id,time_start,time_end\na,soon,2\n", "line 2: time_start is 'soon'"),
        ("ssv2", "a.json", "{}", "a list was expected"),
        ("ssv2", "a.json", "[1]", "entry 1: an object was expected"),
        ("ssv2", "a.json", '[{"id": 7}]', "entry 1: 'id' and 'template' were expected"),
        ("ssv2", "a.json", '[{"id": "7"', "is not JSON"),
        ("ssv2", "a.csv", "7;a;b\n", "entry 1: an object was expected"),
        ("diving48", "a.json", '[{"vid_name": "a", "label": "1"}]', "entry 1: 'vid_name' and 'label' were expected"),
        ("internvid", "a.jsonl", "{}\n", "line 1: 'YoutubeID' was expected"),
        ("internvid", "a.jsonl", "\n{]\n", "line 2: no JSON object"),
        (
            "internvid",
            "a.jsonl",
            '{"YoutubeID": "a", "Start_timestamp": 3, "End_timestamp": "00:00:01"}',
            "line 1: Start_timestamp is 3; a time like",
        ),
        (
            "internvid",
            "a.jsonl",
            '{"YoutubeID": "a", "Start_timestamp": "00:00:01", "End_timestamp": "00:00:01"}',
            "line 1: a span needs a later end",
        ),
    ],
)
def test_wrong_lists_are_named_with_their_place(
    dataset: Callable[..., DatasetConfig], layout: str, name: str, text: str, message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        rows(dataset(layout, {"train": (name, text)}), "a.mp4")


@pytest.mark.parametrize(
    ("layout", "text", "classes"),
    [
        ("ssv2", json.dumps(SSV2), json.dumps({"Another": "0"})),
        ("diving48", '[{"vid_name": "a_0", "label": 2}]', '[["Back"], ["Forward"]]'),
    ],
)
def test_a_class_outside_of_the_vocabulary_is_an_error(
    dataset: Callable[..., DatasetConfig], layout: str, text: str, classes: str
) -> None:
    config = dataset(layout, {"train": ("t.json", text), "classes": ("c.json", classes)})
    with pytest.raises(CorpusError, match="is not among the"):
        rows(config, "a_0.mp4")


def test_lists_that_are_missing_or_no_text_say_so(dataset: Callable[..., DatasetConfig], tmp_path: Path) -> None:
    config = dataset("ssv2", {"train": ("t.json", "[]")})
    (tmp_path / "t.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(CorpusError, match=r"t\.json is not UTF-8"):
        rows(config, "a.webm")
    (tmp_path / "t.json").unlink()
    with pytest.raises(CorpusError, match=r"t\.json cannot be read"):
        rows(config, "a.webm")
    with pytest.raises(CorpusError, match=r"t\.json cannot be read"):
        label_digests(config.labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"layout": "ssv2"}, "need 'files'"),
        ({"layout": "diving48", "files": {"classes": "c.json"}}, "need 'files'"),
        ({"layout": "folders", "files": {"train": "t.json"}}, "belong to the layouts of public data sets"),
        ({"layout": "ssv2", "files": {"tarin": "t.json"}}, "files"),
        ({"layout": "ssv2", "files": {"train": "t.json"}, "targets": {"a": "", "b": ""}}, "has one target"),
        ({"layout": "imagenet", "file": "t.csv"}, "belong to layout 'csv'"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path: Path, labels: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_project(tmp_path, {"d": {"uri": "d", "labels": labels}})


def test_paths_of_lists_stand_relative_to_the_configuration_and_in_no_digest(tmp_path: Path) -> None:
    said = {"uri": "d", "labels": {"layout": "ssv2", "files": {"train": "lists/t.json", "classes": "lists/c.json"}}}
    project = write_project(tmp_path, {"d": said})
    assert project.corpus.datasets["d"].labels.every_file() == (
        str(tmp_path / "lists" / "c.json"),
        str(tmp_path / "lists" / "t.json"),
    )
    moved = said | {"labels": {"layout": "ssv2", "files": {"train": "t.json"}}}
    assert write_project(tmp_path, {"d": moved}).corpus.curation_digest() == project.corpus.curation_digest()
