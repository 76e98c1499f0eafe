"""YAML that is made to take hours, memory or the program's place: bombs, huge, deep and endless files, odd values.

Each is one ConfigError or is read, in bounded time and memory, whoever reads it: corpus.yaml, a project's recipes, the
file that NEXTVID_COMPUTE names.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from nextvid.config.corpus import load_corpus
from nextvid.config.recipes import own_recipes
from nextvid.config.yaml_file import LARGEST_BYTES, read_yaml
from storage.errors import ConfigError
from tests.hostile.conftest import Measured

HEAD = "root: made\nencoding: {autoencoder: a}\ndatasets: {d: {uri: d}}\n"
LEVELS = "".join(f"  - &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "".join(f"  - &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
REFUSED = {
    "bomb under a known key": f"recipes:\n  - &a0 [x, x]\n{LEVELS}",
    "bomb of merges": f"recipes:\n  - &a0 {{x: 1}}\n{MERGES}",
    "bomb under an unknown key": f"more:\n  - &a0 [x, x]\n{LEVELS}",
    "unknown keys": "".join(f"k{n}: 1\n" for n in range(3_000)),
    "400,000 unknown keys": "".join(f"k{n}: 1\n" for n in range(400_000)),
    "a key again and again": "min_complete: 1\n" * 2_000,
    "a long key": f"{'k' * 900_000}: 1\n",
    "a long name": f"benchmarks: {{{'K' * 900_000}: {{}}}}\n",
    "a long value": f"on_failure: {'v' * 900_000}\n",
    "an aliased self": "protocols: &a [*a]\n",
    "deep lists": "protocols: " + "[" * 1_500,
    "deep mappings": "".join(f"{' ' * n}k:\n" for n in range(1200)),
    "many documents": "---\n" * 1000,
    "base 60": "min_complete: 1" + ":59" * 30_000 + "\n",
    "base 60 with a point": "min_complete: 1" + ":59" * 400 + ".5\n",
    "base 60 with a point and few digits": "min_complete: 1" + ":59" * 180 + ".5\n",
    "base 16": f"min_complete: 0x{'f' * 300}\n",
    "6,000 digits": f"min_complete: {'9' * 6000}\n",
    "a large number": "min_complete: 1.0e999\n",
    "no number": "min_complete: .nan\n",
    "a date": "min_complete: 2026-13-45\n",
    "a zone": "min_complete: 2026-01-01T00:00:00+99:99\n",
    "a year": "min_complete: 0000-01-01\n",
    "NUL": 'runs_root: "a\\0b"\n',
    "half a pair": 'runs_root: "a\\ud800b"\n',
    "a home": "runs_root: ~nobody-of-that-name/x\n",
    "a list as a key": "? [a, b]\n: 1\n",
    "a mapping as a key": "? {a: b}\n: 1\n",
    "a number as a key": "1: 2\n",
    "nothing as a key": "~: 2\n",
    "a date as a key": "2026-01-01: 2\n",
    "Python": "protocols: !!python/object/apply:os.system [touch owned]\n",
    "Python's names": "protocols: !!python/name:os.system ''\n",
    "a tag": "%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system [x]\n",
    "an unknown anchor": "protocols: *nothing\n",
    "an address": "datasets: {e: {uri: 'http://[::1'}}\n",
    "a password": "runs_root: s3://user:secret@bucket/a\n",
    "codes": '"\\e[31m\\u202e": 1\n',
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_it_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    head = HEAD.replace("datasets: {d: {uri: d}}\n", "") if text.startswith("datasets") else HEAD
    (tmp_path / "corpus.yaml").write_text(text if text.startswith("%") else head + text)
    with pytest.raises(ConfigError) as caught:
        load_corpus(tmp_path / "corpus.yaml")
    assert str(tmp_path) in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 20_000
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32", "cp037"])
def test_other_encodings_are_one_error(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "corpus.yaml").write_bytes((HEAD + "x: données").encode(encoding))
    with pytest.raises(ConfigError):
        load_corpus(tmp_path / "corpus.yaml")


class Payload:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_named_yaml_is_no_yaml(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "corpus.yaml").write_bytes(pickle.dumps(Payload(tmp_path / "owned"), protocol))
        with pytest.raises(ConfigError):
            load_corpus(tmp_path / "corpus.yaml")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "loop"])
def test_what_never_ends_is_not_read(tmp_path: Path, kind: str) -> None:
    """A pipe without a writer would be waited for, /dev/zero read for ever."""
    file = tmp_path / "more.yaml"
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "device":
            file = Path("/dev/zero")
        case "link to a device":
            file.symlink_to("/dev/zero")
        case _:
            file.symlink_to(file)
    with pytest.raises((ConfigError, OSError)):
        read_yaml(file)
    with pytest.raises(ConfigError):
        load_corpus(file)


def test_recipes_are_read_as_carefully(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "corpus.yaml").write_text(HEAD)
    (tmp_path / "recipes" / "bomb.yaml").write_text(f"stages:\n  - &a0 [x, x]\n{LEVELS}")
    os.mkfifo(tmp_path / "recipes" / "pipe.yaml")
    try:
        names = own_recipes(tmp_path / "corpus.yaml")
    except ConfigError:
        return
    assert {"bomb", "pipe"} >= set(names)


@pytest.mark.faults
def test_the_largest_files_take_seconds_and_little_memory(tmp_path: Path, measured: Measured) -> None:
    """Of what is not refused by its size, the worst that we know, one after the other in one process."""
    worst = {
        "keys": HEAD + "".join(f"k{n}: 1\n" for n in range(49_000)),
        "aliases": HEAD + f"more:\n  - &a0 [x, x]\n{LEVELS}",
        "flow": HEAD + "x: [" + "a," * ((LARGEST_BYTES - 200) // 2) + "]\n",
        "text": HEAD + 'x: "' + "\\x41" * ((LARGEST_BYTES - 200) // 4) + '"\n',
    }
    for name, text in worst.items():
        assert len(text) <= LARGEST_BYTES
        (tmp_path / f"{name}.yaml").write_text(text)
    code = """
import sys
from nextvid.config.corpus import load_corpus
from storage.errors import ConfigError
for file in sys.argv[1:]:
    try:
        load_corpus(file)
    except ConfigError as error:
        print(str(error)[:80])
"""
    ended = measured("-c", code, *(str(tmp_path / f"{name}.yaml") for name in worst))
    assert ended.code == 0, ended.err
    assert len(ended.out.splitlines()) == len(worst)
    assert ended.peak_bytes < 1.5e9
