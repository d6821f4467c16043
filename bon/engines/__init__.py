"""Engines: language models behind one contract."""
