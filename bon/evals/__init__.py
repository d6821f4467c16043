"""Measured quality: datasets with verifiers, and the harness that compares scorers on them."""
