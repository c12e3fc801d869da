"""The user's globs over the names of parameters, which have the last word over the routing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from lightning_namo.routing.candidates import Candidate
from lightning_namo.routing.fused import HEAD_BY_HEAD, Fused, blocks_of

Automatic: TypeAlias = Literal["auto", "heads"]
Blocks: TypeAlias = Automatic | Mapping[str, int | Sequence[int] | Automatic]


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
        candidate.confidence = "sure"
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
        candidate.adamw, candidate.glob, candidate.confidence = None, glob, "sure"
        candidate.notes.clear()


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
            candidate.batched, candidate.batch_words, candidate.confidence = keyword == "batched", words, "sure"
    for candidate, found in _match("transposed", transposed, candidates):
        candidate.turned = True
        candidate.batch_words += f", glob {found[0]!r} in transposed" if candidate.batched else ""


def set_blocks(candidates: list[Candidate], blocks: Blocks, known: Mapping[str, Fused]) -> None:
    """Divide matrices into row blocks as the user asks.

    Args:
        candidates: All parameters.
        blocks: "auto" or "heads" for all matrices, or from globs to that, to numbers of blocks or to their rows.
        known: By name, what is known of the rows of fused matrices.
    """
    if isinstance(blocks, str):
        by_head = _by_head(blocks, "blocks")
        for candidate in candidates:
            if candidate.name in known and candidate.blocks == 1:
                _divide(candidate, known[candidate.name], by_head)
        return
    for candidate, globs in _match("blocks", blocks, candidates):
        if len(globs) > 1:
            raise ValueError(f"Expected one glob in blocks for {candidate.name}, but got {' and '.join(globs)}.")
        if candidate.adamw is not None:
            raise ValueError(
                f"Expected {globs[0]!r} in blocks to match matrices, but {candidate.name} takes AdamW "
                f"({candidate.adamw}). Narrow the glob, or name the parameter in orthogonalize."
            )
        asked, rows = blocks[globs[0]], candidate.rows
        if isinstance(asked, str):
            by_head, fused = _by_head(asked, f"blocks of {globs[0]!r}"), known.get(candidate.name)
            if fused is None or blocks_of(fused, by_head) == 1:
                is_by_head = fused is not None and fused.parts == HEAD_BY_HEAD and fused.head > 0
                advice = (
                    "They are stored head by head: say 'heads'" if is_by_head else "Give their number or their rows"
                )
                raise ValueError(
                    f"Expected blocks={asked!r} to match matrices whose parts are known, but of {candidate.name} "
                    f"{candidate.shape} no {'heads' if by_head else 'parts'} are known. {advice}."
                )
            _divide(candidate, fused, by_head)
            continue
        equal = [rows // asked] * asked if isinstance(asked, int) and 1 <= asked <= rows else []
        sizes = equal if isinstance(asked, int) else list(asked)
        if sum(sizes) != rows or min(sizes, default=0) < 1:
            raise ValueError(
                f"Expected blocks of {candidate.name} to divide its {rows} rows (output features), or to be row "
                f"counts that add up to them. Got {asked}."
            )
        candidate.blocks = asked if isinstance(asked, int) else sizes if len(sizes) > 1 else 1


def _by_head(asked: str, where: str) -> bool:
    if asked not in ("auto", "heads"):
        raise ValueError(
            f"Expected {where} to be 'auto', 'heads', a number of blocks, or the rows of each. Got {asked!r}."
        )
    return asked == "heads"


def _divide(candidate: Candidate, fused: Fused, by_head: bool) -> None:
    candidate.blocks = blocks_of(fused, by_head)
    if candidate.blocks != 1:
        count = candidate.blocks if isinstance(candidate.blocks, int) else len(candidate.blocks)
        candidate.notes.append(f"{count} blocks: {'heads' if by_head and fused.head else fused.parts}")
