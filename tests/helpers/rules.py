"""The rules that tests try: the built-in ones, those of the examples, and one that asks for everything."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon
from lightning_namo.optim import OrthogonalizedOptimizer
from tests.helpers.paths import ROOT
from tests.helpers.two_rounds import TwoRounds

if (folder := str(ROOT / "examples")) not in sys.path:
    sys.path.append(folder)

from hyperball import MuonH
from own_rule import NorMuon

BUILT_IN: list[type[OrthogonalizedOptimizer]] = [NAMO, NAMOD, Muon, AdaMuon]
RULES: dict[str, type[OrthogonalizedOptimizer]] = {cls.__name__: cls for cls in (*BUILT_IN, NorMuon, MuonH, TwoRounds)}


def taken(cls: type, hyper: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among some that a class takes."""
    return {key: value for key, value in hyper.items() if key in inspect.signature(cls).parameters}
