"""Holds what the ranks of a walk show against the reference, after every event."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.fuzz.oracle import Expected, OfAdamW, OfMatrix, Rounding, least, unit
from tests.fuzz.ranks import Part, Seen
from tests.fuzz.walk import Event, Walk, gradients


class DifferenceError(Exception):
    """In words, what differs from the reference."""


@dataclass
class Tally:
    """What was compared: numbers, the largest error in units of its bound, and numbers whose bound says something."""

    numbers: int = 0
    sharp: int = 0
    worst: float = 0.0
    events: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def whole(name: str, parts: list[Part], shape: tuple[int, ...]) -> Tensor:
    """A tensor put together from what all ranks hold; replicas must have the same bits."""
    if parts[0].offset is None and parts[0].shape is None:  # FSDP1: each rank a run, or all of it
        runs = [part.local for part in parts]
        if all(run.shape == shape for run in runs):
            found = runs[0]
            if any(not torch.equal(run, found) for run in runs):
                raise DifferenceError(f"{name}: ranks hold different replicas")
            return found
        return torch.cat([run.flatten() for run in runs]).view(shape)
    found = torch.empty(shape, dtype=parts[0].local.dtype)
    seen = torch.zeros(shape, dtype=torch.bool)
    for rank, part in enumerate(parts):
        offset = part.offset or (0,) * part.local.dim()
        place = tuple(slice(o, o + n) for o, n in zip(offset, part.local.shape, strict=True))
        if part.shape != shape:
            raise DifferenceError(f"{name}: rank {rank} has shape {part.shape}, not {shape}")
        before = seen[place]
        if not torch.equal(found[place][before], part.local[before]):
            raise DifferenceError(f"{name}: rank {rank} holds another replica than those before it")
        found[place], seen[place] = part.local, True
    if not bool(seen.all()):
        raise DifferenceError(f"{name}: no rank holds all of it")
    return found


def dtypes_of(name: str, seen: list[Seen]) -> Rounding:
    """In which dtypes the ranks hold a parameter, and its state."""
    state = {key: part.local.dtype for key, part in seen[0].state[name].items()}
    statistics = state.get("v", state["step"])
    return Rounding(seen[0].weights[name].local.dtype, state.get("momentum_buffer") or state["exp_avg"], statistics)


class Reference:
    """The walk in one process, in float64."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.tally = walk, Tally()
        model = walk.model()
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.constant = {
            n: (p.detach().double(), torch.zeros_like(p, dtype=torch.float64)) for n, p in model.named_parameters()
        }
        self.trained: dict[str, OfMatrix | OfAdamW] = {}
        self.units: dict[str, Rounding] = {}
        self.skipped_groups = 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._train(name)

    def _train(self, name: str) -> None:
        W, eW = self.constant[name]
        layer = self.walk.layers[self.walk.layer_of(name)]
        if self.walk.is_matrix(name):
            blocks = layer.blocks
            transposed, is_batch = layer.kind in ("deconv", "turned"), layer.kind in ("experts", "turned")
            count = len(W) if is_batch else None
            self.trained[name] = OfMatrix(W, eW, transposed, blocks, count, self.walk.optimizer, self.walk.hyper)
        else:
            self.trained[name] = OfAdamW(W, eW, self.walk.hyper)

    # ------------------------------------------------------------------ events

    def live_through(self, event: Event, before: list[Seen], after: list[Seen]) -> None:
        """Do what an event does; the ranks say in which dtypes and where they hold what."""
        if event.kind == "step":
            self._step(event, before, after)
        elif event.kind == "schedule":
            key, factor = event.args["key"], event.args["factor"]
            for trained in self.trained.values():
                if isinstance(trained, OfMatrix):
                    getattr(trained, key).mul_(factor)
                else:
                    trained.group[key] *= factor
        elif event.kind == "unfreeze":
            added = [self.walk.standing(number).added for number in (event.number, event.number + 1)]
            for layer in added[1][len(added[0]) :]:
                for name in self.constant:
                    if self.walk.layer_of(name) == layer:
                        self._train(name)
        elif event.kind in ("reload", "resume"):
            self.skipped_groups = 0  # counted since an optimizer was built

    def _step(self, event: Event, before: list[Seen], after: list[Seen]) -> None:
        args, standing = event.args, self.walk.standing(event.number)
        world, data = standing.place.world, standing.place.data_parallel
        like = {name: torch.empty(W.shape, dtype=self.dtypes[name]) for name, (W, _) in self.constant.items()}
        grads: dict[str, tuple[Tensor, Tensor]] = {}
        total = {name: (torch.zeros_like(W), torch.zeros_like(W)) for name, (W, _) in self.constant.items()}
        for micro in range(args["micro"]):
            for rank in range(data):
                for name, grad in gradients(self.walk, event, micro, rank, like).items():
                    total[name][0].add_(grad.double() / data)
                    total[name][1].add_(grad.double().abs() / data)
        roundings = args["micro"] + data + 4 if args["micro"] * data > 1 else 0
        for name, (G, size) in total.items():
            if self.walk.layer_of(name) not in standing.still and name not in args["missing"]:
                u = roundings * unit(self.dtypes[name])
                grads[name] = G, u * size + (size > 0) * roundings * least(self.dtypes[name])
        plain = not args["closure"] or args["missing"] or args["hole"][1] or args["poison"][1] or args["clip"]
        lacking, poisoned = set(), set()
        for key, found in (("hole", lacking), ("poison", poisoned)):
            rank = args[key][0] % world
            for name in args[key][1] if plain else []:
                holders = [r for r, seen in enumerate(before) if seen.weights[name].local.numel()]
                if name not in grads or rank not in holders:
                    continue
                if key == "hole" and holders == [rank]:
                    del grads[name]
                elif key == "hole" or (name, rank) not in lacking:
                    found.add((name, rank))
        holes, poisons = {name for name, _ in lacking}, {name for name, _ in poisoned}
        if args["clip"]:
            if poisons:  # a norm that is NaN makes all gradients NaN
                poisons |= set(grads)
            else:
                grads = self._clipped(grads, args["clip"])
        spoiled_groups = set()
        for name in grads:
            if isinstance(self.trained.get(name), OfAdamW) and (name in holes or name in poisons):
                spoiled_groups.add(before[0].hyper[name][0])
        self.skipped_groups += len(spoiled_groups)
        for name, (G, eG) in grads.items():
            trained = self.trained[name]
            units = self._units(name, after)
            if isinstance(trained, OfAdamW):
                if before[0].hyper[name][0] not in spoiled_groups:
                    trained.step(G, eG, units)
            elif name in holes | poisons or float(G.square().sum()) > torch.finfo(units.statistics).max:
                trained.skipped += 1
            else:
                trained.step(G, eG, units)

    def _clipped(self, grads: dict[str, tuple[Tensor, Tensor]], bound: float) -> dict[str, tuple[Tensor, Tensor]]:
        wide = {n: torch.promote_types(self.dtypes[n], torch.float32) for n in self.dtypes}
        squares = {name: float(G.square().sum()) for name, (G, _) in grads.items()}
        largest = max((torch.finfo(dtype).max for dtype in wide.values()), default=0.0)
        total, count = sum(squares.values()), sum(G.numel() for G, _ in grads.values())
        if total > largest or any(square > torch.finfo(wide[n]).max for n, square in squares.items()):
            return {name: (torch.zeros_like(G), torch.zeros_like(G)) for name, (G, _) in grads.items()}
        u = max(unit(dtype) for dtype in wide.values())
        tiny = max(least(dtype) for dtype in wide.values())
        off = sum(float((2 * G.abs() * eG + eG * eG).sum()) for G, eG in grads.values())
        off += (count + 16) * u * (total + off) + count * tiny
        low, high = (math.sqrt(max(0.0, t)) * (1 + s * 4 * u) for t, s in ((total - off, -1), (total + off, 1)))
        exact, lower, upper = (min(1.0, bound / (norm + 1e-6)) for norm in (math.sqrt(total), high, low))
        e = max(exact - lower, upper - exact) + 4 * u * exact
        return {
            name: (exact * G, (exact + e) * eG + e * G.abs() + 2 * unit(self.dtypes[name]) * exact * G.abs())
            for name, (G, eG) in grads.items()
        }

    # ------------------------------------------------------------------ comparison

    def _units(self, name: str, seen: list[Seen]) -> Rounding:
        """The coarser of the dtypes before and now."""
        now = dtypes_of(name, seen)
        old = self.units.get(name, now)
        pairs = ((getattr(old, key), getattr(now, key)) for key in ("weight", "momentum", "statistics"))
        return Rounding(*(max(pair, key=unit) for pair in pairs))

    def compare(self, event: Event | None, seen: list[Seen]) -> None:
        """Hold what the ranks show against the reference.

        Raises:
            DifferenceError: In words.
        """
        self.tally.events += 1
        self.tally.kinds["start" if event is None else event.kind] += 1
        names = set(self.constant)
        if any(set(s.weights) != names for s in seen):
            raise DifferenceError(f"expected the parameters {sorted(names)} but got {sorted(seen[0].weights)}")
        if any(set(s.state) != set(self.trained) for s in seen):
            raise DifferenceError(f"expected {sorted(self.trained)} to be trained but got {sorted(seen[0].state)}")
        if any(s.hyper != seen[0].hyper for s in seen):
            raise DifferenceError(f"ranks have different groups: {[s.hyper for s in seen]}")
        for name in sorted(names):
            dtype = seen[0].weights[name].local.dtype
            self._cast(name, dtype, seen)
            shape = tuple(self.constant[name][0].shape)
            weight = whole(name, [s.weights[name] for s in seen], shape)
            if name not in self.trained:
                self._close(f"{name} (not trained)", weight, *self.constant[name])
                continue
            expected: Expected = self.trained[name].expected()
            self._close(name, weight, *expected.weight)
            if seen[0].hyper[name][1:] != (expected.lr, expected.weight_decay):
                raise DifferenceError(
                    f"{name}: lr and weight decay are {seen[0].hyper[name][1:]}, expected "
                    f"{(expected.lr, expected.weight_decay)}"
                )
            if any(set(s.state[name]) != set(expected.state) for s in seen):
                raise DifferenceError(
                    f"{name}: state has {sorted(seen[0].state[name])}, expected {sorted(expected.state)}"
                )
            # torch's AdamW counts where a gradient has come, which FSDP1 gives to no rank that holds nothing
            holders = [s for s in seen if s.weights[name].local.numel()] if not self.walk.is_matrix(name) else seen
            for key, (value, off) in expected.state.items():
                parts = [s.state[name][key] for s in (holders if key == "step" else seen)]
                self._close(f"{key} of {name}", whole(f"{key} of {name}", parts, tuple(value.shape)), value, off)
        matrices = sum(t.skipped for t in self.trained.values() if isinstance(t, OfMatrix))
        if any(s.skipped != matrices + self.skipped_groups for s in seen):
            raise DifferenceError(
                f"skipped_steps() is {[s.skipped for s in seen]}, expected {matrices} + {self.skipped_groups}"
            )

    def _cast(self, name: str, dtype: torch.dtype, seen: list[Seen]) -> None:
        """Add what a cast has rounded."""
        if name not in self.trained:
            W, eW = self.constant[name]
            if unit(dtype) > unit(self.dtypes[name]):
                self.constant[name] = W, eW + unit(dtype) * W.abs()
        else:
            now = dtypes_of(name, seen)
            old = self.units.get(name)
            if old is not None and now != old:
                self.trained[name].round(now)
            self.units[name] = now
        self.dtypes[name] = dtype

    def _close(self, what: str, actual: Tensor, expected: Tensor, off: Tensor) -> None:
        error = (actual.double() - expected).abs()
        self.tally.numbers += error.numel()
        self.tally.sharp += int((off <= 1e-3 * expected.abs().amax()).sum()) if error.numel() else 0
        ratio = torch.where(error == 0, 0.0, error / off)
        worst = float(ratio.max()) if ratio.numel() else 0.0
        self.tally.worst = max(self.tally.worst, worst)
        if not worst <= 1:
            at = tuple(int(i) for i in torch.unravel_index(ratio.nan_to_num(nan=math.inf).argmax(), ratio.shape))
            raise DifferenceError(
                f"{what}{list(at)} is {actual[at].item()!r}, expected {expected[at].item()!r} to within "
                f"{off.expand_as(error)[at].item():.2g}"
            )
