"""YAML that users write: what is read, and one line for what could cost a value, memory or hours."""

from pathlib import Path

import pytest

from nextvid.config.yaml_file import LARGEST_BYTES, read_yaml
from storage.errors import ConfigError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


def read(folder: Path, text: str) -> dict[str, object]:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return read_yaml(file)


def test_values_are_those_of_safe_yaml(tmp_path: Path) -> None:
    text = "a: &one {x: 1, y: [1.5, no, ~]}\nb: *one\nc: {<<: *one, x: 2}\n"
    one = {"x": 1, "y": [1.5, False, None]}
    assert read(tmp_path, text) == {"a": one, "b": one, "c": {**one, "x": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root: a\nroot: b\n", "'root' is given twice, in lines 1 and 2"),
        ("datasets:\n  x: {uri: a}\n  y: {uri: b}\n  x: {uri: c}\n", "'datasets.x' is given twice, in lines 2 and 4"),
        ("datasets: {x: {clips: [{fps: 1, fps: 2}]}}\n", "'datasets.x.clips.fps' is given twice"),
        ("", "expected keys such as 'root: data', found NoneType"),
        ("just text", "found str"),
        ("a: [", "not readable as YAML"),
        ("a: !!python/object/apply:os.system [true]", "not readable as YAML"),
        ("a: 2026-13-45", "not readable as YAML: month must be in 1..12"),
        (f"a: {'9' * 6000}", "not readable as YAML: a number of 6000 characters in line 1"),
        ('a: "film\\0.mp4"', "the character U+0000 in line 1, which is no text"),
        ("a: &a [*a]", "one contains itself"),
        (f"a: {'[' * 5000}", "nested too deeply"),
        (BOMB, "more than 100000 values with its aliases written out"),
        ("a: b\n" * (LARGEST_BYTES // 5 + 1), "is it the right file?"),
    ],
    ids=lambda value: value[:24],
)
def test_what_is_refused_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_no_utf8_is_one_line(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "settings.yaml").write_bytes("root: données\n".encode(encoding))
    with pytest.raises(ConfigError, match="save the file as UTF-8") as caught:
        read_yaml(tmp_path / "settings.yaml")
    assert "\n" not in str(caught.value)
