"""The user's globs over the names of parameters, which have the last word over the routing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from lightning_namo.routing.reasons import Candidate


def _match(
    keyword: str, globs: str | Iterable[str], candidates: list[Candidate]
) -> Iterator[tuple[Candidate, list[str]]]:
    """The candidates that globs match by any of their names, each with the globs that match it."""
    globs = [globs] if isinstance(globs, str) else list(globs)
    matched = [
        [g for g in globs if any(fnmatchcase(use.name, g) for use in candidate.uses)] for candidate in candidates
    ]
    for glob in globs:
        if not any(glob in found for found in matched):
            names = [use.name for candidate in reversed(candidates) for use in candidate.uses]
            tails = {name.split(".", k)[-1]: name for name in names for k in range(name.count(".") + 1)}
            close = difflib.get_close_matches(glob.strip("*."), tails, n=3, cutoff=0.0)
            nearest = ", ".join(dict.fromkeys(tails[tail] for tail in close))
            raise ValueError(
                f"Expected {glob!r} in {keyword} to match a parameter, but got no match. Nearest: {nearest}."
            )
    return ((candidate, found) for candidate, found in zip(candidates, matched, strict=True) if found)


def overrule(candidates: list[Candidate], adamw: str | Iterable[str], orthogonalize: str | Iterable[str]) -> None:
    """Let the user's globs have the last word over the routing."""
    for candidate, globs in _match("adamw", adamw, candidates):
        candidate.adamw = candidate.glob = f"glob {globs[0]!r} in adamw"
    for candidate, globs in _match("orthogonalize", orthogonalize, candidates):
        glob = f"glob {globs[0]!r} in orthogonalize"
        if candidate.glob is not None:
            raise ValueError(
                f"Expected one glob to decide on {candidate.name}, but got {candidate.glob} and {glob}. Narrow one."
            )
        if len(candidate.shape) < 2 or candidate.parameter.is_complex():
            got = "is complex" if candidate.parameter.is_complex() else f"has shape {candidate.shape}"
            raise ValueError(
                f"Expected {glob} to match real parameters of two or more dimensions, but {candidate.name} "
                f"{got}. Narrow the glob."
            )
        candidate.adamw, candidate.glob = None, glob


def set_batches(
    candidates: list[Candidate],
    batched: str | Iterable[str],
    transposed: str | Iterable[str],
    matrix: str | Iterable[str],
) -> None:
    """Let the user say what is a batch of matrices, what is one, and in which orientation they are stored."""
    told: dict[str, str] = {}
    for keyword, globs in (("batched", batched), ("matrix", matrix)):
        for candidate, found in _match(keyword, globs, candidates):
            words = f"glob {found[0]!r} in {keyword}"
            if candidate.name in told:
                raise ValueError(
                    f"Expected one glob to decide on {candidate.name}, but got {told[candidate.name]} and {words}. "
                    "Narrow one."
                )
            told[candidate.name] = words
            if keyword == "batched" and len(candidate.shape) < 3:
                raise ValueError(
                    f"Expected {words} to match parameters of three or more dimensions, a batch along the first, but "
                    f"{candidate.name} has shape {candidate.shape}. Narrow the glob."
                )
            candidate.batched, candidate.batch_words = keyword == "batched", words
    for candidate, found in _match("transposed", transposed, candidates):
        candidate.turned = True
        candidate.batch_words += f", glob {found[0]!r} in transposed" if candidate.batched else ""


def set_blocks(candidates: list[Candidate], blocks: Mapping[str, int | Sequence[int]]) -> None:
    """Divide matrices into row blocks as the user asks."""
    for candidate, globs in _match("blocks", blocks, candidates):
        if len(globs) > 1:
            raise ValueError(f"Expected one glob in blocks for {candidate.name}, but got {' and '.join(globs)}.")
        if candidate.adamw is not None:
            raise ValueError(
                f"Expected {globs[0]!r} in blocks to match matrices, but {candidate.name} takes AdamW "
                f"({candidate.adamw}). Narrow the glob, or name the parameter in orthogonalize."
            )
        asked, rows = blocks[globs[0]], candidate.rows
        equal = [rows // asked] * asked if isinstance(asked, int) and 1 <= asked <= rows else []
        sizes = equal if isinstance(asked, int) else list(asked)
        if sum(sizes) != rows or min(sizes, default=0) < 1:
            raise ValueError(
                f"Expected blocks of {candidate.name} to divide its {rows} rows (output features), or to be row "
                f"counts that add up to them. Got {asked}."
            )
        candidate.blocks = asked if isinstance(asked, int) else sizes if len(sizes) > 1 else 1
