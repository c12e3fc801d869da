"""NAMO and NAMO-D for PyTorch Lightning and Fabric (arXiv 2602.17080)."""

from lightning_namo.callbacks import OptimizerCallback, SaveOnSigterm
from lightning_namo.clipping import ClipsGradients, GradientClipping, clip_gradients, gradient_norm
from lightning_namo.factory import build_optimizer, optimize_with
from lightning_namo.optimizers import NAMO, NAMOD, AdaMuon, Muon
from lightning_namo.orthogonalize import orthogonalize
from lightning_namo.param_groups import split_parameters
from lightning_namo.schedules import WarmupStableDecay

__version__ = "0.1.0"
__all__ = [
    "NAMO",
    "NAMOD",
    "AdaMuon",
    "ClipsGradients",
    "GradientClipping",
    "Muon",
    "OptimizerCallback",
    "SaveOnSigterm",
    "WarmupStableDecay",
    "build_optimizer",
    "clip_gradients",
    "gradient_norm",
    "optimize_with",
    "orthogonalize",
    "split_parameters",
]
