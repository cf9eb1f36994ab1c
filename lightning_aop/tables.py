"""Tables as text, Markdown, LaTeX and CSV, in which no name is taken for markup or for a formula."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from tabulate import SEPARATING_LINE, tabulate

__all__ = ["Format", "csv_text", "decimals", "formatted"]

Format: TypeAlias = Literal["text", "markdown", "latex", "csv"]

_STYLES = {"text": "plain", "markdown": "pipe", "latex": "latex_booktabs"}


def formatted(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    form: Format = "text",
    *,
    names: int = 1,
    notes: Iterable[str] = (),
) -> str:
    """Return rows of text as a table for a terminal, a document or a spreadsheet.

    Args:
        header: what the columns are called.
        rows: as many cells each as there are columns.
        form: "text", "markdown", "latex" (with the package booktabs) or "csv".
        names: this many columns hold names and are left-aligned; the others hold numbers. If there are
            several, a change in the first of them starts a new block of rows.
        notes: what has to be said beside the table; CSV has no place for it.
    """
    if form == "csv":
        return csv_text([header, *rows]).rstrip("\n")
    escape = _markdown if form == "markdown" else _one_line
    lines: list[Sequence[str]] = []
    block: str | None = None
    for row in rows:
        if names > 1 and form != "markdown" and block not in (None, row[0]):
            lines.append(SEPARATING_LINE)
        block = row[0]
        lines.append([escape(cell) for cell in row])
    table = tabulate(
        lines,
        [escape(cell) for cell in header],
        tablefmt=_STYLES[form],
        disable_numparse=True,
        colalign=["left"] * names + ["right"] * (len(header) - names) if lines else None,
    )
    said = [escape(note) for note in notes]
    if form == "latex":
        # After the end of a row, \\ or \midrule, these would be read as its argument.
        table = re.sub(r"^ *(?=[\[*])", " {}", table, flags=re.MULTILINE)
        return "\n".join([*(f"% {note}" for note in said), table])
    table = "\n".join(line.rstrip() for line in table.splitlines())
    bullet = "- " if form == "markdown" else ""
    return "\n".join([table, *([""] if said else []), *(bullet + note for note in said)])


def decimals(value: float, places: int = 2, sign: Literal["", "+"] = "") -> str:
    """Return a number with so many decimals; what rounds to 0 is not negative."""
    # Adding 0 leaves no minus at what is rounded to it.
    return f"{round(value, places) + 0.0:{sign}.{places}f}"


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as CSV, which spreadsheets open without running what is written in a cell.

    Text that a spreadsheet would take for a formula gets an apostrophe in front; numbers stay numbers.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [_harmless(cell) for cell in row] for row in rows
    )
    return text.getvalue()


# = + - @, also full-width and after spaces; a tab or a line break before anything.
_FORMULA = re.compile(r"[\t\n]|\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")


def _harmless(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    cell = re.sub(r"\r\n?", "\n", cell)  # not every csv.writer puts quotation marks around \r
    if not _FORMULA.match(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell.strip()


def _one_line(cell: str) -> str:
    """Return the text in one line, with what can't be printed spelt out."""
    line = " ".join(cell.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _markdown(cell: str) -> str:
    """Return the text with a backslash before all that Markdown, with tables and maths, would read.

    An underscore inside a word means nothing there, and brackets nothing but before a link.
    """
    special = r"[\\`*|<>~&$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])"
    return re.sub(special, r"\\\g<0>", _one_line(cell))
