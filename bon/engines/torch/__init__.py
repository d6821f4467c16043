"""Models in this process through transformers, with shared prefixes."""
