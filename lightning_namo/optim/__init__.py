"""The optimizers: rules, the engine that answers them, parameter groups and AdamW. Imports no Lightning."""

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.muon import AdaMuon, Muon
from lightning_namo.optim.namo import NAMO, NAMOD
from lightning_namo.optim.rule import Polar, Sum
from lightning_namo.optim.schedules import WarmupStableDecay

__all__ = ["NAMO", "NAMOD", "AdaMuon", "Muon", "OrthogonalizedOptimizer", "Polar", "Sum", "WarmupStableDecay"]
