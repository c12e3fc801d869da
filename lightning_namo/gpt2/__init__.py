"""GPT-2 for the recipes: model, LightningModule and data."""

from types import ModuleType
from typing import TYPE_CHECKING

from lightning_namo import _moved

if not TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        return _moved.find(__name__, name)
