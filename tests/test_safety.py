"""Rules that hold over the whole repository, read from its syntax: who renames files, and what nobody may call.

Only storage/atomic.py renames, links or replaces files. Nobody unpickles, evaluates text, loads YAML with constructors
or starts a shell, so that hostile checkpoints and tables execute nothing. Tests are free of both rules, since they
build what is hostile; examples are free of the first.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

RENAMES = {"os.rename", "os.replace", "os.renames", "os.link", "os.symlink", "shutil.move"}
RENAMING_METHODS = {"rename", "replace", "hardlink_to", "symlink_to", "mv", "move"}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
EVALUATES = {"eval", "exec", "compile", "builtins.eval", "builtins.exec"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"}
YAML_LOADERS = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"}
SKIPPED = {".venv", ".git", "build", "dist", ".dagster", "node_modules"}


def sources(repository: Path) -> list[Path]:
    """Python files of the project, tests excepted."""
    found = []
    for path in sorted(repository.rglob("*.py")):
        parts = path.relative_to(repository).parts
        if parts[0] != "tests" and not SKIPPED & set(parts) and not parts[0].startswith("."):
            found.append(path)
    return found


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted name, of every import."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                for item in node.names:
                    top = item.name.split(".")[0]
                    names[item.asname or top] = item.name if item.asname else top
            case ast.ImportFrom(module=str(module)):
                names |= {item.asname or item.name: f"{module}.{item.name}" for item in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` as `numpy.load`; an empty string for what is no dotted name of an import or builtin."""
    match node:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=value, attr=attr):
            before = dotted(value, names)
            return f"{before}.{attr}" if before else ""
    return ""


def root_of(node: ast.expr, names: dict[str, str]) -> str:
    """What a chain such as `pl.col("a").str.replace` begins with: `polars`."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return dotted(node, names)


def said(call: ast.Call, keyword: str) -> object:
    """Constant value of a keyword argument; None where it is absent, ... where it is no constant."""
    for item in call.keywords:
        if item.arg == keyword:
            return item.value.value if isinstance(item.value, ast.Constant) else ...
    return None


def renames(tree: ast.AST) -> Iterator[int]:
    """Lines that rename a file. A method with one positional argument that is no literal mapping may be Path's."""
    names = imported_names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        if name in RENAMES:
            yield node.lineno
        elif isinstance(node.func, ast.Attribute) and node.func.attr in RENAMING_METHODS:
            mapping = node.args and isinstance(node.args[0], ast.Dict | ast.DictComp | ast.Lambda)
            library = root_of(node.func, names).split(".")[0] in {"dataclasses", "polars"}
            if len(node.args) == 1 and not node.keywords and not mapping and not library:
                yield node.lineno


def executes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that could execute what a file says."""
    names = imported_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=items):
                for item in items:
                    if item.name.split(".")[0] in PICKLES:
                        yield node.lineno, item.name
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PICKLES:
                yield node.lineno, module
            case ast.Call():
                name = dotted(node.func, names)
                if name in EVALUATES | SHELLS | YAML_LOADERS:
                    yield node.lineno, name
                if said(node, "allow_pickle") not in (None, False):
                    yield node.lineno, "allow_pickle"
                if said(node, "shell") not in (None, False):
                    yield node.lineno, "shell"
                if name == "torch.load" and said(node, "weights_only") is not True:
                    yield node.lineno, "torch.load without weights_only=True"
                if name == "numpy.load" and said(node, "allow_pickle") is not False:
                    yield node.lineno, "numpy.load without allow_pickle=False"


def test_only_atomic_renames_files(repository: Path) -> None:
    found = []
    for path in sources(repository):
        place = str(path.relative_to(repository))
        if place != "storage/atomic.py" and not place.startswith("examples/"):
            found += [f"{place}:{line}" for line in renames(ast.parse(path.read_text()))]
    assert found == [], "write through storage/atomic.py"


def test_atomic_does_rename(repository: Path) -> None:
    """The rule looks at something: it sees each kind of call there."""
    assert len(list(renames(ast.parse((repository / "storage" / "atomic.py").read_text())))) == 4


def test_nothing_executes_what_a_file_says(repository: Path) -> None:
    found = []
    for path in sources(repository):
        found += [
            f"{path.relative_to(repository)}:{line} {what}" for line, what in executes(ast.parse(path.read_text()))
        ]
    assert found == []


def test_the_project_is_looked_at(repository: Path) -> None:
    places = {str(path.relative_to(repository)) for path in sources(repository)}
    assert {"storage/part.py", "nextvid/config/recipe.py"} <= places
    assert not any(place.startswith("tests/") or ".venv" in place for place in places)


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
def test_renames_are_seen(code: str) -> None:
    assert list(renames(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "text.replace('a', 'b')",
        "frame.rename({'a': 'b'})",
        "import dataclasses\ndataclasses.replace(spec, seed=1)",
        "import polars as pl\npl.col('a').str.to_lowercase().replace(NAMES)",
    ],
)
def test_other_replacing_is_left_alone(code: str) -> None:
    assert not list(renames(ast.parse(code)))


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
def test_what_executes_is_seen(code: str) -> None:
    assert list(executes(ast.parse(code)))


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
def test_what_is_safe_is_left_alone(code: str) -> None:
    assert not list(executes(ast.parse(code)))
