"""Rules that hold over the whole repository: those that ruff cannot express, and that ruff refuses the others.

Only storage/atomic.py renames, links or replaces files, so that whatever has its name is whole. Nobody unpickles,
evaluates text, loads YAML with constructors or starts a shell, so that hostile checkpoints and tables execute nothing.
pyproject.toml says so by `banned-api` and the rules S and PTH; left for here are methods that rename, whose object
ruff does not know, and keyword arguments. Tests are free of both rules, since they build what is hostile; examples are
free of the first.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RENAMING_METHODS = {"rename", "replace", "hardlink_to", "symlink_to", "mv", "move"}
SAFE_LOADS = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "numpy.lib.format.read_array": ("allow_pickle", False),
}
# What unpickles or imports what a file names, beside what ruff refuses.
UNSAFE = {
    "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package.PackageImporter",
    "torch.distributed.checkpoint.FileSystemReader", "torch.distributed.checkpoint.filesystem.FileSystemReader",
    "torch.distributed.checkpoint.format_utils.dcp_to_torch_save", "pandas.read_pickle", "yaml.Loader",
    "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader", "runpy.run_path", "runpy.run_module", "builtins.compile",
    "importlib.util.spec_from_file_location", "logging.config.fileConfig", "logging.config.dictConfig",
    "multiprocessing.connection.Client", "multiprocessing.connection.Listener", "fsspec.open", "fsspec.open_files",
}  # fmt: skip
UNSAFE_METHODS = {"deserialize"}  # of polars' frames, whose functions are pickles
IMPORTERS = {"importlib.import_module", "builtins.__import__"}
# Where a variable names the module: one of two libraries, and those of a list in the file.
CHOSEN_MODULES = {"nextvid/encode/autoencoders.py", "benchmarks/peers.py"}
PACKAGES = ("storage", "nextvid", "assets", "orchestration", "examples", "benchmarks", "deploy")


@pytest.fixture(scope="module")
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
                known = names.get(first, first if rest else f"builtins.{first}")
                name = ".".join([known, *rest])
                if name in UNSAFE or (rest and rest[-1] in UNSAFE_METHODS):
                    yield node.lineno, name
                given = {item.arg: getattr(item.value, "value", ...) for item in keywords}
                keyword, safe = SAFE_LOADS.get(name, ("allow_pickle", False))
                if given.get(keyword, ... if name in SAFE_LOADS else safe) is not safe:
                    yield node.lineno, f"{name} without {keyword}={safe}"
                for switch in ("shell", "trust_remote_code"):
                    if given.get(switch, False) is not False:
                        yield node.lineno, f"{name} with {switch}"
                if name in IMPORTERS and not _is_ours(node.args[0]):
                    yield node.lineno, f"{name} of a name that is not written here"


def _is_ours(module: ast.expr) -> bool:
    """Whether a module's name is written in the source, or begins so with a package."""
    first = module.values[0] if isinstance(module, ast.JoinedStr) else module
    text = first.value if isinstance(first, ast.Constant) else ""
    return isinstance(text, str) and bool(text) and (first is module or "." in text)


def test_only_atomic_renames_files(sources: dict[str, ast.AST]) -> None:
    found = {path: list(renames(tree)) for path, tree in sources.items() if not path.startswith("examples")}
    assert not any(found.values()), "write through storage/atomic.py"


def test_nothing_executes_what_a_file_says(sources: dict[str, ast.AST]) -> None:
    found = {path: list(executes(tree)) for path, tree in sources.items()}
    for path in CHOSEN_MODULES:
        assert [what for _, what in found.pop(path)] == ["importlib.import_module of a name that is not written here"]
    assert not any(found.values()), {path: one for path, one in found.items() if one}


def test_scripts_fetch_and_evaluate_nothing(repository: Path) -> None:
    """What is no Python: commands are written out, and nothing from a network is given to a shell."""
    for file in (repository / "Makefile", repository / ".ci" / "run", repository / "deploy/kubernetes/Containerfile"):
        text = re.sub(r"#.*", "", file.read_text())
        assert not re.search(r"\b(eval|curl|wget|source)\b|\|\s*(ba)?sh\b|<\(", text), file


def test_the_project_is_looked_at(repository: Path, sources: dict[str, ast.AST]) -> None:
    found = set(sources)
    assert {"storage/part.py", "nextvid/make.py", "assets/declare.py", "orchestration/jobs.py"} <= found
    assert {"examples/demo/run.py", "benchmarks/measure.py", "deploy/lock.py"} <= found
    every = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True, cwd=repository)
    assert {path for path in every.stdout.split() if not path.startswith("tests/")} <= found


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
        "import torch\ntorch.jit.load(f)",
        "from torch.distributed.checkpoint import FileSystemReader\nFileSystemReader(f)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(f, trust_remote_code=True)",
        "import yaml\nyaml.load(f, Loader=yaml.UnsafeLoader)",
        "import yaml\nyaml.UnsafeLoader(f)",
        "import polars as pl\npl.LazyFrame.deserialize(f)",
        "import numpy as np\nnp.lib.format.read_array(f)",
        "compile(text, 'x', 'exec')",
        "__import__(text)",
        "from importlib import import_module\nimport_module(text)",
        "from importlib import import_module\nimport_module(f'{text}.x')",
        "import runpy\nrunpy.run_path(f)",
        "import fsspec\nfsspec.open(url)",
        "import os\nos.popen(text)",
        "import subprocess\nsubprocess.getoutput(text)",
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
        "from importlib import import_module\nimport_module('diffusers')",
        "from importlib import import_module\nimport_module(f'assets.{asset}')",
    ],
)
def test_what_is_safe_is_left_alone(repository: Path, code: str) -> None:
    assert not list(executes(ast.parse(code)))
    assert not refused(repository, code)
