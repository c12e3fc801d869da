"""The step of a rule on shards, all ranks in one process: what they ask for is added up and put together here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.run import StackRun
from lightning_namo.optim.stack import MatrixParameter, MatrixStack, statistics_dtype
from lightning_namo.optim.trial import requests_of
from lightning_namo.polar.orthogonalize import orthogonalize
from lightning_namo.sharding.layout import FlatRange, Layout, Rectangle, ShardRegion
from lightning_namo.workspace import Workspace


def ways_to_shard(rows: int, columns: int) -> dict[str, list[ShardRegion]]:
    """Regions of a stored matrix by rank, for each kind of shards."""
    numel = rows * columns
    runs = [0, min(columns + 2, numel), min(columns + 2, numel), numel // 2 + 1, numel]  # the second rank has nothing
    by_row, by_column = -(-rows // 3), -(-columns // 2)
    return {
        "flat runs that begin within a row (FSDP1)": [
            FlatRange(start, stop, columns) for start, stop in itertools.pairwise(runs)
        ],
        "rows, on more ranks than there are (FSDP2)": [
            Rectangle(min(r * by_row, rows), min((r + 1) * by_row, rows), 0, columns) for r in range(4)
        ],
        "columns (FSDP2 by Shard(1), tensor parallelism)": [
            Rectangle(0, rows, 0, by_column),
            Rectangle(0, rows, by_column, columns),
        ],
        "rows and columns (FSDP2 with tensor parallelism)": [
            Rectangle(*row, *column)
            for row in ((0, by_row), (by_row, rows))
            for column in ((0, by_column), (by_column, columns))
        ],
    }


class SimulatedRanks:
    """Like matrices in shards, and their states, on ranks that are all in this process.

    Args:
        optimizer: Whose rule and hyper-parameters (of its first group) they are trained by.
        weights: Whole matrices as they are stored, (rows, columns) each.
        regions: What each rank holds of them.
    """

    def __init__(
        self, optimizer: OrthogonalizedOptimizer, weights: Sequence[Tensor], regions: Sequence[ShardRegion]
    ) -> None:
        self.optimizer, self.group, self.regions = optimizer, optimizer.param_groups[0], regions
        shape = tuple(weights[0].shape)
        keys = {"transposed": self.group["transposed"], "blocks": self.group["blocks"], "name": "a matrix"}
        holders = torch.full((len(weights),), sum(region.numel > 0 for region in regions))
        self.stacks: list[MatrixStack] = []
        for region in regions:
            layout = Layout.of(shape, region, **keys)
            members = []
            for weight in weights:
                part = region.of(weight.detach()).clone()
                shard = torch.nn.Parameter(part.flatten() if isinstance(region, FlatRange) else part)
                optimizer._regions[shard] = shape, region
                optimizer.state[shard] = optimizer._initial_state(shard, self.group)
                members.append(MatrixParameter("a matrix", shard, self.group, layout))
            dtype = statistics_dtype(weights[0])
            stack = MatrixStack(members, optimizer._kinds, True, 0, holders.to(dtype), None)
            stack.bind(optimizer.state)
            self.stacks.append(stack)
        self.requests = requests_of(optimizer._ruled, optimizer._kinds, self.stacks[0].parameters[0])

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], absent: tuple[int, int] | None = None) -> None:
        """One step.

        Args:
            grads: Of the whole matrices.
            absent: Rank and number of a matrix: there the gradient is missing.
        """
        runs = []
        for rank, (stack, region) in enumerate(zip(self.stacks, self.regions, strict=True)):
            shape = stack.local_shape
            of_rank = [
                None if grad is None or (rank, i) == absent else region.of(grad).reshape(shape)
                for i, grad in enumerate(grads)
            ]
            runs.append(StackRun(stack, self.optimizer._ruled, self.requests, of_rank, Workspace()))
        self._each(runs, [run.gradient_parts() for run in runs], StackRun.decide, self.requests.sums_first)
        while runs[0].leading_left:
            for run in runs:
                run.go_on()
            self._each(runs, [run.parts() for run in runs])
        while not runs[0].has_ended:
            self._orthogonalize(runs)
            while runs[0].asks_for_sums:
                self._each(runs, [run.parts() for run in runs])
                for run in runs:
                    run.go_on()
        for run in runs:
            run.count_step()

    def _each(
        self,
        runs: Sequence[StackRun],
        parts: Sequence[Sequence[Tensor]],
        told: Callable[[StackRun, Sequence[Tensor]], Any] | None = None,
        answered: bool = True,
    ) -> None:
        """Tell every rank the sums of all ranks' parts."""
        totals = [torch.stack(list(of_ranks)).sum(dim=0) for of_ranks in zip(*parts, strict=True)]
        for run in runs:
            if told is not None:
                told(run, totals)
            if answered:
                run.answer([total.clone() for total in totals])

    def _orthogonalize(self, runs: Sequence[StackRun]) -> None:
        """The polar factors of the whole matrices, cut into shards."""
        first = runs[0].stack
        layout, count = first.layout, len(first.parameters)
        whole = torch.zeros(count, *layout.stored, dtype=first.parameters[0].wire_dtype)
        for run, region in zip(runs, self.regions, strict=True):
            sent = torch.empty(count, *run.stack.local_shape, dtype=whole.dtype)
            run.write_directions(sent)
            part = region.of(whole)
            part.copy_(sent.view(part.shape))
        keys = {key: self.group[key] for key in ("ns_steps", "ns_coefficients")}
        matrices = layout.matrices(whole)
        factors = layout.store(orthogonalize(list(matrices), method=self.group["orthogonalizer"], **keys))
        for run, region in zip(runs, self.regions, strict=True):
            run.take_polar(region.of(factors).clone())

    def gathered(self) -> list[dict[str, Tensor]]:
        """The whole weight and state of each matrix.

        Raises:
            AssertionError: If a number is not the same on all ranks.
        """
        found = []
        for i in range(len(self.stacks[0].parameters)):
            shards = [stack.parameters[i].tensor for stack in self.stacks]
            states: list[dict[str, Tensor]] = [{"weight": s.detach(), **self.optimizer.state[s]} for s in shards]
            whole = {}
            for key, value in states[0].items():
                if key in ("weight", "momentum_buffer") or self.optimizer._kinds.get(key) == "element":
                    whole[key] = torch.full(self.stacks[0].layout.stored, torch.nan, dtype=value.dtype)
                    for state, region in zip(states, self.regions, strict=True):
                        part = region.of(whole[key])
                        part.copy_(state[key].view(part.shape))
                else:
                    assert all(torch.equal(state[key], value) for state in states), f"x.{key} differs between ranks"
                    whole[key] = value
            found.append(whole)
        return found
