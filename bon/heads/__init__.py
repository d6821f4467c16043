"""Reward heads: what a few labelled candidates teach about a model's hidden states.

``data`` is what they learn from, ``probe`` and ``bnrm`` are the two kinds, ``training`` fits one and says whether it
pays, ``file`` keeps it. ``bon.scorers.head`` scores with it.
"""
