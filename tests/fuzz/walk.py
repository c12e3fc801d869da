"""What a walk is: a model, an optimizer, a layout and a row of events, all drawn from one seed; and its gradients."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_namo.testing.layouts import Experts
from tests.helpers.rules import RULES
from tests.helpers.worker import clean

WORLDS = {  # layout -> how many ranks it takes
    "single": (1,),
    "ddp": (2, 3, 4),
    "fsdp1": (2, 3, 4),
    "fsdp2": (1, 2, 3, 4),
    "fsdp2-shard1": (2, 3, 4),
    "hsdp": (2, 4),
    "tp": (2, 3, 4),
    "fsdp2+tp": (2, 4),
}
PLAIN = ("single", "ddp")  # every rank holds plain, whole parameters
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
MATRIX_LAYERS = ("linear", "conv1d", "conv2d", "deconv", "experts", "turned")
VOCABULARY = 60  # as wide as no linear layer: that would be a head


@dataclass(frozen=True)
class Layer:
    """One layer of a model: ``shape`` is what its class takes, ``cut`` how tensor parallelism cuts its weight."""

    kind: str
    shape: tuple[int, ...]
    bias: bool
    dtype: str
    frozen: bool
    blocks: int | tuple[int, ...] = 1
    memory: str = "contiguous"
    cut: str = "no"

    def build(self) -> nn.Module:
        """The layer with PyTorch's own initial values."""
        make: Any = {
            "linear": nn.Linear,
            "conv1d": nn.Conv1d,
            "conv2d": nn.Conv2d,
            "deconv": nn.ConvTranspose1d,
            "embedding": nn.Embedding,
            "norm": nn.LayerNorm,
            "tied": Tied,
            "bare": Bare,
            "experts": Experts,
            "turned": partial(Experts, is_transposed=True),
        }[self.kind]
        keys = {"bias": self.bias} if self.kind in ("linear", "conv1d", "conv2d", "deconv") else {}
        layer = make(*self.shape, **keys).to(DTYPES[self.dtype])
        for name, parameter in list(layer.named_parameters()):
            parameter.requires_grad_(not self.frozen)
            if self.memory != "contiguous" and name == "weight" and self.kind != "tied":
                layer.register_parameter(
                    name, nn.Parameter(in_memory(parameter.detach(), self.memory), requires_grad=not self.frozen)
                )
        return layer


def in_memory(tensor: Tensor, how: str) -> Tensor:
    """The same numbers with other strides."""
    if how == "transposed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    part = wide[..., ::2] if how == "every second" else wide[..., : tensor.shape[-1]]
    return part.copy_(tensor)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(columns, rows), nn.Linear(columns, rows, bias=False)
        self.second.weight = self.first.weight


class Bare(nn.Module):
    """A number (of one dimension, as FSDP wants it), a vector and a class token, which are no matrices."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.gain = nn.Parameter(torch.tensor([0.7])), nn.Parameter(torch.linspace(-1, 1, size))
        self.token = nn.Parameter(torch.linspace(0.5, 2, size).view(1, 1, size))


class Model(nn.Module):
    """The layers of a walk; the derivative of its output by each parameter is what was put in."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(f"l{index}", Prescribed(layer.build()))

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        parts = [
            child({n.removeprefix(f"{name}.layer."): g for n, g in grads.items() if n.startswith(f"{name}.")})
            for name, child in self.named_children()
        ]
        return sum(parts, torch.zeros(()))


class Prescribed(nn.Module):
    """Holds a layer; a unit that FSDP may shard by itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for name, parameter in self.layer.named_parameters():
            grad = grads[clean(name)]
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                grad = distribute_tensor(grad, mesh, placements, src_data_rank=None).to_local()
                parameter = parameter.to_local()
            total = total + (parameter * grad).sum()
        return total


@dataclass(frozen=True)
class Event:
    """``number`` stays what it was when others are cut, so that the gradients do, too."""

    number: int
    kind: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A layout and how many ranks, with what FSDP and DDP leave to choose."""

    layout: str
    world: int
    choice: int = 0

    @property
    def data_parallel(self) -> int:
        """How many ranks' gradients are averaged."""
        if self.layout in ("single", "tp"):
            return 1
        return self.world // 2 if self.layout == "fsdp2+tp" else self.world


