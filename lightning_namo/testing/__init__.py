"""For the tests of rules of one's own."""

from lightning_namo.testing.check_rule import check_rule

__all__ = ["check_rule"]
