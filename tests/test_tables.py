"""Tables in which a name is a name, whatever it holds: read back by independent parsers."""

import csv
import io
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lightning_aop.tables import csv_text, decimals, formatted

NAMES = st.text(st.characters(codec="utf-8") | st.sampled_from("\\`*_|<>[](){}#+-.!~&$^%=@\n"))
NASTY = r"a|b *c* _d_ `e` <b>f</b> [g](h) ![i](j) ~~k~~ &amp; \ $l$ 5% #6 {7} 8^9"


def shown(name: str) -> str:
    """Return what a reader is to see: one line, and nothing that steers a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(name.split())
    )


@given(NAMES)
@example(NASTY)
@example("a\nb\x1b[31mc")
@example("fast_sigcam")
@settings(max_examples=100, deadline=None)
def test_markdown_shows_the_name(name: str) -> None:
    text = formatted(["method", "overall"], [[name, "-1.50"]], "markdown")
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    (*_, cell, number) = [token for token in parser.parse(text) if token.type == "inline"]
    children = cell.children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == shown(name)
    assert number.content == "-1.50"


def test_markdown_leaves_ordinary_names_and_intervals_alone() -> None:
    text = formatted(["a", "b"], [["fast_sigcam", "1.00 [0.50, -2.00]"]], "markdown")
    assert text.splitlines()[2] == "| fast_sigcam | 1.00 [0.50, -2.00] |"


LATEX = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\^{}": "^",
    r"\ensuremath{<}": "<",
    r"\ensuremath{>}": ">",
} | {rf"\{c}": c for c in "&%$#_{}"}


def typeset(cell: str) -> str:
    """Read LaTeX as far as tables need it; what is neither plain nor known is an error."""
    known = "|".join(map(re.escape, sorted(LATEX, key=len, reverse=True)))
    bare = re.sub(known, "", cell)
    assert not re.search(r"[\\&%$#_{}~^]", bare), f"raw in {cell}"
    return re.sub(known, lambda found: LATEX[found.group()], cell)


@given(NAMES)
@example(NASTY)
@example("[0pt] is no argument of the line before")
@example("* neither")
@settings(max_examples=100, deadline=None)
def test_latex_typesets_the_name(name: str) -> None:
    text = formatted(["method", "overall"], [[name, "-1.50"]], "latex", notes=[name])
    said, *rest = text.splitlines()
    assert said == f"% {shown(name)}"
    assert rest[0] == r"\begin{tabular}{lr}"
    row = rest[-3]
    assert not re.match(r"\s*[\[*]", row)
    cells = row.removesuffix(r"\\").split(" & ")
    assert len(cells) == 2
    assert typeset(cells[0].strip().removeprefix("{}")) == shown(name)
    assert cells[1].strip() == "-1.50"


def test_text_is_aligned_and_in_blocks() -> None:
    rows = [["one", "a", "1.50"], ["one", "b\n\x1b[1m", "-12.50"], ["two", "a", "3.00"]]
    assert formatted(["net", "by", "value"], rows, names=2, notes=["note"]).splitlines() == [
        "net    by           value",
        "one    a             1.50",
        r"one    b \x1b[1m   -12.50",
        "",
        "two    a             3.00",
        "",
        "note",
    ]


@pytest.mark.parametrize(
    "cell",
    [
        "=1+1",
        "+a",
        "-b",
        "@sum",
        "\t=1",
        "\rx",
        "\nx",
        " =1",
        "\uff1d1",
        "-1.jpg",
        '=HYPERLINK("x")',
    ],
)
def test_no_cell_of_a_csv_is_a_formula(cell: str) -> None:
    (row,) = csv.reader(io.StringIO(csv_text([[cell, 1]]), newline=""))
    assert row == ["'" + cell.replace("\r", "\n"), "1"]


@pytest.mark.parametrize(
    "cell", [-0.5, "-0.500000", "+1", "-inf", "1e-5", -3, "", "a=b", "n-1", None]
)
def test_numbers_and_harmless_text_stay_what_they_are(cell: object) -> None:
    (row,) = csv.reader(io.StringIO(csv_text([[cell, "x"]])))
    assert row == ["" if cell is None else str(cell), "x"]


@pytest.mark.parametrize("form", ["text", "markdown", "latex", "csv"])
def test_a_table_without_rows_has_its_heading(form: str) -> None:
    assert "value" in formatted(["name", "value"], [], form)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [
        (-0.004, 2, "0.00"),
        (-0.0, 2, "0.00"),
        (-0.006, 2, "-0.01"),
        (-0.004, 3, "-0.004"),
        (0.996, 2, "1.00"),
        (float("nan"), 2, "nan"),
    ],
)
def test_what_rounds_to_zero_has_no_sign(value: float, places: int, text: str) -> None:
    assert decimals(value, places) == text