@dataclass(frozen=True)
class Standing:
    """Where a walk is; layers that were unfrozen, in that order; that get no gradient now; that the optimizer lacks."""

    place: Place
    added: list[int]
    still: set[int]
    unknown: set[int]


@dataclass(frozen=True)
class Walk:
    """All that happens; equal on every machine."""

    seed: int
    layers: tuple[Layer, ...]
    optimizer: str
    hyper: dict[str, Any]
    bucket_bytes: int | None
    place: Place
    events: tuple[Event, ...]
    batched: bool | None = None  # True: the accelerators' path

    def only(self, numbers: Sequence[int]) -> Walk:
        """The walk without the other events."""
        return replace(self, events=tuple(event for event in self.events if event.number in numbers))

    def model(self, until: int = 0, plain: bool = True) -> Model:
        """The model as it was before the event of that number: what casts and, in plain layouts, strides made of it."""
        torch.manual_seed(self.seed)
        model = Model(self.layers if plain else [replace(layer, memory="contiguous") for layer in self.layers])
        for event in self.events:
            if event.number < until and (plain or event.kind == "cast"):
                restructure(model, event)
        return model

    def standing(self, until: int) -> Standing:
        """What events before that number left."""
        place, added, stopped = self.place, list[int](), set[int]()
        for event in self.events:
            if event.number >= until:
                break
            layer = event.args.get("layer")
            if event.kind == "resume":
                place = event.args["to"]
            elif event.kind == "freeze" and layer and (not self.layers[layer].frozen or layer in added):
                stopped.add(layer)
            elif event.kind == "unfreeze" and layer in stopped:
                stopped.remove(layer)
            elif event.kind == "unfreeze" and place.layout != "fsdp1":  # whose flat parameters stay what they were
                added += [layer] if self.layers[layer].frozen and layer not in added else []
        frozen = {i for i, layer in enumerate(self.layers) if layer.frozen and i not in added}
        return Standing(place, added, frozen | stopped, frozen)

    def layer_of(self, name: str) -> int:
        """The number of a parameter's layer."""
        return int(name.removeprefix("l").split(".")[0])

    def is_matrix(self, name: str) -> bool:
        """Whether a parameter is to be orthogonalized."""
        kind = self.layers[self.layer_of(name)].kind
        return name.endswith("weight") and kind in (*MATRIX_LAYERS, "tied")

    def blocks(self) -> dict[str, int | list[int]]:
        """The ``blocks`` argument of the optimizer's."""
        return {
            f"l{i}.layer.weight": layer.blocks if isinstance(layer.blocks, int) else list(layer.blocks)
            for i, layer in enumerate(self.layers)
            if layer.blocks != 1
        }


def restructure(model: nn.Module, event: Event) -> None:
    """What an event does to a plain model's dtypes and memory."""
    if event.kind == "cast":
        model.to(DTYPES[event.args["dtype"]])
    elif event.kind == "channels_last":
        model.to(memory_format=torch.channels_last)


