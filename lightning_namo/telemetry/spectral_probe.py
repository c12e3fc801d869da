"""Reads the spectra of an optimizer's matrices, wherever their shards are: the owner of a matrix measures it."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.groups import named_parameters
from lightning_namo.optim.run import StackRun
from lightning_namo.optim.stack import MatrixStack
from lightning_namo.telemetry.spectra import (
    NUMBERS,
    Decomposition,
    Measured,
    Spectra,
    nuclear_norm,
    orthogonality_error,
    subspace_error,
    workable,
)


class SpectralProbe:
    """Two steps make a reading: `watch` before the first, `read` when the gradients of the second are there.

    ::

        probe.watch(); optimizer.step(); ...backward of the next step...; spectra = probe.read(); optimizer.step()

    Between the two the probe keeps a copy of the gradients. All ranks must do the same.

    Args:
        optimizer: Whose matrices are read.
        parameters: Globs over the names of parameters; None: all matrices.
        rank: Of the part that is taken for signal: of leading subspaces and of the gap.

    Raises:
        ValueError: If a glob matches no matrix.
    """

    def __init__(self, optimizer: OrthogonalizedOptimizer, parameters: Sequence[str] | None, rank: int) -> None:
        self.optimizer, self.rank = optimizer, rank
        pairs = [pair for group in optimizer.param_groups if group["orthogonalize"] for pair in named_parameters(group)]
        self._names = dict(pairs) if parameters is None else _matching(dict(pairs), parameters)
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # leading subspaces of the last reading
        self._gradients: dict[int, Tensor] = {}  # of stacks, by their number
        self._stacks: list[MatrixStack] = []  # which the gradients are of
        self._errors: dict[str, Tensor] = {}
        self._hook: Any = None

    @property
    def has_step(self) -> bool:
        """Whether a step was watched that has not been read."""
        return bool(self._stacks)

    def watch(self) -> None:
        """Watch the next step."""
        self.close()
        self.optimizer._watch = self._see
        self._hook = self.optimizer.register_step_post_hook(self._keep)

    def close(self) -> None:
        """Leave the optimizer alone, and forget a step that was watched."""
        if self._hook is not None:
            self._hook.remove()
            self.optimizer._watch = self._hook = None
        self._gradients, self._stacks, self._errors = {}, [], {}

    def _see(self, run: StackRun, factors: Sequence[Tensor]) -> None:
        """The polar factors of a stack that this rank owns, as the optimizer gets them."""
        names, invalid = self._names_of(run.stack), run._invalid
        for of_block, factor in zip(names, factors, strict=True):
            errors = orthogonality_error(factor).masked_fill(invalid, math.nan)
            self._errors |= {name: error for name, error in zip(of_block, errors, strict=True) if name is not None}

    @torch.no_grad()
    def _keep(self, *_: Any) -> None:
        """The gradients as the step saw them."""
        errors, stacks = self._errors, self._all_stacks()
        self.close()
        self._errors, self._stacks = errors, stacks
        self._gradients = {id(stack): _gradients(stack) for stack in stacks if self._is_read(stack)}

    @torch.no_grad()
    def read(self, with_next: bool = True) -> dict[str, Spectra]:
        """The spectra of the step that was watched, by matrix, the same on all ranks. Collective.

        Args:
            with_next: Whether the gradients that are there now are the next step's, to align with.
        """
        if [id(stack) for stack in self._stacks] != [id(stack) for stack in self._all_stacks()]:
            self.close()  # parameters came or went
            return {}
        places, end = {}, 0
        for name, (rows, columns) in self._matrices():
            places[name] = end
            end += 2 * min(rows, columns) + len(NUMBERS)
        exchange = self.optimizer._exchange
        numbers = torch.zeros(end, dtype=torch.float32, device=exchange.device)
        before, self._before = self._before, {}

        def read(stack: MatrixStack) -> Tensor | None:
            if not self._is_read(stack):
                return None
            gradients = self._gradients.pop(id(stack))
            following = _gradients(stack) if with_next else torch.full_like(gradients, math.nan)
            return torch.cat([gradients.float(), stack.state["momentum_buffer"].float(), following.float()])

        for stack, of_blocks in self.optimizer.whole_matrices(read):
            averages_polar = self.optimizer.requests(stack.parameters[0]).own_momentum
            for names, matrices in zip(self._names_of(stack), of_blocks, strict=True):
                gradients, momenta, following = matrices.chunk(3)
                for matrix, G, M, ahead in zip(names, gradients, momenta, following, strict=True):
                    if matrix is not None:
                        found = self._measure(matrix, G, M, ahead, averages_polar, before.get(matrix))
                        numbers[places[matrix] : places[matrix] + len(found)] = found
        exchange.start_sum(numbers)()
        on_host = numbers.cpu().numpy()
        self.close()
        spectra = {}
        for name, (rows, columns) in self._matrices():
            start, size = places[name], min(rows, columns)
            gradient, momentum = on_host[start : start + size], on_host[start + size : start + 2 * size]
            measured = Measured(*on_host[start + 2 * size : start + 2 * size + len(NUMBERS)].tolist())
            spectra[name] = Spectra(gradient, momentum, measured, self.rank)
        return spectra

    def _measure(
        self,
        name: str,
        gradient: Tensor,
        momentum: Tensor,
        following: Tensor,
        averages_polar: bool,
        before: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Singular values of gradient and momentum, and `Measured`, of one whole matrix in a row."""
        (G, known), (M, known_momentum), (ahead, known_next) = map(_finite, (gradient, momentum, following))
        known_momentum = torch.where(M.any(), known_momentum, math.nan)
        of_gradient, of_momentum, nuclear = Decomposition(G), Decomposition(M), nuclear_norm(ahead) * known_next
        along_momentum = "alignment_polar_average" if averages_polar else "alignment_momentum"
        found = {
            along_momentum: ((M if averages_polar else of_momentum.polar()) * ahead).sum() * known_momentum,
            "alignment_gradient": (of_gradient.polar() * ahead).sum() * known,
        }
        found = {key: inner_product / nuclear for key, inner_product in found.items()}
        if (subspaces := of_momentum.leading(self.rank)) is not None:
            self._before[name] = subspaces
            for side, old, new in zip(("left", "right"), before or (), subspaces, strict=before is not None):
                found[f"subspace_change_{side}"] = subspace_error(new, old) * known_momentum
        if name in self._errors:
            found["orthogonality_error"] = self._errors[name]
        others = [found.get(key, nuclear.new_full((), math.nan)).to(nuclear) for key in NUMBERS]
        spectra = of_gradient.values * known, of_momentum.values * known_momentum
        return torch.cat([*spectra, torch.stack(others)]).float()

    # ------------------------------------------------------------------ names

    def _all_stacks(self) -> list[MatrixStack]:
        return list(itertools.chain.from_iterable(self.optimizer._prepare()[1]))

    def _is_read(self, stack: MatrixStack) -> bool:
        return any(parameter.tensor in self._names for parameter in stack.parameters)

    def _names_of(self, stack: MatrixStack) -> list[list[str | None]]:
        """Of a stack's matrices, for each block; None: it is not read. As `ReadingLog` names them."""
        blocks, part = range(len(stack.layout.blocks)), stack.part
        if part is None:
            members = [(parameter.tensor, 0, 1) for parameter in stack.parameters]
        else:
            tensor = stack.parameters[0].tensor
            members = [(tensor, part.first + i, part.of.count) for i in range(part.count)]
        return [
            [
                None
                if (name := self._names.get(tensor)) is None
                else (f"{name}[{i * len(blocks) + block}]" if count * len(blocks) > 1 else name)
                for tensor, i, count in members
            ]
            for block in blocks
        ]

    def _matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name and shape of every matrix that is read, in the same order on all ranks."""
        for stack in self._all_stacks():
            for names, shape in zip(self._names_of(stack), stack.layout.matrix_shapes, strict=True):
                yield from ((name, shape) for name in names if name is not None)


def _gradients(stack: MatrixStack) -> Tensor:
    """A copy of the local gradients of a stack, (P, ...), NaN where there is none."""
    found = stack.gradients()
    if stack.part is not None and found[0] is not None:
        return found[0].clone()
    shape, dtype = stack.local_shape, stack.parameters[0].tensor.dtype
    absent = torch.full(shape, math.nan, dtype=dtype, device=stack.device)
    if stack.part is not None:
        return absent.expand(stack.count, *shape)
    return torch.stack([absent if gradient is None else gradient for gradient in found])


def _finite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix and 1, or zeros and NaN in place of one that is not finite; float64, where there is such."""
    matrix = workable(matrix)
    finite = matrix.isfinite().all()
    return torch.where(finite, matrix, 0), torch.where(finite, 1, math.nan)


def _matching(names: dict[Tensor, str], globs: Sequence[str]) -> dict[Tensor, str]:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names.values()):
            nearest = difflib.get_close_matches(glob, names.values(), n=3, cutoff=0.0)
            raise ValueError(
                f"Expected {glob!r} in parameters to match a matrix, but got no match. Nearest: {', '.join(nearest)}."
            )
    return {tensor: name for tensor, name in names.items() if any(fnmatchcase(name, glob) for glob in globs)}
