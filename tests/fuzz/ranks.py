"""What every rank of a walk does: builds its part of model and optimizer, lives through events, says what it holds."""

from __future__ import annotations

import copy
import io
import os
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_namo import build_optimizer, clip_gradients
from lightning_namo.testing.layouts import whole
from tests.fuzz.walk import PLAIN, Event, Walk, gradients, restructure
from tests.helpers.rules import RULES, taken
from tests.helpers.worker import clean, local


@dataclass
class Part:
    """What a rank holds of a tensor: where that begins (FSDP1: None, runs follow one another by rank), and numbers."""

    shape: tuple[int, ...] | None
    offset: tuple[int, ...] | None
    local: Tensor

    def __getstate__(self) -> tuple[Any, ...]:
        """Bytes: a tensor that is pickled by itself costs more than the step that it is of."""
        numbers = self.local.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return self.shape, self.offset, tuple(self.local.shape), self.local.dtype, numbers

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.shape, self.offset, shape, dtype, numbers = state
        empty = torch.empty(shape, dtype=dtype)
        self.local = torch.frombuffer(bytearray(numbers), dtype=dtype).view(shape) if numbers else empty


@dataclass
class Seen:
    """What a rank shows after an event."""

    weights: dict[str, Part]
    state: dict[str, dict[str, Part]]
    hyper: dict[str, tuple[int, float, float]]  # name -> number of its group, lr, weight_decay
    skipped: int


@dataclass
class Answer:
    """What a rank makes of a part of a walk: what it saw after each event, and the error that ended it."""

    seen: list[Seen] = field(default_factory=list)
    error: str | None = None


