"""YAML files that users write: read safely; one line where a value would be lost or could not be used."""

import itertools
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from storage.errors import ConfigError

# Ours: the paper's corpus.yaml has 4 kB and 170 values, and pydantic takes a second for 100,000.
LARGEST_BYTES = 1_000_000
LARGEST_VALUES = 100_000
TAGS = "tag:yaml.org,2002:"
LONGEST_NUMBER = 400  # characters; in base 60 the time to read one grows with their square
SHOWN_TWICE = 10  # our choice: keys given twice that a message names
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL and halves of pairs, which no path can have


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, naming the file, for anything else and for a key given twice."""
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f"{file}: a pipe or device, which may never end: name a file")
    with file.open("rb") as opened:
        data = opened.read(LARGEST_BYTES + 1)
    if len(data) > LARGEST_BYTES:
        raise ConfigError(f"{file}: more than the {LARGEST_BYTES} bytes that are read: is it the right file?")
    try:
        loader = yaml.SafeLoader(data.decode())
        node = loader.get_single_node()
        if twice := list(itertools.islice(_keys_given_twice(node, "", set()), SHOWN_TWICE)):
            raise ConfigError("\n".join(f"{file}: {line}" for line in twice))
        if node is not None and _count(node, {}) > LARGEST_VALUES:
            raise ConfigError(f"{file}: more than {LARGEST_VALUES} values with its aliases written out: use fewer")
        values = None if node is None else loader.construct_document(node)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is no UTF-8: save the file as UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{file}: lists or mappings are nested too deeply, or one contains itself") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter: a date or number that does not exist
        raise ConfigError(f"{file}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected keys such as 'root: data', found {type(values).__name__}")
    return values


def _keys_given_twice(node: yaml.Node | None, where: str, seen: set[int]) -> Iterator[str]:
    """A line for each key that a mapping has twice: YAML takes the last, and the first one's value would be lost."""
    if id(node) in seen:  # an anchor is looked at once, however often it is used
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = str(key.value)
        line = key.start_mark.line + 1
        if name in lines:
            yield f"'{where}{name}' is given twice, in lines {lines[name]} and {line}: keep one of them"
        lines[name] = line
        yield from _keys_given_twice(value, f"{where}{name}.", seen)
    for value in node.value if isinstance(node, yaml.SequenceNode) else []:
        yield from _keys_given_twice(value, where, seen)


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Values in a node, those of an alias at each place where it is used. RecursionError where a node contains itself.

    Raises ValueError for characters that no path can have, and for numbers that would take minutes to read.
    """
    if id(node) not in counts:
        match node:
            case yaml.MappingNode():
                inside = [one for pair in node.value for one in pair]
            case yaml.SequenceNode():
                inside = node.value
            case _:
                inside = []
                line = node.start_mark.line + 1
                if found := NO_TEXT.search(node.value):
                    raise ValueError(f"the character U+{ord(found[0]):04X} in line {line}, which is no text")
                if len(node.value) > LONGEST_NUMBER and node.tag in (f"{TAGS}int", f"{TAGS}float"):
                    raise ValueError(f"a number of {len(node.value)} characters in line {line}")
        counts[id(node)] = 1 + sum(_count(one, counts) for one in inside)
    return counts[id(node)]
