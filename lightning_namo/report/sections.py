"""All sections of a report, in their order."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_namo.report.advice import MOST, advice
from lightning_namo.report.drawing import Section
from lightning_namo.report.loss import loss_section
from lightning_namo.report.matrices import clamps_section, layers_section, spectra_section
from lightning_namo.report.runs import Run
from lightning_namo.report.table import runs_section
from lightning_namo.report.valleys import valleys_section


def all_sections(runs: Sequence[Run], smoothing: float) -> list[Section]:
    """What is said of runs, which are in the order of their loss, and what is missing."""
    looked_at = f" (matrices: of the {MOST} runs with the lowest loss)" if len(runs) > MOST else ""
    given = advice(runs) or [f"None: no number calls for a change{looked_at}."]
    broken = [f"{run.name}, {words}" for run in runs for words in run.broken]
    return [
        Section("Advice", given),
        runs_section(runs),
        loss_section(runs, smoothing),
        valleys_section(runs),
        layers_section(runs),
        spectra_section(runs),
        clamps_section(runs),
        Section("Files", broken or ["All event files and settings could be read."]),
    ]
