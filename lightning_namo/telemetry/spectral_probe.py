"""Reads the spectra of an optimizer's matrices, wherever their shards are: the owner of a matrix measures it."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

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
    """Reads a step once the next one begins, whose gradients it has not seen.

    ::

        probe.watch(); optimizer.step(); ...; optimizer.step(); step, spectra = probe.take()

    In between it keeps a copy of the gradients. All ranks must do the same.

    Args:
        optimizer: Whose matrices are read.
        parameters: Globs over the names of parameters; None: all matrices.
        rank: Of the part that is taken for signal: of leading subspaces and of the gap.

    Attributes:
        seconds: What its readings took.
    """

    def __init__(self, optimizer: OrthogonalizedOptimizer, parameters: Sequence[str] | None, rank: int) -> None:
        self.optimizer, self.parameters, self.rank = optimizer, parameters, rank
        self._names: dict[Tensor, str] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # leading subspaces of the last reading
        self._forget()
        self._due: int | None = None  # the number of a step that is to be watched
        self._taken: tuple[int, dict[str, Spectra]] | None = None
        self.seconds = 0.0
        optimizer._watchers = [*optimizer._watchers, self]

    def _forget(self) -> None:
        """The step that was watched."""
        self._watched: int | None = None
        self._stacks: list[MatrixStack] = []
        self._gradients: dict[int, Tensor] = {}  # of the stacks
        self._errors: dict[str, Tensor] = {}  # of what this rank owns

    def watch(self, step: int = 0) -> None:
        """Watch the next step.

        Args:
            step: Its number, which `take` gives back.
        """
        self._due = step

    def take(self) -> tuple[int, dict[str, Spectra]] | None:
        """The last reading that was not taken: number of the step, and spectra by matrix, the same on all ranks."""
        taken, self._taken = self._taken, None
        return taken

    @torch.no_grad()
    def finish(self) -> None:
        """Read a step that no other follows. Collective, if one was watched."""
        if self._watched is not None:
            self._read(with_next=False)

    def close(self) -> None:
        """Leave the optimizer alone."""
        self.optimizer._watchers = [watcher for watcher in self.optimizer._watchers if watcher is not self]
        self._forget()

    # ------------------------------------------------------------------ what the engine calls

    def step_begins(self) -> None:
        """Read the step before."""
        if self._watched is not None:
            self._read(with_next=True)
        if self._due is not None:
            self._names = matrix_names(self.optimizer, self.parameters)

    def sees(self, run: StackRun, factors: Sequence[Tensor]) -> None:
        """The errors of polar factors of a stack that this rank owns."""
        if self._due is not None:
            for names, of_block in zip(self._names_of(run.stack), factors, strict=True):
                for name, factor, invalid in zip(names, of_block, run._invalid, strict=True):
                    if name is not None:
                        self._errors[name] = orthogonality_error(factor).masked_fill(invalid, math.nan)

    def step_ends(self) -> None:
        """Keep the gradients as the step saw them."""
        if self._due is not None:
            self._watched, self._due, self._stacks = self._due, None, self._all_stacks()
            self._gradients = {id(stack): _gradients(stack) for stack in self._stacks if self._is_read(stack)}

    # ------------------------------------------------------------------ a reading

    def _read(self, with_next: bool) -> None:
        assert self._watched is not None
        if [id(stack) for stack in self._stacks] == [id(stack) for stack in self._all_stacks()]:
            began = self._clock()
            self._taken = self._watched, self._spectra(with_next)
            self.seconds += self._clock() - began
        self._forget()  # else parameters came or went

    def _clock(self) -> float:
        if (device := self.optimizer._exchange.device).type != "cpu":
            torch.accelerator.synchronize(device)  # what was queued before is not a reading's
        return time.perf_counter()

    def _spectra(self, with_next: bool) -> dict[str, Spectra]:
        places, end = {}, 0
        for name, (rows, columns), _ in self._matrices():
            places[name] = end
            end += 2 * min(rows, columns) + len(NUMBERS)
        exchange = self.optimizer._exchange
        numbers = torch.zeros(end, dtype=_widest(exchange.device), device=exchange.device)
        before, self._before = self._before, {}

        def read(stack: MatrixStack) -> Tensor | None:
            if not self._is_read(stack):
                return None
            gradients = self._gradients.pop(id(stack))
            following = _gradients(stack) if with_next else torch.full_like(gradients, math.nan)
            parts = gradients, stack.state["momentum_buffer"], following
            return torch.cat([part.to(stack.statistics_dtype) for part in parts])

        for stack, of_blocks in self.optimizer.whole_matrices(read):
            averages_polar = stack.group.get("order") == "post"
            for names, matrices in zip(self._names_of(stack), of_blocks, strict=True):
                gradients, momenta, following = matrices.chunk(3)
                for matrix, G, M, ahead in zip(names, gradients, momenta, following, strict=True):
                    if matrix is None:
                        continue
                    own = numbers[places[matrix] : places[matrix] + 2 * min(G.shape) + len(NUMBERS)]
                    try:
                        own.copy_(self._measure(matrix, G, M, ahead, averages_polar, before.get(matrix)))
                    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                        warnings.warn(f"The spectra of {matrix} are not known in this reading: {error}", stacklevel=2)
                        own.fill_(math.nan)
        exchange.start_sum(numbers)()
        on_host, spectra = numbers.cpu().numpy(), {}
        for name, (rows, columns), averages_gradients in self._matrices():
            start, size = places[name], min(rows, columns)
            gradient, momentum = on_host[start : start + size], on_host[start + size : start + 2 * size]
            measured = Measured(*on_host[start + 2 * size : start + 2 * size + len(NUMBERS)].tolist())
            spectra[name] = Spectra(gradient, momentum, measured, self.rank, averages_gradients)
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
        nuclear = nuclear_norm(ahead) * known_next
        decomposed = Decomposition(G)
        values, along_gradient = [decomposed.values * known], (decomposed.polar() * ahead).sum() * known
        decomposed = Decomposition(M)
        values.append(decomposed.values * known_momentum)
        along_momentum = ((M if averages_polar else decomposed.polar()) * ahead).sum() * known_momentum
        found = {
            "alignment_polar_average" if averages_polar else "alignment_momentum": along_momentum / nuclear,
            "alignment_gradient": along_gradient / nuclear,
        }
        if (subspaces := decomposed.leading(self.rank)) is not None:
            self._before[name] = subspaces
            for side, old, new in zip(("left", "right"), before or (), subspaces, strict=before is not None):
                found[f"subspace_change_{side}"] = subspace_error(new, old)
        if name in self._errors:
            found["orthogonality_error"] = self._errors[name]
        others = [found.get(key, nuclear.new_full((), math.nan)).to(nuclear) for key in NUMBERS]
        return torch.cat([*values, torch.stack(others)])

    # ------------------------------------------------------------------ names

    def _all_stacks(self) -> list[MatrixStack]:
        return list(itertools.chain.from_iterable(self.optimizer._prepare()[1]))

    def _is_read(self, stack: MatrixStack) -> bool:
        return any(parameter.tensor in self._names for parameter in stack.parameters)

    def _names_of(self, stack: MatrixStack) -> list[list[str | None]]:
        """Of a stack's matrices, for each block; None: it is not read. As `ReadingLog` names them."""
        blocks, part = stack.layout.matrix_shapes, stack.part
        if part is None:
            members = [(parameter.tensor, 0, 1) for parameter in stack.parameters]
        else:
            tensor = stack.parameters[0].tensor
            members = [(tensor, part.first + i, part.of.count) for i in range(part.count)]
        return [
            [
                None
                if (name := self._names.get(tensor)) is None or not min(shape)
                else (f"{name}[{i * len(blocks) + block}]" if count * len(blocks) > 1 else name)
                for tensor, i, count in members
            ]
            for block, shape in enumerate(blocks)
        ]

    def _matrices(self) -> Iterator[tuple[str, tuple[int, int], bool]]:
        """Name, shape and whether M averages gradients, of every matrix that is read, in one order on all ranks."""
        for stack in self._all_stacks():
            averages_gradients = not self.optimizer.requests(stack.parameters[0]).own_momentum
            for names, shape in zip(self._names_of(stack), stack.layout.matrix_shapes, strict=True):
                yield from ((name, shape, averages_gradients) for name in names if name is not None)


