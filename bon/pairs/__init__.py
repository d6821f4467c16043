"""Pairs of an instruction and a good answer, for training a scorer that reads backwards.

It makes the file that such a training reads; it trains nothing.
"""