class Member:
    """A rank of a layout, before the event of the number ``first``."""

    def __init__(self, walk: Walk, first: int, folder: str | None) -> None:
        self.walk, self.first = walk, first
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        standing = walk.standing(first)
        self.place, self.still, self.unknown = standing.place, standing.still, standing.unknown
        file = None if folder is None else os.path.join(folder, "full.pt")
        saved = torch.load(file, weights_only=True) if file is not None and os.path.exists(file) else None
        self.inner: nn.Module = walk.model(first, self.place.layout in PLAIN)
        if saved is not None:
            self.inner.load_state_dict(saved["weights"])
        self.like = {name: torch.empty_like(p) for name, p in self.inner.named_parameters()}
        self.set_flags(self.inner)
        self.wrap()
        self.optimizer = self.build(standing.added)
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        elif folder is not None:
            for parameter in self.named().values():
                parameter.requires_grad_(True)  # torch leaves out the state of frozen parameters when it loads
            model, optimizer = get_state_dict(self.module, self.optimizer)
            dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
            set_state_dict(self.module, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
            self.set_flags(self.module)

    # ------------------------------------------------------------------ layouts

    def wrap(self) -> None:
        """Make ``module`` of ``inner``."""
        layout, world, choice = self.place.layout, self.place.world, self.place.choice
        self.module = self.inner
        if layout == "ddp":
            self.module = DistributedDataParallel(self.inner, gradient_as_bucket_view=bool(choice & 1))
        elif layout == "fsdp1":
            self._fsdp1()
        elif layout in ("fsdp2", "fsdp2-shard1"):
            self._fsdp2(init_device_mesh("cpu", (world,)))
        elif layout == "hsdp":
            shards = 2 if world == 4 or choice & 4 else 1
            self._fsdp2(init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicate", "shard")))
        elif layout == "tp":
            self._tensor_parallel(init_device_mesh("cpu", (world,)))
        elif layout == "fsdp2+tp":
            mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
            self._tensor_parallel(mesh["tp"])
            self._fsdp2(mesh["dp"])

    def _fsdp1(self) -> None:
        strategy = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)[self.place.choice & 1]
        options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
        options["sharding_strategy"] = strategy
        children = list(self.inner.named_children())
        dtypes = [next(child.parameters()).dtype for _, child in children]
        for index, (name, child) in enumerate(children):
            if dtypes[index] != dtypes[0] or (self.place.choice & 2 and index % 2):
                setattr(self.inner, name, FSDP(child, **options))
        self.module = FSDP(self.inner, **options)

    def _fsdp2(self, mesh: Any) -> None:
        def placement(parameter: nn.Parameter) -> Shard | None:
            divides = parameter.dim() > 1 and parameter.size(1) % self.place.world == 0
            return Shard(1) if self.place.layout == "fsdp2-shard1" and divides else None

        options: dict[str, Any] = {"mesh": mesh, "shard_placement_fn": placement}
        options["reshard_after_forward"] = bool(self.place.choice & 1)
        one_dtype = len({p.dtype for p in self.inner.parameters()}) == 1
        for child in [] if one_dtype and self.place.choice & 2 else self.inner.children():
            fully_shard(child, **options)
        fully_shard(self.inner, **options)

    def _tensor_parallel(self, mesh: Any) -> None:
        for child, layer in zip(self.inner.children(), self.walk.layers, strict=True):
            styles: dict[tuple[str, str], Any] = {
                ("linear", "rows"): ColwiseParallel,
                ("linear", "columns"): RowwiseParallel,
                ("embedding", "rows"): RowwiseParallel,
                ("embedding", "columns"): ColwiseParallel,
                ("norm", "rows"): SequenceParallel,
            }
            weight = getattr(child.layer, "weight", None)
            if self.place.layout == "fsdp2+tp" and weight is not None and min(weight.shape[:2]) < 2:
                continue  # FSDP2 cannot reduce an empty shard of tensor parallelism
            if (
                layer.kind in ("experts", "turned") and layer.cut != "no"
            ):  # expert parallelism, and of the last dimension
                cut = [Shard(0 if layer.cut == "rows" else 2)]
                shard = distribute_tensor(weight.detach(), mesh, cut)
                child.layer.weight = nn.Parameter(shard, requires_grad=weight.requires_grad)
            if style := styles.get((layer.kind, layer.cut)):
                parallelize_module(child, mesh, {"layer": style()})

    # ------------------------------------------------------------------ the optimizer

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters, as shards even after a forward pass outside training."""
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()
        return {clean(name): parameter for name, parameter in self.module.named_parameters()}

    def set_flags(self, module: nn.Module) -> None:
        """Freeze what gets no gradient; under FSDP1, which cannot change it later, what never had one."""
        for name, parameter in module.named_parameters():
            layer = self.walk.layer_of(clean(name))
            still = layer in self.still and (self.place.layout != "fsdp1" or layer in self.unknown)
            parameter.requires_grad_(not still)

    def build(self, added: list[int]) -> Any:
        """An optimizer that was built before the layers ``added`` were unfrozen, and has them now."""
        named = self.named()
        for name, parameter in named.items():
            parameter.requires_grad_(not self.walk.layers[self.walk.layer_of(name)].frozen)
        cls = RULES[self.walk.optimizer]
        routing = {"blocks": self.walk.blocks(), "heads": "matrix", "first_layers": "matrix"}
        optimizer = build_optimizer(self.module, cls, **routing, **taken(cls, self.walk.hyper))
        optimizer.bucket_bytes, optimizer.batched = self.walk.bucket_bytes, self.walk.batched
        for layer in added:
            of_layer = [p for name, p in named.items() if self.walk.layer_of(name) == layer]
            for parameter in of_layer:
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": of_layer})
        self.set_flags(self.module)
        return optimizer

    def full_state(self) -> dict[str, Any]:
        """Whole weights and optimizer state, the same on all ranks."""
        if isinstance(self.module, FSDP):
            complete = FullStateDictConfig(), FullOptimStateDictConfig(rank0_only=False, offload_to_cpu=False)
            with FSDP.state_dict_type(self.module, StateDictType.FULL_STATE_DICT, *complete):
                weights = {clean(name): value.clone() for name, value in self.module.state_dict().items()}
                return {"weights": weights, "optimizer": FSDP.optim_state_dict(self.module, self.optimizer)}
        weights = {clean(name): whole(value) for name, value in self.module.state_dict().items()}
        state = self.optimizer.state_dict()
        state["state"] = {i: {k: whole(v) for k, v in of.items()} for i, of in state["state"].items()}
        return {"weights": weights, "optimizer": state}

    def save(self, way: str, folder: str) -> None:
        """Leave a checkpoint in a folder."""
        if way == "sharded":
            for parameter in self.named().values():
                parameter.requires_grad_(True)  # else torch leaves out its state
            model, optimizer = get_state_dict(self.module, self.optimizer)
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
            return
        state = self.full_state()
        if self.rank == 0:
            os.makedirs(folder, exist_ok=True)
            torch.save(state, os.path.join(folder, "full.pt"))

    # ------------------------------------------------------------------ events

    def live_through(self, event: Event) -> None:
        """All but resume, which ends this part of the walk."""
        getattr(self, f"_{event.kind}")(event)

    def _step(self, event: Event) -> None:
        args = event.args
        data = self.rank // 2 if self.place.layout == "fsdp2+tp" else 0 if self.place.layout == "tp" else self.rank

        def backward() -> Tensor:
            for micro in range(args["micro"]):
                loss = self.module(gradients(self.walk, event, micro, data, self.like))
                loss.backward()
            return loss

        self.optimizer.zero_grad()
        holed, poisoned = (args[key][0] % self.place.world == self.rank for key in ("hole", "poison"))
        dropped = args["missing"] or (self.place.layout == "fsdp1" and self.still != self.unknown)
        if args["closure"] and not (dropped or args["hole"][1] or args["poison"][1] or args["clip"]):
            self.optimizer.step(backward)
            return
        backward()
        for name, parameter in self.named().items():
            still = self.walk.layer_of(name) in self.still
            if still or name in args["missing"] or (holed and name in args["hole"][1]):
                parameter.grad = None
            elif poisoned and name in args["poison"][1] and parameter.grad is not None:
                local(parameter.grad)[..., -1:].fill_(args["poison"][2])
        if args["clip"]:
            clip_gradients(self.module, max_norm=args["clip"])
        self.optimizer.step()

    def _schedule(self, event: Event) -> None:
        for group in self.optimizer.param_groups:
            group[event.args["key"]] *= event.args["factor"]

    def _reload(self, event: Event) -> None:
        if isinstance(self.module, FSDP):
            state = self.full_state()["optimizer"]
        elif self.place.layout in PLAIN:
            buffer = io.BytesIO()
            torch.save(self.optimizer.state_dict(), buffer)
            buffer.seek(0)
            state = torch.load(buffer, weights_only=True)
        else:
            state = copy.deepcopy(self.optimizer.state_dict())
        self.optimizer = self.build(self.walk.standing(event.number).added)
        self.optimizer.load_state_dict(state)

    def _evaluate(self, event: Event) -> None:
        with torch.no_grad():
            self.module({name: torch.ones_like(like) for name, like in self.like.items()})

    def _deepcopy(self, event: Event) -> None:
        self.inner, self.optimizer = copy.deepcopy((self.inner, self.optimizer))
        self.wrap()

    def _cast(self, event: Event) -> None:
        restructure(self.inner, event)
        self.like = {name: torch.empty_like(p) for name, p in self.inner.named_parameters()}
        self.wrap()

    _channels_last = _cast

    def _freeze(self, event: Event) -> None:
        before, after = (self.walk.standing(number) for number in (event.number, event.number + 1))
        self.still, self.unknown = after.still, after.unknown
        if before.still == after.still:
            return
        for unit in (units := [unit for unit in self.module.modules() if isinstance(unit, FSDPModule)]):
            unit.unshard()  # what a forward pass uses has flags of its own
        self.set_flags(self.module)
        for unit in units:
            unit.reshard()
        named = self.named()
        self.set_flags(self.module)
        if self.place.layout == "ddp":
            self.wrap()
        for layer in after.added[len(before.added) :]:
            of_layer = [p for name, p in named.items() if self.walk.layer_of(name) == layer]
            self.optimizer.add_param_group({"params": of_layer})

    _unfreeze = _freeze

    def _spoil(self, event: Event) -> None:
        """For the tests of the walks themselves: one number of a replica, or of a shard, is a little off."""
        if self.rank == 0:
            with torch.no_grad():
                local(self.named()["l0.layer.weight"])[0, 0] *= 1 + 1e-6

    # ------------------------------------------------------------------ what is seen

    def see(self) -> Seen:
        """What this rank holds."""
        weights, state, hyper = {}, {}, {}
        named = self.named()
        numbers = {p: (k, g) for k, g in enumerate(self.optimizer.param_groups) for p in g["params"]}
        for name, parameter in named.items():
            weights[name] = self._part(parameter)
            if parameter in numbers:
                number, group = numbers[parameter]
                hyper[name] = number, float(group["lr"]), float(group["weight_decay"])
                state[name] = {
                    key: self._part(value) if self._is_like(key) else Part(tuple(value.shape), None, value.clone())
                    for key, value in self.optimizer.state[parameter].items()
                }
        return Seen(weights, state, hyper, self.optimizer.skipped_steps())

    def _is_like(self, key: str) -> bool:
        kinds = RULES[self.walk.optimizer].state
        return key in ("momentum_buffer", "exp_avg", "exp_avg_sq") or kinds.get(key) == "element"

    def _part(self, tensor: Tensor) -> Part:
        tensor = tensor.detach()
        if isinstance(self.module, FSDP):
            return Part(None, None, tensor.clone())
        if isinstance(tensor, DTensor):
            shape, mesh, placements = tuple(tensor.shape), tensor.device_mesh, tensor.placements
            _, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
            return Part(shape, tuple(offset), tensor.to_local().clone())
        return Part(tuple(tensor.shape), (0,) * tensor.dim(), tensor.clone(memory_format=torch.contiguous_format))


def take_part(walk: Walk, first: int, numbers: list[int], loaded: str | None, saved: str) -> Answer:
    """Live through the events of these numbers; the last may be a resume, before which a checkpoint is left."""
    answer = Answer()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            member = Member(walk, first, loaded)
            answer.seen.append(member.see())
            for event in walk.only(numbers).events:
                if event.kind == "resume":
                    member.save(event.args["way"], saved)
                else:
                    member.live_through(event)
                    answer.seen.append(member.see())
    except Exception:
        answer.error = traceback.format_exc()
    return answer
