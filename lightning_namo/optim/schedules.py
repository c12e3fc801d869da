"""The learning-rate schedule of the recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a stable stretch, then a linear or cosine decay to a floor: a recipe for a torch scheduler.

    It multiplies the learning rate of every parameter group alike. Lengths are steps of the optimizer where they are
    whole numbers (2000), and shares of the run where they are fractions (0.1).

    Args:
        warmup: Length of the warm-up; the first step already has ``1 / warmup`` of the learning rate.
        decay: Length of the decay at the end of the run; 0: none, and the run's length is not needed.
        total_steps: Length of the run in optimizer steps; None: the trainer's.
        shape: Of the decay.
        floor: Multiplier at the last step, in [0, 1].

    Raises:
        ValueError: For lengths or a floor out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = WarmupStableDecay(warmup=2, decay=0.5, total_steps=10)(optimizer)
        >>> scheduler.get_last_lr()
        [0.5]

    References:
        The official NAMO recipe (2k steps of warm-up, decay over the last share to 0.1), arXiv 2602.17080.
    """

    warmup: int | float = 0
    decay: int | float = 0
    total_steps: int | None = None
    shape: Literal["linear", "cosine"] = "linear"
    floor: float = 0.1

    def __post_init__(self) -> None:
        for key, length in (("warmup", self.warmup), ("decay", self.decay)):
            if not length >= 0 or (isinstance(length, float) and length > 1):
                raise ValueError(f"Expected {key} to be steps (a whole number) or a share in [0, 1] but got {length}.")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"Expected floor to be in [0, 1] but got {self.floor}.")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"Expected total_steps to be at least 1 but got {self.total_steps}.")
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"Expected shape to be 'linear' or 'cosine' but got {self.shape!r}.")

    @property
    def needs_total_steps(self) -> bool:
        """Whether the run's length must be known and is not given."""
        relative = isinstance(self.warmup, float) and self.warmup > 0
        return self.total_steps is None and (bool(self.decay) or relative)

    def __call__(self, optimizer: Optimizer, total_steps: int | None = None) -> LambdaLR:
        """A torch scheduler to be stepped once after each optimizer step.

        Args:
            optimizer: Whose groups to drive.
            total_steps: The run's length, used where this schedule has none of its own.

        Raises:
            ValueError: If the run's length is needed and unknown, or shorter than warm-up and decay together.
        """
        total = self.total_steps or total_steps
        if total is None and self.needs_total_steps:
            raise ValueError("Expected total_steps, since warm-up or decay are shares of the run. Pass total_steps=...")
        warmup, decay = (_steps(length, total) for length in (self.warmup, self.decay))
        if isinstance(self.warmup, float) and isinstance(self.decay, float) and round(self.warmup + self.decay, 9) <= 1:
            decay = min(decay, (total or 0) - warmup)  # both may have been rounded up
        if total is not None and warmup + decay > total:
            raise ValueError(f"Expected a run of at least warm-up {warmup} + decay {decay} steps but it has {total}.")
        decay_start = math.inf if total is None or not decay else total - decay

        def multiplier(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(max(step + 1 - decay_start, 0) / decay, 1) if decay else 0.0
            shaped = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
            return 1 - (1 - self.floor) * shaped

        return _EveryGroup(optimizer, multiplier)


class _EveryGroup(LambdaLR):
    """One multiplier for all groups, those that are added later too (BackboneFinetuning): torch's refuses them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; learning rates stay this run's where the optimizer took over another one's state."""
        if getattr(self.optimizer, "has_adopted", False):
            state_dict = {**state_dict, "base_lrs": self.base_lrs}
        super().load_state_dict(state_dict)

    def get_lr(self) -> list[float | Tensor]:
        multiplier = self.lr_lambdas[0]
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            before = multiplier(max(self.last_epoch - 1, 0))
            self.base_lrs.append(group["lr"] / before if before else group["lr"])
        self.lr_lambdas = [multiplier] * len(self.base_lrs)
        return super().get_lr()


def _steps(length: int | float, total: int | None) -> int:
    return round(length * (total or 0)) if isinstance(length, float) else length
