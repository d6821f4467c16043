"""A model that rates candidates, or compares them with each other."""

from bon.scorers.judge.scorer import Judge

__all__ = ["Judge"]
