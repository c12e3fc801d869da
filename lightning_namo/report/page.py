"""`lightning-namo report`: one self-contained page about runs, and a summary in Markdown."""

from __future__ import annotations

import base64
import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_namo.arguments import Range, check_ranges
from lightning_namo.atomic_io import replacing
from lightning_namo.report.runs import Run, by_loss, read_runs

if TYPE_CHECKING:
    from lightning_namo.report.drawing import Section, Table

_TEMPLATE = Path(__file__).with_name("page.html")
_NEEDED = ("plotly", "jinja2")


def report(runs: list[str], out: str = "report.html", smoothing: float = 0.0) -> dict[str, Any]:
    """Make one HTML page about runs, which needs no network, and a Markdown summary beside it.

    Reads the event files that a TensorBoardLogger wrote, also of runs that are going on, were resumed, or broke off.

    Args:
        runs: Folders with event files, or ones below which there are such folders.
        out: The page; the summary has its name with .md at its end. Both are replaced if they are there.
        smoothing: Weight of the exponential moving average of the losses, at least 0 and below 1; 0 draws them as they
            are.

    Returns:
        The two files and the number of runs.

    Raises:
        ValueError: A path without event files, a file name or a smoothing that cannot be, or no plotly.
    """
    check_ranges({"smoothing": smoothing}, "report", {"smoothing": Range(lambda value: 0 <= value < 1, "in [0, 1)")})
    page = Path(out)
    if not runs or page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"Expected one or more runs and a page to write, as report.html. Got runs {runs} and out {out}."
        )
    summary = page.with_suffix(".md")
    if folder := next((path for path in (page, summary) if path.is_dir()), None):
        raise ValueError(f"Expected files to write at {page} and {summary}. Got the folder {folder}.")
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"Expected plotly to be installed: pip install 'lightning-namo[report]'. Got no {' and no '.join(missing)}."
        )
    from lightning_namo.report.sections import all_sections

    found = by_loss(read_runs(runs))
    sections = all_sections(found, smoothing)
    for path, text in {page: _html(found, sections), summary: markdown(sections)}.items():
        try:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"Expected a place to write {path}. Got: {error}") from error
    return {"page": str(page), "summary": str(summary), "runs": len(found)}


def _html(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    import jinja2
    import plotly.io
    import plotly.offline

    script = gzip.compress(plotly.offline.get_plotlyjs().encode(), mtime=0)
    drawings = [drawing for section in sections for drawing in section.drawings]
    templates = {name: plotly.io.templates[f"plotly_{name}"].to_plotly_json() for name in ("white", "dark")}
    template = jinja2.Template(
        _TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page: str = template.render(
        title=f"{runs[0].name}: report" if len(runs) == 1 else f"Report on {len(runs)} runs",
        sections=sections,
        figures=f"[{','.join(drawing.figure.to_json() for drawing in drawings)}]",  # plotly escapes <
        templates=plotly.io.json.to_json_plotly(templates),
        plotly=base64.b64encode(script).decode(),
    )
    return page


def markdown(sections: Sequence[Section]) -> str:
    """The lines and tables of all sections."""
    blocks = ["# Report"]
    for section in sections:
        blocks.append(f"## {section.title}")
        if section.lines:
            blocks.append("\n".join(f"- {line}" for line in section.lines))
        if section.table is not None:
            blocks.append(_markdown_table(section.table))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows
    )
