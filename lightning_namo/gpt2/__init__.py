"""GPT-2 for the recipes: model, LightningModule and data."""

from types import ModuleType

from lightning_namo import _moved


def __getattr__(name: str) -> ModuleType:
    return _moved.find(__name__, name)