def matrix_names(optimizer: OrthogonalizedOptimizer, globs: Sequence[str] | None = None) -> dict[Tensor, str]:
    """The names of parameters that hold matrices and match a glob; of several of one name, name, name_2, ..."""
    found, met = {}, Counter[str]()
    for group in optimizer.param_groups:
        for tensor, name in named_parameters(group) if group["orthogonalize"] else ():
            met[name] += 1
            if globs is None or any(fnmatchcase(name, glob) for glob in globs):
                found[tensor] = name if met[name] == 1 else f"{name}_{met[name]}"
    return found


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _gradients(stack: MatrixStack) -> Tensor:
    """A copy of the local gradients of a stack, (P, ...), NaN where there is none."""
    try:
        found = stack.gradients()
    except ValueError:  # a sparse one, which the step refuses
        found = [None] * len(stack.parameters)
    if stack.part is not None and found[0] is not None:
        return found[0].clone()
    shape, dtype = stack.local_shape, stack.parameters[0].tensor.dtype
    absent = torch.full(shape, math.nan, dtype=dtype, device=stack.device)
    if stack.part is not None:
        return absent.expand(stack.count, *shape)
    return torch.stack([absent if gradient is None else gradient for gradient in found])


def _finite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix and 1, or NaN beside zeros and in place of one that is not finite; float64, where there is such."""
    matrix = workable(matrix)
    finite = torch.where(matrix.isfinite().all(), matrix, 0)
    return finite, torch.where(finite.any(), 1, math.nan)
