"""NAMO and NAMO-D for PyTorch Lightning and Fabric (arXiv 2602.17080)."""

from lightning_namo.optimizers import NAMO, NAMOD, AdaMuon, Muon
from lightning_namo.orthogonalize import orthogonalize
from lightning_namo.param_groups import split_parameters

__version__ = "0.1.0"
__all__ = ["NAMO", "NAMOD", "AdaMuon", "Muon", "orthogonalize", "split_parameters"]
