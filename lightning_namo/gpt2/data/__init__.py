"""Text as token files, and token files as batches."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_namo.gpt2.data.module import TextDataModule

__all__ = ["TextDataModule"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`TextDataModule`, at its first use: processes that only encode text need no Lightning."""
        if name == "TextDataModule":
            from lightning_namo.gpt2.data.module import TextDataModule

            return TextDataModule
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
