"""Models in this process on vLLM."""
