"""The optimizers: their formulas, the step, parameter groups and AdamW. Imports no Lightning."""

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.muon import AdaMuon, Muon
from lightning_namo.optim.namo import NAMO, NAMOD
from lightning_namo.optim.schedules import WarmupStableDecay

__all__ = ["NAMO", "NAMOD", "AdaMuon", "Muon", "OrthogonalizedOptimizer", "WarmupStableDecay"]
