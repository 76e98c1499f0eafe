"""Every block of the README: YAML is read, Python is executed, and shell lines run on a small project.

What is too large for a test (installs, the demo, training) is checked to exist: make targets by a dry run, commands by
the parser, which refuses an unknown flag or recipe. Commands that other documents name are parsed, too.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nextvid.commands as command_line
from nextvid import store_commands
from nextvid.command_line import EXAMPLES
from nextvid.config.corpus import load_corpus
from nextvid.config.project import Project
from nextvid.config.recipes import recipe
from nextvid.make import Request
from nextvid.making.outcome import Outcome
from nextvid.train.run import find_run
from nextvid.trainset.dataset import open_latents
from nextvid.trainset.exported import export_latents
from storage.errors import UpstreamError
from storage.store import LatentStore
from tests.nextvid.corpus.small_media import scene, write_film, write_picture
from tests.nextvid.tiny_project import FRAMES, RECIPE, uri_of

TOP = Path(__file__).resolve().parents[2]
README = TOP / "README.md"
NOT_RUN = {". .venv/bin/activate"}


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def lines() -> list[list[str]]:
    """Words of every command in shell blocks, comments and assignments of the environment left out."""
    commands = [shlex.split(line, comments=True) for block in blocks("shell") for line in block.splitlines()]
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in commands if words]


def nextvid_runs(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `nextvid ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["nextvid", *arguments])
    try:
        command_line.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.fixture
def asked(own_copy: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The small project as the command line's, in an empty folder; what `nextvid make` is asked for is not made."""
    requests: list[Request] = []

    def note(project: Project, request: Request) -> Iterator[Outcome]:
        requests.append(request)
        yield from ()

    monkeypatch.setenv("NEXTVID_CORPUS", str(own_copy.path))
    monkeypatch.setattr(command_line, "make", note)
    monkeypatch.chdir(tmp_path)
    return requests


