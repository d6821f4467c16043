"""FLIP: the reward is how well the instruction can be inferred back from the response."""

from bon.scorers.flip.reconstruction import FlipDetails as FlipDetails
from bon.scorers.flip.scorer import Flip as Flip
