"""Text from outside (names of files, classes, licences, messages about them) as people can be shown it safely."""

import re
import unicodedata

_MARKDOWN = re.compile(r"([\\`*_\[\]<>&|~$:])")  # what begins links, pictures, HTML, emphasis, code, cells and formulas


_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, format, half a pair, private, none; they end lines


def printable(text: str, keep: str = "") -> str:
    """The text with escapes, as Python writes them in strings, in the place of what a terminal would act on.

    That is control codes, line ends, marks that turn the direction of writing, and bytes that are no UTF-8; characters
    in `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _HIDDEN else repr(c)[1:-1] for c in text)


def in_markdown(text: str) -> str:
    """The text as Markdown that shows it as it is, on one line: nothing in it is a link, picture, cell or HTML."""
    return _MARKDOWN.sub(r"\\\1", printable(text))
