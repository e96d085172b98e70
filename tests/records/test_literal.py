"""Text is shown as it is: in a terminal, in a table, in a spreadsheet."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from nobackprop.records.literal import cell, literal, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("lra_e ± ü 日本", None),
        ("[red]a[/red] [/] :smile:", None),
        ("\x1b[31mred\x07\r\n\t", r"\x1b[31mred\x07\r\n\t"),
        ("\x9b31m\u202e\u2028\udc80", r"\x9b31m\u202e\u2028\udc80"),
    ],
)
def test_text_is_shown_as_it_is(text: str, shown: str | None) -> None:
    assert plain(text) == (shown or text)
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    table = Table("a")
    table.add_row(literal(text))
    console.print(literal(text))
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count(shown or text) == 2


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1"])
def test_what_would_be_a_formula_is_text(text: str) -> None:
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a=1", "1-1", " =1"])
def test_other_text_is_left_as_it_is(text: str) -> None:
    assert cell(text) == text
