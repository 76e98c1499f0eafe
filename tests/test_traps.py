"""Every row of the method's table of traps (docs/method.md 13) has a test, named `test_trap_NN_what`."""

import ast
import re
from pathlib import Path

TRAPS = range(1, 33)
NAME = re.compile(r"test_trap_(\d\d)_(?:and_(\d\d)_)?[a-z]")


def traps_of(source: str) -> set[int]:
    """Numbers of the traps that test functions and methods of a module are named after."""
    names = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {int(number) for name in names if (found := NAME.match(name)) for number in found.groups() if number}


def test_every_trap_has_a_test(repository: Path) -> None:
    found: dict[int, list[str]] = {}
    for path in sorted((repository / "tests").rglob("test_*.py")):
        for number in traps_of(path.read_text()):
            found.setdefault(number, []).append(path.name)
    assert sorted(found) == list(TRAPS)


def test_names_are_read_from_the_syntax() -> None:
    source = "# def test_trap_05_x\nclass A:\n    def test_trap_16_and_20_y(self): ...\ndef test_trap_7_z(): ...\n"
    assert traps_of(source) == {16, 20}
