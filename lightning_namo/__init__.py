"""NAMO and NAMO-D for PyTorch Lightning and Fabric (arXiv 2602.17080).

What needs Lightning or torchmetrics is imported when it is first used: plain PyTorch imports torch only.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_namo import _moved
from lightning_namo.integration.build import build_optimizer
from lightning_namo.integration.clipping import clip_gradients, gradient_norm
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.muon import AdaMuon, Muon
from lightning_namo.optim.namo import NAMO, NAMOD
from lightning_namo.optim.schedules import WarmupStableDecay
from lightning_namo.polar.orthogonalize import orthogonalize
from lightning_namo.routing.split import split_parameters

if TYPE_CHECKING:
    from lightning_namo.integration.configure import optimize_with
    from lightning_namo.integration.lightning_clipping import ClipsGradients, GradientClipping
    from lightning_namo.integration.optimizer_callback import OptimizerCallback
    from lightning_namo.integration.preemption import SaveOnSigterm
    from lightning_namo.telemetry.noise_metric import GradientNoiseScale
    from lightning_namo.telemetry.reading_log import ReadingLog
    from lightning_namo.telemetry.spectral_monitor import SpectralMonitor

__version__ = "0.1.0"
__all__ = [
    "NAMO",
    "NAMOD",
    "AdaMuon",
    "ClipsGradients",
    "GradientClipping",
    "GradientNoiseScale",
    "Muon",
    "OptimizerCallback",
    "OrthogonalizedOptimizer",
    "ReadingLog",
    "SaveOnSigterm",
    "SpectralMonitor",
    "WarmupStableDecay",
    "build_optimizer",
    "clip_gradients",
    "gradient_norm",
    "optimize_with",
    "orthogonalize",
    "split_parameters",
]

_LATE = {
    "ClipsGradients": "integration.lightning_clipping",
    "GradientClipping": "integration.lightning_clipping",
    "GradientNoiseScale": "telemetry.noise_metric",
    "OptimizerCallback": "integration.optimizer_callback",
    "ReadingLog": "telemetry.reading_log",
    "SaveOnSigterm": "integration.preemption",
    "SpectralMonitor": "telemetry.spectral_monitor",
    "optimize_with": "integration.configure",
}
"""Public names, and where they are."""

_moved.install()


if not TYPE_CHECKING:  # a type checker is to see a misspelt name

    def __getattr__(name: str) -> Any:
        if name in _LATE:
            module = importlib.import_module(f"lightning_namo.{_LATE[name]}")
            return globals().setdefault(name, getattr(module, name))
        return _moved.find(__name__, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
