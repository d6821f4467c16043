"""A real server of llama.cpp's as policy and as the scorer's model: its own engine, template and HTTP.

Marker ``clients``: skipped where xllamacpp, which holds that server, is not installed (pip install -e '.[clients]').
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import served

from bon import BestOfN
from bon.types import REWARDED

pytestmark = pytest.mark.clients

SERVER = """
import sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port, parameters.n_ctx, parameters.n_parallel = sys.argv[1], 0, 4096, 2
parameters.cpuparams.n_threads, parameters.warmup = 1, False
server = xllamacpp.Server(parameters)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("xllamacpp", reason="pip install -e '.[clients]'")
    pytest.importorskip("gguf", reason="pip install -e '.[gguf]'")
    import tiny_gguf

    file: Path = tiny_gguf.save(tmp_path_factory.mktemp("llama") / "tiny.gguf")
    command = [sys.executable, "-c", SERVER, str(file)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        address = next((line.split()[1] for line in server.stdout if line.startswith("at ")), None)
        assert address is not None, "the server did not start"
        yield f"{address}/v1"
        server.kill()


def test_candidates_are_sampled_and_scored_there(url: str) -> None:
    with BestOfN(url, f"flip:{url}", n=3, sampling={"max_tokens": 8}) as bon:
        result = bon([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}])
    assert len(result.candidates) == 3
    assert all(candidate.finish_reason in ("stop", "length") for candidate in result.candidates)
    assert {score.status for score in result.scores} <= {*REWARDED, "failed", "empty", "pruned"}
    assert not any(score.error for score in result.scores)
    assert result.usage.policy_completion_tokens >= 3
    assert result.usage.scorer_prompt_tokens > 0


def test_bon_serve_stands_before_it(url: str) -> None:
    with served(BestOfN(url, "longest", n=2, sampling={"max_tokens": 6})) as site:
        assert site.http.get("/ready").status_code == 200
        assert site.http.get("/v1/models").json()["data"][0]["id"].endswith(".gguf")
        answer = site.openai().chat.completions.create(
            model=site.http.get("/v1/models").json()["data"][0]["id"],
            messages=[{"role": "user", "content": "Name a colour."}],
        )
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert "".join(
            chunk.get("choices", [{}])[0].get("delta", {}).get("content") or ""
            for chunk in site.events()
            if chunk.get("choices")
        )
