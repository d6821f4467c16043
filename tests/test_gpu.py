"""The torch engine on a CUDA device: the engine contract, transformers' own tokens, and memory given back.

Nothing here runs where there is no such device: `pytest -m gpu` on a machine that has one.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The tests of the contract themselves; the fixtures below put this device's engines in place of the others.
from test_engine_contract import *  # noqa: F403
from test_engine_contract import CONTEXT, PROMPTS, generate, prompt
from tiny import save
from transformers import AutoModelForCausalLM

from bon.engines.torch.engine import TorchEngine

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved: Path = save(tmp_path_factory.mktemp("model"), "Qwen3", "ascii")
    return saved


def on_device(folder: Path, **options: Any) -> TorchEngine:
    return TorchEngine(folder, **{"device": DEVICE, "dtype": "float32", "max_model_len": CONTEXT, **options})


@pytest.fixture(scope="module", params=[{}, {"share_prefix": False}, {"max_batch_tokens": 500}], ids=str)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[TorchEngine]:
    made = on_device(folder, **request.param)
    yield made
    asyncio.run(made.aclose())


@pytest.fixture
def writer(engine: TorchEngine) -> TorchEngine:
    return engine


def test_greedy_tokens_are_those_of_transformers(engine: TorchEngine, folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    prompts = [*PROMPTS, *(prompt("One and the same beginning, and then " + end) for end in ("red", "blue", "green"))]
    for asked, completion in zip(prompts, generate(engine, prompts, temperature=0.0, max_tokens=40), strict=True):
        ids = torch.tensor([engine.renderer.render(asked)], device=DEVICE)
        made = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=sorted(engine.renderer.end_ids),
            pad_token_id=0,
        )
        new = made[0, ids.shape[1] :].tolist()
        assert completion.completion_tokens == len(new)
        assert completion.text == engine.renderer.decode([i for i in new if i not in engine.renderer.end_ids])


def test_a_gpu_is_what_an_engine_takes_by_itself_and_bfloat16(folder: Path) -> None:
    made = TorchEngine(folder)
    assert (made._model.device.type, made._model.dtype) == ("cuda", torch.bfloat16)
    assert all(c.completion_tokens for c in generate(made, PROMPTS, n=3, seed=1))
    asyncio.run(made.aclose())


def test_closing_gives_the_memory_of_the_device_back(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    sizes = {"hidden_size": 1024, "intermediate_size": 4096}  # beside it what CUDA's libraries keep is small
    made = on_device(save(tmp_path, "Qwen3", "ascii", **sizes))
    weights = made._model.get_memory_footprint()
    generate(made, PROMPTS, n=4, seed=1)
    assert torch.cuda.memory_allocated() - before >= weights
    asyncio.run(made.aclose())
    gc.collect()
    assert torch.cuda.memory_allocated() - before < weights / 2
