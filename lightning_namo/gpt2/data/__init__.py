"""Text as token files, and token files as batches."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_namo.gpt2.data.module import TextDataModule

__all__ = ["TextDataModule"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What `module` has, at its first use: processes that only encode text need no Lightning."""
        if name in ("TextDataModule", "accumulation", "data_parallel"):
            from lightning_namo.gpt2.data import module

            return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
