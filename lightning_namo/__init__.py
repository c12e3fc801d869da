"""NAMO and NAMO-D for PyTorch Lightning and Fabric (arXiv 2602.17080)."""

__version__ = "0.1.0"
