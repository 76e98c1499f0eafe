"""The examples in README and examples/ are what the code accepts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nextvid.corpus.project import load_corpus
from nextvid.recipes import RECIPES


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language in Markdown."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_corpus_of_the_readme_is_valid(repository: Path, tmp_path: Path) -> None:
    (said,) = blocks((repository / "README.md").read_text(), "yaml")
    (tmp_path / "corpus.yaml").write_text(said)
    corpus = load_corpus(tmp_path / "corpus.yaml")
    assert corpus.root == str(tmp_path / "data" / "mine")
    assert list(corpus.datasets) == ["my_videos"]


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_the_examples_are_valid(repository: Path, name: str) -> None:
    corpus = load_corpus(repository / "examples" / name / "corpus.yaml")
    assert sum(corpus.weights().values()) == pytest.approx(1.0)


def test_the_commands_of_the_readme_exist(repository: Path) -> None:
    text = "\n".join(blocks((repository / "README.md").read_text(), ""))
    named = set(re.findall(r"^nextvid ([a-z-]+)", text, flags=re.MULTILINE))
    command = [sys.executable, "-m", "nextvid", "--help"]
    helped = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository).stdout
    assert {name for name in named if not re.search(rf"• {name} ", helped)} == set()
    assert set(re.findall(r"--recipe ([a-z_]+)", text)) <= set(RECIPES)
    targets = set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE))
    rules = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), flags=re.MULTILINE))
    assert targets <= rules


def test_links_of_the_readme_lead_to_files(repository: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (repository / "README.md").read_text())
    assert links
    assert [link for link in links if "://" not in link and not (repository / link).exists()] == []


def test_what_executes_a_procedure_exists(repository: Path) -> None:
    text = (repository / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+(?:\.py)?/?)", text)) | set(
        re.findall(r"`((?:deploy|docs)/[\w./-]+)`", text)
    )
    assert named
    assert [path for path in named if not (repository / path).exists()] == []
    functions = set(re.findall(r"::(test_\w+)", text))
    defined = "\n".join(path.read_text() for path in (repository / "tests").rglob("test_*.py"))
    assert [name for name in functions if f"def {name}(" not in defined] == []
