"""Rows in, rows out: files of prompts and of candidates."""
