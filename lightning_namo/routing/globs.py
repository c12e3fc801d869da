"""The user's globs over the names of parameters, which have the last word over the routing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from lightning_namo.routing.reasons import Candidate


def _match(keyword: str, globs: str | Iterable[str], entries: list[Candidate]) -> Iterator[tuple[Candidate, list[str]]]:
    """The entries that globs match by any of their names, each with the globs that match it."""
    globs = [globs] if isinstance(globs, str) else list(globs)
    matched = [[g for g in globs if any(fnmatchcase(use.name, g) for use in e.uses)] for e in entries]
    for glob in globs:
        if not any(glob in found for found in matched):
            names = [use.name for entry in reversed(entries) for use in entry.uses]
            tails = {name.split(".", k)[-1]: name for name in names for k in range(name.count(".") + 1)}
            close = difflib.get_close_matches(glob.strip("*."), tails, n=3, cutoff=0.0)
            nearest = ", ".join(dict.fromkeys(tails[tail] for tail in close))
            raise ValueError(
                f"Expected {glob!r} in {keyword} to match a parameter, but got no match. Nearest: {nearest}."
            )
    return ((entry, found) for entry, found in zip(entries, matched, strict=True) if found)


def overrule(entries: list[Candidate], adamw: str | Iterable[str], orthogonalize: str | Iterable[str]) -> None:
    """Let the user's globs have the last word over the routing."""
    for entry, globs in _match("adamw", adamw, entries):
        entry.adamw = entry.glob = f"glob {globs[0]!r} in adamw"
    for entry, globs in _match("orthogonalize", orthogonalize, entries):
        glob = f"glob {globs[0]!r} in orthogonalize"
        if entry.glob is not None:
            raise ValueError(
                f"Expected one glob to decide on {entry.name}, but got {entry.glob} and {glob}. Narrow one."
            )
        if len(entry.shape) < 2 or entry.parameter.is_complex():
            got = "is complex" if entry.parameter.is_complex() else f"has shape {entry.shape}"
            raise ValueError(
                f"Expected {glob} to match real parameters of two or more dimensions, but {entry.name} "
                f"{got}. Narrow the glob."
            )
        entry.adamw, entry.glob = None, glob


def set_blocks(entries: list[Candidate], blocks: Mapping[str, int | Sequence[int]]) -> None:
    """Divide matrices into row blocks as the user asks."""
    for entry, globs in _match("blocks", blocks, entries):
        if len(globs) > 1:
            raise ValueError(f"Expected one glob in blocks for {entry.name}, but got {' and '.join(globs)}.")
        if entry.adamw is not None:
            raise ValueError(
                f"Expected {globs[0]!r} in blocks to match matrices, but {entry.name} takes AdamW "
                f"({entry.adamw}). Narrow the glob, or name the parameter in orthogonalize."
            )
        asked, rows = blocks[globs[0]], entry.rows
        equal = [rows // asked] * asked if isinstance(asked, int) and 1 <= asked <= rows else []
        sizes = equal if isinstance(asked, int) else list(asked)
        if sum(sizes) != rows or min(sizes, default=0) < 1:
            raise ValueError(
                f"Expected blocks of {entry.name} to divide its {rows} rows (output features), or to be row "
                f"counts that add up to them. Got {asked}."
            )
        entry.blocks = asked if isinstance(asked, int) else sizes if len(sizes) > 1 else 1
