"""Documents are true: links, paths, sections and commands that they name exist, and example corpora are valid."""

import ast
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from nextvid.config.benchmarks import BenchmarkConfig
from nextvid.config.corpus import load_corpus
from tests.reliability import PROMISES

FOLDERS = ("nextvid", "storage", "assets", "orchestration", "tests", "benchmarks", "examples", "deploy", "docs", ".ci")
SUFFIXES = (".md", ".py", ".toml", ".yaml", ".yml")
PATH = re.compile(rf"(?<![\w/.:-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*\w")
MODULE = re.compile(r"(?<![\w/.-])\w+\.py\b")
DECISION = re.compile(r"docs/decisions/(\d{4})\b")
ELSEWHERE = re.compile(r"(?<!docs/)\bmethod\.md|\bresearch\b|\bdesign(?:,? section|:)?,? \d|\b[Tt]he design\b")
SECTIONS = re.compile(r"docs/method\.md ((?:\d+(?:\.\d+)?(?:, | and )?)+)")


def written(repository: Path) -> list[Path]:
    """Everything that people wrote: documents, code and configuration, without environments and data."""
    folders = [path for folder in FOLDERS for path in (repository / folder).rglob("*")]
    files = [path for path in (*repository.glob("*"), *folders) if path.is_file()]
    return sorted(path for path in files if path.suffix in SUFFIXES or path.name == "Makefile")


@cache
def prose(path: Path) -> str:
    """What a file says to its reader: comments and docstrings of Python, all of anything else."""
    if path.suffix != ".py":
        return path.read_text()
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    with path.open("rb") as file:
        comments = [token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    return "\n".join([*(ast.get_docstring(node) or "" for node in nodes), *comments])


def headings(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(document: Path) -> Iterator[str]:
    """Relative links and images that lead to no file or to no heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in headings(target)):
            yield link


def missing_paths(text: str, repository: Path, modules: set[str]) -> set[str]:
    """Paths of this repository, and bare names of modules, that a text names and nothing has."""
    paths = {path for path in PATH.findall(text) if not DECISION.fullmatch(path)}
    return {path for path in paths if not (repository / path).exists()} | (set(MODULE.findall(text)) - modules)


def decisions(repository: Path) -> set[str]:
    """Numbers of the decisions that are written down."""
    folder = repository / "docs" / "decisions"
    short = re.findall(r"^## (\d{4}): ", (folder / "short-entries.md").read_text(), flags=re.MULTILINE)
    return {*short, *(path.name[:4] for path in folder.glob("[0-9]*.md"))}


def test_links_of_documents_lead_somewhere(repository: Path) -> None:
    documents = [path for path in written(repository) if path.suffix == ".md"]
    broken = {str(path): found for path in documents if (found := list(broken_links(path)))}
    assert len(documents) > 10
    assert broken == {}


def test_paths_that_are_named_exist(repository: Path) -> None:
    files = written(repository)
    modules = {path.name for path in files}
    missing = {str(path): found for path in files if (found := missing_paths(prose(path), repository, modules))}
    assert missing == {}


def test_nothing_outside_of_the_repository_is_cited(repository: Path) -> None:
    cited = {str(path): found for path in written(repository) if (found := ELSEWHERE.findall(prose(path)))}
    assert cited == {}
    assert ELSEWHERE.findall("method.md 2, docs/method.md 2, design 4, research: vae, researchers") == [
        "method.md", "design 4", "research"
    ]  # fmt: skip


def test_sections_that_are_cited_exist(repository: Path) -> None:
    method = (repository / "docs" / "method.md").read_text()
    sections = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", method, flags=re.MULTILINE))
    known = decisions(repository)
    assert {"0", "2.3", "13"} <= sections
    for path in written(repository):
        text = prose(path)
        cited = {number for group in SECTIONS.findall(text) for number in re.findall(r"\d+(?:\.\d+)?", group)}
        assert cited <= sections, path
        assert set(DECISION.findall(text)) <= known, path


def test_every_decision_is_in_the_index(repository: Path) -> None:
    index = (repository / "docs" / "decisions" / "README.md").read_text()
    assert re.findall(r"^\| (\d{4}) \|", index, flags=re.MULTILINE) == sorted(decisions(repository))


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    """The checks above can fail."""
    (tmp_path / "docs").mkdir()
    document = tmp_path / "docs" / "page.md"
    document.write_text("# A title\n[a](page.md#a-title) [b](gone.md) [c](#nowhere) [d](https://example.org/x)\n")
    assert list(broken_links(document)) == ["gone.md", "#nowhere"]
    said = "docs/page.md, docs/gone.md and nextvid/lost.py, page.py, other.py, docs/decisions/0001"
    assert missing_paths(said, tmp_path, {"page.py"}) == {"docs/gone.md", "nextvid/lost.py", "other.py"}
    module = tmp_path / "module.py"
    module.write_text('"""About a/b.py."""\n# docs/gone.md\nPLACE = "docs/never.md"\n')
    assert prose(module) == "About a/b.py.\n# docs/gone.md"


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_the_examples_are_valid(repository: Path, name: str) -> None:
    corpus = load_corpus(repository / "examples" / name / "corpus.yaml")
    assert sum(corpus.weights().values()) == pytest.approx(1.0)


def defined(path: Path) -> set[str]:
    """Functions and classes at the top of a module."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def test_every_step_of_a_clips_way_is_a_function(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text()
    steps = re.findall(r"^\| [^|]+ \| `([\w/]+\.py)` \| `(\w+)` \|$", text, flags=re.MULTILINE)
    assert len(steps) > 15
    assert [(file, name) for file, name in steps if name not in defined(repository / file)] == []


def test_hooks_call_make_targets(repository: Path) -> None:
    (local,) = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())["repos"]
    assert {(hook["language"], hook["pass_filenames"]) for hook in local["hooks"]} == {("system", False)}
    for hook in local["hooks"]:
        make, target = hook["entry"].split()
        dry = subprocess.run([make, target, "--dry-run"], cwd=repository, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr


def test_every_slow_proof_tries_a_promise(repository: Path) -> None:
    for test in {test for promise in PROMISES for test in promise.tests}:
        path, _, function = test.partition("::")
        assert (repository / path).exists(), test
        assert not function or f"def {function}(" in (repository / path).read_text(), test
    for file in (repository / "tests").rglob("test_*.py"):
        if "mark.faults" in file.read_text() and file.name != "test_docs.py":
            name = f"{file.relative_to(repository)}::"
            assert any(promise.has(name) for promise in PROMISES), f"{file}: no promise of tests/reliability.py has it"


def test_tests_that_are_named_exist(repository: Path) -> None:
    documents = [path for path in written(repository) if path.suffix == ".md"]
    named = {name for path in documents for name in re.findall(r"(?:`|::)(test_\w+)`", path.read_text())}
    named -= set(BenchmarkConfig.model_fields)  # test_crop is no test
    functions = "\n".join(path.read_text() for path in (repository / "tests").rglob("test_*.py"))
    assert len(named) > 2
    assert [name for name in sorted(named) if f"def {name}(" not in functions] == []
