"""Evaluations: does the reward pick better answers than chance, length or greedy decoding?"""
