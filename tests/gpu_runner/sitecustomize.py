"""Lets vLLM's CPU build run the model runner that it uses on a GPU, its kernels interpreted by Triton.

    export PYTHONPATH=$PWD/tests/gpu_runner TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1
    pytest -m vllm tests/test_engine_contract.py

That runner differs in what bon depends on: seeds, prompt log-probabilities, the cache, aborts. vLLM's CPU build turns
Triton off where it has no backend for CPUs; the interpreter needs none, so one is made up here. Python imports this
module by its name, in vLLM's own processes as well.
"""

import os
from types import SimpleNamespace
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends
    from triton.runtime.interpreter import InterpreterBuilder

    backends.setdefault("cpu", SimpleNamespace(driver=None))

    store = InterpreterBuilder.create_masked_store

    def store_where(self: Any, pointers: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
        """A compiled kernel takes integers for a mask (structured output has such ones); the interpreter does not."""
        mask.data = mask.data.astype(bool)
        return store(self, pointers, value, mask, cache_policy)

    InterpreterBuilder.create_masked_store = store_where
