"""Scorers: what turns candidates into rewards."""

from bon.scorers.base import Board, Item, Scored, Scorer
from bon.scorers.flip import Flip
from bon.scorers.likelihood import BackwardLikelihood

__all__ = ["BackwardLikelihood", "Board", "Flip", "Item", "Scored", "Scorer"]
