"""Tables: rows in, Markdown and LaTeX out. A row is a dictionary of texts by column, the same columns in every row."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from oasis_vq.config import Paths
from oasis_vq.files import write_whole

Rows = Sequence[Mapping[str, str]]
FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}"
"""Shrinks what follows to the width of the text if it is wider."""


def markdown_table(rows: Rows) -> str:
    """Return rows as a Markdown table; the columns are those of the first row.

    Raises:
        ValueError: if there are no rows, or one has other columns.
    """
    header = _columns(rows)
    lines = [header, ["---"] * len(header), *([str(row[name]) for name in header] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def latex_table(rows: Rows, *, widths: Mapping[str, str] | None = None, caption: str = "", label: str = "") -> str:
    """Return rows as a LaTeX table with the rules of booktabs; what LaTeX would take for commands is escaped.

    One that is too wide for the page is shrunk, by graphicx.

    Args:
        rows: the table.
        widths: of columns whose text is to be broken into lines, such as '6cm', by name.
        caption: with one it is a floating table, and escaped too.
        label: of the floating table.

    Raises:
        ValueError: as `markdown_table`.
    """
    import pandas as pd  # here: it takes half a second to import

    columns = "".join(f"p{{{widths[name]}}}" if name in (widths or {}) else "l" for name in _columns(rows))
    floating = {"caption": escaped(caption), "label": label or None, "position": "tb"} if caption else {}
    text = pd.DataFrame(list(rows), dtype=str).to_latex(index=False, escape=True, column_format=columns, **floating)
    text = text.replace(r"\begin{tabular}", f"{FITTED}{{%\n\\begin{{tabular}}")
    return text.replace(r"\end{tabular}", r"\end{tabular}}")


def escaped(text: str) -> str:
    """Return text with the characters that LaTeX would take for commands escaped."""
    return "".join(f"\\{letter}" if letter in "%&_#$" else letter for letter in text)


def save_table(rows: Rows, name: str, *, caption: str, folder: str | Path | None = None) -> None:
    """Write a table as LaTeX, with its caption and the label `tab:<name>`, and as Markdown.

    Args:
        rows: the table.
        name: file name without suffix.
        caption: what it says of whom, and what to notice.
        folder: None for `Paths.figures`.

    Raises:
        ValueError: as `markdown_table`.
    """
    folder = Path(folder) if folder is not None else Paths().figures
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.tex", latex_table(rows, caption=caption, label=f"tab:{name}").encode())
    write_whole(folder / f"{name}.md", f"{markdown_table(rows)}\n{caption}\n".encode())


def _columns(rows: Rows) -> list[str]:
    """Return the columns that all rows have."""
    if not rows:
        raise ValueError("A table has at least one row. Received: none.")
    header = list(rows[0])
    for row in rows:
        if list(row) != header:
            raise ValueError(f"All rows have the columns {header}. Received: {list(row)}.")
    return header
