"""Best-of-N reranking by backward inference."""

__version__ = "0.1.0"
