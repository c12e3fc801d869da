"""Gradient clipping in Lightning's Trainer: a callback, and a mixin for ``Trainer(gradient_clip_val=...)``."""

from __future__ import annotations

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_namo.integration.clipping import _check_bounds, _check_positive, clip_gradients
from lightning_namo.integration.configure import wrapped


class GradientClipping(pl.Callback):
    """Clips the gradients by norm or by value, under every strategy, and logs ``grad_norm``, their norm before that.

    For modules that cannot be edited, from YAML, and with manual optimization; `ClipsGradients` does the same for
    ``Trainer(gradient_clip_val=...)``. It clips before every optimizer step, after gradient accumulation and
    unscaling, what that optimizer trains.

    Args:
        max_norm: Gradients of a larger norm are scaled down to it; ``float("inf")`` only measures.
        clip_value: Elements are clipped to [-clip_value, clip_value]; ``float("inf")`` only measures.

    Raises:
        ValueError: Unless exactly one of the two is given, and above zero; at the start of fit, if the Trainer clips,
            too.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GradientClipping(max_norm=1.0)], logger=False)
    """

    def __init__(self, max_norm: float | None = None, clip_value: float | None = None) -> None:
        super().__init__()
        _check_bounds("GradientClipping", max_norm=max_norm, clip_value=clip_value)
        self.bounds = {"max_norm": max_norm, "clip_value": clip_value}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to clip twice."""
        if stage == "fit" and trainer.gradient_clip_val:
            raise ValueError(
                "Expected gradients to be clipped once, but there are both the callback GradientClipping and "
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}). Remove one of the two."
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip and log."""
        _clip_and_log(pl_module, optimizer, **self.bounds)


class ClipsGradients(pl.LightningModule):
    """Mixin: ``Trainer(gradient_clip_val=..., gradient_clip_algorithm=...)`` works under every strategy.

    By norm (the default) or by value, what the optimizer at hand trains; it logs ``grad_norm``, the norm before
    clipping. Without ``gradient_clip_val`` it does nothing.

    Raises:
        ValueError: At the first step, if ``gradient_clip_val`` is negative.

    Example:
        >>> class LitModel(ClipsGradients, pl.LightningModule):
        ...     pass
        >>> trainer = pl.Trainer(gradient_clip_val=1.0, logger=False)
    """

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer was told, and log."""
        if not gradient_clip_val:
            return
        _check_positive("Trainer", "gradient_clip_val", gradient_clip_val)
        bound = "clip_value" if gradient_clip_algorithm == "value" else "max_norm"
        _clip_and_log(self, optimizer, **{bound: gradient_clip_val})


def _clip_and_log(module: pl.LightningModule, optimizer: Optimizer, **bounds: float | None) -> None:
    """Clip what an optimizer of the module trains."""
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise RuntimeError(
            f"Expected unscaled gradients to clip, but {type(optimizer).__name__} unscales them itself, later. Set "
            "fused=False, or use bf16-mixed precision."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    module.log("grad_norm", clip_gradients(wrapped(module), parameters=parameters, **bounds))
