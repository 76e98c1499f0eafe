"""Rules that hold over the whole repository: those that ruff cannot express, and that ruff refuses the others.

Only storage/atomic.py renames, links or replaces files, so that whatever has its name is whole. Nobody unpickles,
evaluates text, loads YAML with constructors or starts a shell, so that hostile checkpoints and tables execute nothing.
pyproject.toml says so by `banned-api` and the rules S and PTH; left for here are methods that rename, whose object
ruff does not know, and keyword arguments. Tests are free of both rules, since they build what is hostile; examples are
free of the first.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RENAMING_METHODS = {"rename", "replace", "hardlink_to", "symlink_to", "mv", "move"}
SAFE_LOADS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
PACKAGES = ("storage", "nextvid", "assets", "orchestration", "examples", "benchmarks")


def sources(repository: Path) -> dict[str, ast.AST]:
    """Syntax of the project's Python files by their paths, tests excepted."""
    files = [path for package in PACKAGES for path in sorted((repository / package).rglob("*.py"))]
    return {str(path.relative_to(repository)): ast.parse(path.read_text()) for path in files}


def renames(tree: ast.AST) -> Iterator[int]:
    """Lines with a method that renames. One with a single positional argument, no literal mapping, may be Path's."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name) as method, args=[argument], keywords=[]):
                mapping = isinstance(argument, ast.Dict | ast.DictComp | ast.Lambda)
                if name in RENAMING_METHODS and not mapping and not ast.unparse(method).startswith("pl."):
                    yield node.lineno


def executes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines whose keyword arguments, given or missing, could execute what a file contains."""
    names: dict[str, str] = {}  # of imports, by the name used here
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=items):
                names |= {item.asname or item.name: item.name for item in items}
            case ast.ImportFrom(module=str(module), names=items):
                names |= {item.asname or item.name: f"{module}.{item.name}" for item in items}
            case ast.Call(func=function, keywords=keywords):
                first, *rest = ast.unparse(function).split(".")
                name = ".".join([names.get(first, first), *rest])
                given = {item.arg: getattr(item.value, "value", ...) for item in keywords}
                keyword, safe = SAFE_LOADS.get(name, ("allow_pickle", False))
                if given.get(keyword, ... if name in SAFE_LOADS else safe) is not safe:
                    yield node.lineno, f"{name} without {keyword}={safe}"
                if given.get("shell", False) is not False:
                    yield node.lineno, f"{name} with a shell"


def test_only_atomic_renames_files(repository: Path) -> None:
    found = {path: list(renames(tree)) for path, tree in sources(repository).items() if not path.startswith("examples")}
    assert not any(found.values()), "write through storage/atomic.py"


def test_nothing_executes_what_a_file_says(repository: Path) -> None:
    assert not any({path: list(executes(tree)) for path, tree in sources(repository).items()}.values())


def test_the_project_is_looked_at(repository: Path) -> None:
    assert {"storage/part.py", "nextvid/make.py"} <= set(sources(repository))


def refused(repository: Path, code: str) -> bool:
    """Whether ruff, as pyproject.toml sets it up, refuses this code for what it calls or imports."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--ignore=F", "--output-format=concise"]
    done = subprocess.run(
        [*command, "--stdin-filename=nextvid/new.py", "-"],
        input=code, capture_output=True, text=True, check=False, cwd=repository,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return any(line.split()[1].startswith(("S", "TID", "PTH")) for line in done.stdout.splitlines() if ".py:" in line)


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.rename(a, b)",
        "import os as o\no.replace(a, b)",
        "from os import link as l\nl(a, b)",
        "import shutil\nshutil.move(a, b)",
        "path.rename(target)",
        "Path(a).replace(target)",
        "path.hardlink_to(target)",
        "fs.mv(a)",
    ],
)
def test_renames_are_seen(repository: Path, code: str) -> None:
    assert list(renames(ast.parse(code))) or refused(repository, code)


@pytest.mark.parametrize(
    "code",
    [
        "text.replace('a', 'b')",
        "frame.rename({'a': 'b'})",
        "import dataclasses\ndataclasses.replace(spec, seed=1)",
        "import polars as pl\npl.col('a').str.to_lowercase().replace(NAMES)",
    ],
)
def test_other_replacing_is_left_alone(repository: Path, code: str) -> None:
    assert not list(renames(ast.parse(code)))
    assert not refused(repository, code)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=flag)",
        "import numpy as np\nnp.load(f)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f)",
        "import yaml\nyaml.load(f)",
        "import yaml as y\ny.unsafe_load(f)",
        "eval(text)",
        "exec(text)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)
def test_what_executes_is_seen(repository: Path, code: str) -> None:
    assert list(executes(ast.parse(code))) or refused(repository, code)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "import yaml\nyaml.safe_load(f)",
        "model.eval()",
        "import re\nre.compile(text)",
        "import torch\ntorch.compile(model)",
        "import subprocess\nsubprocess.run(['ls'])",
    ],
)
def test_what_is_safe_is_left_alone(repository: Path, code: str) -> None:
    assert not list(executes(ast.parse(code)))
    assert not refused(repository, code)