def gradients(walk: Walk, event: Event, micro: int, data: int, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole gradients of a micro-batch on a data-parallel rank, rounded to the dtypes of like-shaped tensors."""
    args, found = event.args, {}
    for name, like in shapes.items():
        seed = zlib.crc32(f"{walk.seed} {event.number} {micro} {data} {name}".encode())
        grad = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        grad = (grad * args["scale"]).to(like.dtype)
        if grad.dim() and (form := args["zero"].get(name)):
            {"row": grad[0], "column": grad[..., 0], "all": grad}[form].zero_()
        if grad.dim() and name in args["huge"]:
            grad[-1] *= 1e12 if args["huge"][name] == "large" else 1e200 if like.dtype == torch.float64 else 1e28
        found[name] = grad
    return found


# ---------------------------------------------------------------------- drawing


def draw(seed: int, short: bool = False) -> Walk:
    """The walk of a seed; a short one has about six events."""
    rng = random.Random(seed)
    place = draw_place(rng)
    even = place.layout == "fsdp2-shard1"
    main = rng.choices(["float64", "float32", "bfloat16"], [7, 3, 1])[0]
    mixed = rng.random() < 0.2
    layers = [replace(draw_layer(rng, even, main, place.layout, "linear"), frozen=False)]  # one matrix to train
    for _ in range(rng.randint(1, 5)):
        dtype = rng.choice(["float64", "float32", "bfloat16"]) if mixed and rng.random() < 0.5 else main
        alike = replace(rng.choice(layers), frozen=rng.random() < 0.15)  # matrices of one shape are worked on together
        layers.append(alike if rng.random() < 0.35 else draw_layer(rng, even, dtype, place.layout))
    optimizer = rng.choice([name for name in RULES if name != "TwoRounds"])  # for which there is no oracle
    hyper = draw_hyper(rng, optimizer)
    events: list[Event] = []
    walk = Walk(seed, tuple(layers), optimizer, hyper, rng.choice([None, 500, 4000]), place, ())
    names = [name for name, _ in walk.model().named_parameters()]
    matrices = [name for name in names if walk.is_matrix(name)]
    for number in range(rng.randint(4, 7) if short else rng.randint(5, 25)):
        kinds = {"step": 12, "schedule": 2, "reload": 1, "resume": 1, "evaluate": 0.5, "unfreeze": 2, "freeze": 0.7}
        if place.layout in PLAIN:
            kinds |= {"deepcopy": 1, "channels_last": 0.5, "cast": 0.5}
        kind = rng.choices(list(kinds), list(kinds.values()))[0] if number else "step"
        event = Event(number, kind, draw_args(rng, kind, place, even, names, matrices, hyper))
        if kind == "resume":
            place = event.args["to"]
        events.append(event)
    return replace(walk, events=tuple(events), batched=True if seed % 2 else None)


def draw_place(rng: random.Random, even: bool | None = None) -> Place:
    """A place; ``even`` says whether the shapes suit all layouts."""
    layouts = [name for name in WORLDS if name != "fsdp2-shard1" or even is not False]
    layout = rng.choice(layouts)
    weights = [3 if world == 2 else 1 for world in WORLDS[layout]]
    return Place(layout, rng.choices(WORLDS[layout], weights)[0], rng.randrange(8))


def draw_layer(rng: random.Random, even: bool, dtype: str, layout: str, kind: str | None = None) -> Layer:
    """A layer; an even one divides by 2, 3 and 4 in its first two dimensions."""

    def size(low: int, high: int) -> int:
        return rng.choice([12, 24, 36]) if even else rng.randint(low, high)

    kind = kind or rng.choices([*MATRIX_LAYERS, "embedding", "norm", "tied", "bare"], [6, 1, 2, 2, 2, 2, 1, 1, 1, 1])[0]
    shape: tuple[int, ...] = {
        "linear": (size(1, 24), size(1, 24)),
        "conv1d": (size(1, 5), size(1, 7), rng.randint(1, 3)),
        "conv2d": (size(1, 4), size(1, 6), rng.randint(1, 3)),
        "deconv": (size(1, 5), size(1, 7), rng.randint(1, 3)),
        "experts": (size(1, 6), size(2, 7), rng.randint(2, 7)),
        "turned": (size(1, 6), size(2, 7), rng.randint(2, 7)),
        "embedding": (VOCABULARY if even else rng.choice([VOCABULARY, 59]), size(2, 9)),
        "norm": (size(1, 9),),
        "tied": (size(2, 9), size(2, 9)),
        "bare": (size(2, 9),),
    }[kind]
    blocks: int | tuple[int, ...] = 1
    rows = shape[2] if kind == "turned" else shape[1] if len(shape) > 1 else 1
    if kind in ("linear", "conv1d", "conv2d", "experts", "turned") and rows > 2 and rng.random() < 0.3:
        blocks = rng.choice([k for k in (2, 3, rows) if rows % k == 0] or [1])
        if blocks == 1 or rng.random() < 0.4:
            first = rng.randint(1, rows - 1)
            blocks = (first, rows - first)
    memory = "contiguous"
    if layout in PLAIN and kind in ("linear", "conv1d", "conv2d", "deconv", "embedding") and rng.random() < 0.3:
        memory = rng.choice(["transposed", "gap", "every second"])
    return Layer(
        kind,
        shape,
        rng.random() < 0.6,
        dtype,
        frozen=rng.random() < 0.15,
        blocks=blocks,
        memory=memory,
        cut=rng.choice(["no", "rows", "columns"]),
    )


def draw_hyper(rng: random.Random, optimizer: str) -> dict[str, Any]:
    """Hyper-parameters anywhere in their ranges, with the exact polar factor; fixed ones that a class does not take."""
    momentum = rng.choice([0.0, 0.3, 0.8, 0.95])
    hyper: dict[str, Any] = {
        "lr": 10 ** rng.uniform(-2.5, -0.5),
        "weight_decay": rng.choice([0.0, 0.1, 1.5, 8.0]),
        "momentum": momentum,
        "nesterov": rng.random() < 0.5,
        "orthogonalizer": "svd",
        "shape_scale": rng.choice([None, 0.2, 1.3]),
        "adamw_lr": rng.choice([None, 0.01]),
        "adamw_betas": rng.choice([(0.9, 0.95), (0.0, 0.9), (0.8, 0.99)]),
        "adamw_eps": rng.choice([1e-8, 1e-3]),
        "adamw_weight_decay": rng.choice([0.0, 0.1]),
        "momentum_dtype": rng.choice([None, None, None, "float32", "bfloat16"]),
    }
    if optimizer in ("NAMO", "NAMOD"):
        beta2 = rng.choice([b for b in (0.5, 0.95, 0.99) if b > momentum**2])
        hyper |= {"beta2": beta2, "eps": rng.choice([1e-8, 1e-3, 1e-12]), "decay": rng.choice(["adaptive", "lr"])}
        hyper |= {"max_step": rng.choice([None, 1.0, 0.05])}
    if optimizer == "NAMOD":
        hyper |= {"clamp": rng.choice([None, 0.1, 0.5, 1.0])}
    if optimizer in ("AdaMuon", "NorMuon"):
        hyper |= {"beta2": rng.choice([0.0, 0.5, 0.95]), "eps": rng.choice([1e-8, 1e-3])}
    if optimizer in ("NorMuon", "MuonH"):
        hyper |= {"nesterov": True}
    if optimizer == "MuonH":
        hyper |= {"weight_decay": 0.0, "eps": rng.choice([1e-8, 1e-3])}
    return hyper


def draw_args(
    rng: random.Random,
    kind: str,
    place: Place,
    even: bool,
    names: list[str],
    matrices: list[str],
    hyper: dict[str, Any],
) -> dict[str, Any]:
    """What an event of a kind does."""

    def some(chance: float) -> list[str]:
        if rng.random() >= chance:
            return []
        return rng.sample(names, rng.randint(1, min(3, len(names)))) if rng.random() < 0.8 else list(names)

    if kind == "schedule":
        return {"key": rng.choice(["lr", "lr", "lr", "weight_decay"]), "factor": rng.choice([0.0, 0.5, 1.7])}
    if kind == "resume":
        to = draw_place(rng, even)
        sharded = not {place.layout, to.layout} & {*PLAIN, "fsdp1"} and rng.random() < 0.5
        return {"to": to, "way": "sharded" if sharded else "full"}
    if kind == "cast":
        return {"dtype": rng.choice(["float64", "float32"])}
    if kind in ("freeze", "unfreeze"):
        return {"layer": int(rng.choice(names)[1:].split(".")[0])}
    if kind != "step":
        return {}
    hole, poison = some(0.12), some(0.12)
    clip = rng.random() < 0.2
    huge = {name: rng.choice(["large", "overflow"]) if name in matrices else "large" for name in some(0.08)}
    return {
        "micro": rng.choice([1, 1, 1, 2, 3]),
        "scale": 10 ** rng.uniform(-3, 2),
        "zero": {name: rng.choice(["row", "column", "all"]) for name in some(0.2)},
        "huge": huge,
        "missing": some(0.15),
        "hole": (rng.randrange(4), hole if not clip else []),
        "poison": (rng.randrange(4), poison, math.nan if clip else rng.choice([math.nan, math.inf, -math.inf])),
        "clip": 10 ** rng.uniform(-2, 2) if clip else None,
        "closure": rng.random() < 0.2,
    }
