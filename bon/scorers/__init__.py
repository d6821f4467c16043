"""Scorers: what turns candidates into rewards."""