def test_every_kind_of_block_and_command_is_known() -> None:
    languages = re.findall(r"^```(\w*)\n.*?^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert set(languages) == {"shell", "yaml", "python"}
    unknown = [words for words in lines() if words[0] not in ("make", "nextvid", "dagster")]
    assert {" ".join(words) for words in unknown} == NOT_RUN


def test_the_corpus_is_valid(tmp_path: Path) -> None:
    (written,) = blocks("yaml")
    (tmp_path / "corpus.yaml").write_text(written)
    corpus = load_corpus(tmp_path / "corpus.yaml")
    assert corpus.root == str(tmp_path / "data" / "mine")
    assert list(corpus.datasets) == ["my_videos"]
    lengths = {policy.frames for policy in corpus.datasets["my_videos"].clips}
    assert lengths == set(recipe("nextvid_s_latent").clip_lengths)


@pytest.mark.parametrize("words", [words for words in lines() if words[0] == "make"], ids=" ".join)
def test_make_targets_exist(words: list[str], repository: Path) -> None:
    dry = subprocess.run([*words, "--dry-run"], cwd=repository, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("words", [words for words in lines() if words[0] == "dagster"], ids=" ".join)
def test_dagster_commands_exist(words: list[str]) -> None:
    helped = subprocess.run([sys.executable, "-m", *words, "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0, helped.stderr


def test_commands_run(
    asked: list[Request], own_copy: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_picture(Path("media", "one.jpg"), "one")
    known = {"RUN": find_run(own_copy, RECIPE).id, "FILE": uri_of(0), "MEDIA": "media"}
    commands = [words[1:] for words in lines() if words[0] == "nextvid" and words[1] != "import-vavae"]
    assert len(commands) > 10
    for arguments in commands:
        code = nextvid_runs([known.get(word, word) for word in arguments], monkeypatch)
        assert code == 0, (arguments, capsys.readouterr().err)
    assert {(request.asset, request.recipe) for request in asked} >= {
        ("trainset", None),
        ("pretrain", "nextvid_s_latent"),
    }
    for request in asked:
        recipe(request.recipe or RECIPE)
    assert Path("features.parquet").is_file()


def test_a_missing_checkpoint_is_named(
    asked: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((_, *arguments),) = [words for words in lines() if words[:2] == ["nextvid", "import-vavae"]]
    assert nextvid_runs(arguments, monkeypatch) == 2
    assert re.match(r"config: .*CHECKPOINT", capsys.readouterr().err)


def test_the_encoder_of_the_example_gives_tokens(
    asked: list[Request], own_copy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (export,) = [words[1:] for words in lines() if words[:2] == ["nextvid", "export"]]
    run = find_run(own_copy, RECIPE).id
    assert nextvid_runs([run if word == "RUN" else word for word in export], monkeypatch) == 0
    write_film(Path("video.mp4"), [scene("one", 24)])
    example = blocks("python")[0]
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)  # the README's own lines
    tokens, parts = names["tokens"], names["parts"]
    assert isinstance(tokens, torch.Tensor)
    assert isinstance(parts, list)
    assert tokens.shape[:2] == (1, 4 * 64)
    torch.testing.assert_close(torch.cat(parts, dim=1), tokens, rtol=1e-4, atol=1e-5)


# What a command says that was parsed and finds no project, file or recipe of the example's name.
PARSED = ("upstream: parsed", " is not a folder", " is no folder", ": no such file", "unknown recipe 'NAME'")


def test_stored_latents_of_the_example(own_copy: Project) -> None:
    example = blocks("python")[1].replace("nextvid_s_latent", RECIPE).replace("16", str(FRAMES))
    names: dict[str, Any] = {}
    example = example.replace('"corpus.yaml"', repr(str(own_copy.path)))
    exec(compile(example, str(README), "exec"), names)  # the README's own lines
    assert len(names["clip"]) == FRAMES == len(names["facts"].times_us)
    assert len(names["batches"]) == own_copy.recipe(RECIPE).steps


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized")  # by zarr, of the part's tables
@pytest.mark.parametrize("reader", ["torch", "zarr", "xarray", "datasets"])
def test_stored_latents_by_other_readers(
    own_copy: Project, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block of the README gives the rows that `open_latents` gives; xarray and datasets only where installed."""
    pytest.importorskip(reader)
    monkeypatch.chdir(tmp_path)
    (example,) = [block for block in blocks("python") if re.search(rf"^import {reader}$", block, re.MULTILINE)]
    latents = open_latents(own_copy.path, FRAMES)
    wanted = {latents.row(n).row_id: latents[n].numpy() for n in range(len(latents))}
    store = LatentStore(own_copy.root, latents.spec)
    part = next(part for batch in store.batches() for part in store.parts_of(batch, FRAMES))
    if reader == "datasets":
        export_latents(latents, tmp_path / "exported", "parquet")
    names: dict[str, Any] = {"latents": latents, "clip": latents[0], "torch": torch}
    example = example.replace("PART", part.path).replace("num_workers=4", "num_workers=0")
    exec(compile(example, str(README), "exec"), names)  # the README's own lines
    match reader:
        case "torch":
            assert names["normalised"].shape[1:] == latents.spec.row_shape(FRAMES)
        case "datasets":
            assert names["first"].numpy().tobytes() == wanted[names["rows"][0]["row_id"]].tobytes()
            assert sorted(names["rows"]["row_id"]) == sorted(wanted)
        case _:
            ids = [row_id.hex() for row_id in part.plan["row_id"]]
            read = [n for n, row_id in enumerate(ids) if row_id in wanted]
            assert read
            for n in read:
                np.testing.assert_array_equal(np.asarray(names["array"][n]), wanted[ids[n]])


def named_commands() -> list[str]:
    """Arguments of `nextvid` in documents (code spans, printed sessions) and in examples of the command line's help.

    The changelog names what is gone.
    """
    paths = {*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md")} - {TOP / "CHANGELOG.md"}
    texts = [path.read_text() for path in paths]
    found = {span for text in texts for span in re.findall(r"`nextvid ([^`]+)`|^\$ nextvid (.+)$", text, re.MULTILINE)}
    found |= {(example.removeprefix("nextvid "), "") for example in EXAMPLES.values()}
    return sorted({" ".join((span or session).split(">")[0].split()) for span, session in found})


@pytest.mark.parametrize("command", named_commands())
def test_commands_that_documents_name_are_parsed(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(corpus: str | None) -> Project:
        raise UpstreamError("parsed")

    for module in (command_line, store_commands):
        monkeypatch.setattr(module, "open_project", stop)
    words = command.split()
    code = nextvid_runs(words if len(words) > 1 else [*words, "--help"], monkeypatch)
    error = capsys.readouterr().err
    assert code == 0 or any(reason in error for reason in PARSED), error


def test_a_wrong_flag_is_refused(asked: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands above can fail."""
    assert nextvid_runs(["plan", "--acept"], monkeypatch) == 2
    assert asked == []
