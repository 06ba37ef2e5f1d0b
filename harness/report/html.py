"""Pieces that all HTML pages are made of: the style sheet, tables, and verdicts in their colours."""

from collections.abc import Sequence
from html import escape
from typing import Literal

from harness.run.files import ASSETS

Tone = Literal["better", "worse", "open"]
"""The CSS class of a verdict; `open` where nothing was decided."""


def style() -> str:
    """Return the style sheet of all pages."""
    return (ASSETS / "report.css").read_text(encoding="utf-8")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """Return a table as HTML. Headings and cells must be escaped already; `classes` are the columns' CSS classes."""
    classes = classes or [""] * len(headings)

    def row_of(tag: str, cells: Sequence[str]) -> str:
        marked = (f'<{tag} class="{kind}">{cell}</{tag}>' for cell, kind in zip(cells, classes, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(row_of("td", row) for row in rows)
    return f"<table><thead>{row_of('th', headings)}</thead><tbody>{body}</tbody></table>"


def verdict_mark(word: str, tone: Tone) -> str:
    """Return a verdict as HTML, in the colour of its tone."""
    return f'<span class="verdict {tone}">{escape(word)}</span>'
