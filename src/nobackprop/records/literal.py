"""Shows text from records, commands and files so that it can't act on a terminal, a table or a spreadsheet."""

from rich.text import Text


def plain(text: str) -> str:
    r"""The text with what is not printable, such as a terminal's escapes, written out, as in `\x1b[31m`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def literal(text: str) -> Text:
    """The same for rich, which then takes nothing in it for markup or the name of an emoji."""
    return Text(plain(text))


def cell(text: str) -> str:
    """The text as a spreadsheet's cell, with an apostrophe before what would be a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
