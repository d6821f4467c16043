"""Memory and time of scoring many responses in one call, measured in a process of its own.

python -m lib.peak MODEL FILE KIND: the responses are a JSON list in FILE; KIND is "rate" or "generate".
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import psutil

PREAMBLE = "A language model was given an instruction. Guess the instruction from what it wrote.\n\n"
INSTRUCTION = "Write a short text about what is said here, in plain words, and keep a friendly tone throughout."
NEW = 27  # tokens of a reconstruction


def measure(model: Path, texts: Path, kind: str) -> dict[str, float]:
    """Run this module; returns bytes ``loaded`` and at the ``peak``, and ``seconds`` of the call."""
    command = [sys.executable, "-m", "lib.peak", str(model), str(texts), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = orjson.loads(done.stdout.splitlines()[-1])
    return found


def score(model: str, texts: list[str], kind: str) -> dict[str, float]:
    """Load a model and score; what is resident before and at most is this process's own count."""
    from bon.engines.base import Prompt, Request, Turn
    from bon.engines.torch.engine import TorchEngine
    from bon.types import Sampling

    engine: Any = TorchEngine(model, device="cpu", dtype="float32")
    prompts = [Prompt((Turn("user", (PREAMBLE, f"Response: {t}\n", "The instruction was:")),)) for t in texts]
    sampling = Sampling(temperature=0.0, max_tokens=NEW)

    async def call() -> None:
        if kind == "rate":
            await engine.loglikelihood(prompts, [INSTRUCTION] * len(prompts))
        else:
            async for _ in engine.generate([Request(prompt, sampling) for prompt in prompts]):
                pass

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    loaded, started = psutil.Process().memory_info().rss, time.perf_counter()
    asyncio.run(call())
    seconds = time.perf_counter() - started
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"loaded": loaded, "peak": int(status["VmHWM"].split()[0]) * 1024, "seconds": seconds}


if __name__ == "__main__":
    _, model, texts, kind = sys.argv
    print(orjson.dumps(score(model, orjson.loads(Path(texts).read_bytes()), kind)).decode())
