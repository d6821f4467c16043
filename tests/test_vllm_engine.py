"""The vLLM engine on vLLM's CPU build: what the contract tests cannot know about it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from tiny import save
from transformers import AutoModelForCausalLM

from bon import BestOfN
from bon.budget import StopAt
from bon.engines.base import Completion, Prompt, Request
from bon.engines.placement import SHARE, WORKSPACE, need_of
from bon.errors import EngineError, InputError, ModelNotFoundError, PromptTooLongError, UnknownNameError
from bon.mini import WEIGHTS
from bon.scorers.flip import Flip
from bon.task import Message
from bon.types import Sampling

pytestmark = pytest.mark.vllm

TEXTS = (
    "Write a short reminder for Anna to water the plants on Monday.",
    "Write a slogan for a bakery called Sunrise.",
    "Write an invitation for Tom to a garden party on Friday.",
)
PROMPTS = [Prompt.of([Message("user", text)]) for text in TEXTS]


def load(model: Any, **options: Any) -> Any:
    from bon.engines.vllm.engine import VLLMEngine

    return VLLMEngine(model, **options)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    made = load(WEIGHTS)
    yield made
    asyncio.run(made.aclose())


def requests_for(prompts: list[Prompt], n: int = 1, **sampling: Any) -> list[Request]:
    return [Request(prompt, Sampling(**sampling), n) for prompt in prompts]


def generate(engine: Any, prompts: list[Prompt], n: int = 1, keep: Any = None, **sampling: Any) -> list[Completion]:
    requests = requests_for(prompts, n, **{"max_tokens": 64, **sampling})

    async def collect() -> list[Completion]:
        return [c async for c in engine.generate(requests, keep=keep)]

    return sorted(asyncio.run(collect()), key=lambda c: (c.request_index, c.sample_index))


def rate(engine: Any, prompts: list[Prompt], texts: list[str]) -> list[Any]:
    return asyncio.run(engine.loglikelihood(prompts, texts))


def test_greedy_tokens_of_the_mini_model_are_those_of_transformers(engine: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    for prompt, completion in zip(PROMPTS, generate(engine, PROMPTS, temperature=0.0, logprobs=True), strict=True):
        ids = torch.tensor([engine.renderer.render(prompt)])
        with torch.inference_mode():
            whole = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=list(engine.renderer.end_ids))
        expected = whole[0, ids.shape[1] :].tolist()
        ended = expected[-1] in engine.renderer.end_ids
        assert completion.tokens is not None
        assert list(completion.tokens.ids) == (expected[:-1] if ended else expected)
        assert completion.finish_reason == ("stop" if ended else "length")
        with torch.inference_mode():
            logits = model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        own = logits[torch.arange(len(expected)), expected].tolist()
        assert completion.logprobs == pytest.approx(own, abs=1e-4)


def test_the_torch_engine_says_the_same(engine: Any) -> None:
    from bon.engines.torch.engine import TorchEngine

    other = TorchEngine(WEIGHTS, device="cpu")
    ours, theirs = generate(engine, PROMPTS, temperature=0.0), generate(other, PROMPTS, temperature=0.0)
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    assert [c.text for c in ours] == [c.text for c in theirs]
    texts = [c.text for c in ours]
    assert [r.total for r in rate(engine, PROMPTS, texts)] == pytest.approx(
        [r.total for r in rate(other, PROMPTS, texts)], abs=1e-3
    )
    asyncio.run(other.aclose())


def test_samples_of_a_prompt_share_its_keys_and_values_and_count_it_once(engine: Any) -> None:
    """Each sample after the first finds the prompt in the cache; only what the first one found was saved."""
    prompt = Prompt.of([Message("user", "Tom, Mia and Anna meet at the garden gate on Sunday. " * 12)])
    length = len(engine.renderer.render(prompt))
    for found in (0, (length - 1) // 32 * 32):
        done = generate(engine, [prompt], n=4)
        assert sorted((c.prompt_tokens, c.cached_tokens) for c in done) == [(0, 0)] * 3 + [(length, found)]


def test_samples_continue_those_of_an_earlier_request(engine: Any) -> None:
    def sample(*parts: tuple[int, int]) -> list[str]:
        requests = [Request(PROMPTS[0], Sampling(max_tokens=20, seed=3), n, first) for n, first in parts]

        async def collect() -> list[Completion]:
            return [c async for c in engine.generate(requests)]

        return [c.text for c in sorted(asyncio.run(collect()), key=lambda c: c.sample_index)]

    whole = sample((6, 0))
    assert sample((2, 0), (3, 2), (1, 5)) == whole
    assert sample((4, 2)) == whole[2:]


def test_the_candidates_are_the_same_whatever_the_rounds_and_each_finds_the_prompt_in_the_cache(engine: Any) -> None:
    found = []
    for size in (8, 4, 2, 1):
        bon = BestOfN(engine, "longest", n=StopAt(1e9, most=8, batch=size), sampling={"seed": 3, "max_tokens": 20})
        result = bon("Mia, Tom and Anna meet at the garden gate on Monday. " * 12)
        found.append([candidate.text for candidate in result.candidates])
        a_round = result.usage.policy_prompt_tokens * size // 8
        assert result.usage.cached_tokens >= (8 // size - 1) * ((a_round - 1) // 32 * 32) >= 8 // size - 1
    assert found == [found[0]] * 4


def test_a_loglikelihood_out_of_the_cache_is_the_one_computed_afresh(engine: Any) -> None:
    """vLLM returns uninitialised memory for log-probabilities of tokens that it took from the cache."""
    prompts = [Prompt.of([Message("user", f"{text} " * 8)]) for text in TEXTS]
    texts = ["Dear Anna, please water the plants on Monday. " * 4] * 3
    first = rate(engine, prompts, texts)
    again = rate(engine, prompts, texts)  # everything is in the cache now, the continuation too
    assert [r.total for r in again] == pytest.approx([r.total for r in first], abs=1e-3)
    assert all(0 > r.mean > -30 for r in first)
    for other in rate(engine, prompts, ["Something else."] * 3):
        whole_blocks = other.prompt_tokens // 32 * 32
        assert other.cached_tokens == (0 if whole_blocks == other.prompt_tokens else whole_blocks)


def test_an_unfinished_call_leaves_nothing_running(engine: Any) -> None:
    async def leave() -> None:
        stream = engine.generate(requests_for(PROMPTS, 8, max_tokens=500, extra={"ignore_eos": True}))
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.3)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()

    asyncio.run(leave())
    assert engine._engine.llm.get_num_unfinished_requests() == 0
    assert len(generate(engine, PROMPTS, max_tokens=2)) == len(PROMPTS)


def test_an_aborted_completion_stops_the_work_in_vllm(engine: Any) -> None:
    [done] = generate(engine, PROMPTS[:1], max_tokens=500, keep=lambda p: False, extra={"ignore_eos": True})
    assert (done.finish_reason, done.completion_tokens) == ("abort", 4)
    assert engine._engine.llm.get_num_unfinished_requests() == 0


def test_structured_output_follows_its_schema(engine: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"instruction": {"type": "string", "maxLength": 40}},
        "required": ["instruction"],
        "additionalProperties": False,
    }
    extra = {"structured_outputs": {"json": schema}}
    for completion in generate(engine, PROMPTS, n=8, max_tokens=200, seed=1, extra=extra):
        if completion.finish_reason == "stop":
            assert len(json.loads(completion.text)["instruction"]) <= 40
    with pytest.raises(InputError, match="Did you mean 'json'"):
        generate(engine, PROMPTS, extra={"structured_outputs": {"jsonn": schema}})
    [yes] = generate(engine, PROMPTS[:1], extra={"structured_outputs": {"choice": ["yes", "no"]}})
    assert yes.text in ("yes", "no")


def test_the_json_style_is_held_to_its_schema(engine: Any) -> None:
    seen = []

    class Watched(type(engine)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(engine.__dict__)

        async def generate(self, *args: Any, **options: Any) -> Any:
            async for completion in engine.generate(*args, **options):
                seen.append(completion.text)
                yield completion

    # The mini model never saw JSON and does not end it by itself: what it begins with is the grammar's.
    flip = Flip(Watched(), style="json", sampling=Sampling(temperature=0.0, max_tokens=48))
    BestOfN(engine, flip, n=4, sampling=Sampling(seed=1, max_tokens=64))(TEXTS[0])
    assert seen
    assert all(text.startswith('{"reasoning":"') for text in seen)


def test_options_under_vllms_own_names_reach_it_and_others_are_refused(engine: Any) -> None:
    plain, biased = (
        generate(engine, PROMPTS[:1], temperature=0.0, extra=extra)[0] for extra in ({}, {"min_tokens": 60})
    )
    assert biased.completion_tokens > plain.completion_tokens
    with pytest.raises(UnknownNameError, match="Did you mean 'presence_penalty'"):
        generate(engine, PROMPTS, extra={"presence_penality": 1.0})
    with pytest.raises(InputError, match="presence_penalty must be in"):
        generate(engine, PROMPTS, extra={"presence_penalty": 7.0})
    with pytest.raises(InputError, match="temperature"):
        generate(engine, PROMPTS, temperature=9.0)


def test_threads_that_are_asked_for_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``threads=4`` did nothing where OMP_NUM_THREADS was set."""
    from bon.engines.vllm.start import _environment

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with _environment(4), _environment(None):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["TORCHDYNAMO_DISABLE"]) == ("4", "1")
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in os.environ


def test_more_samples_than_fit_at_a_time_wait_their_turn(engine: Any) -> None:
    async def collect() -> list[tuple[bool, str]]:
        stream = engine.generate(requests_for(PROMPTS[:1], 150, max_tokens=4, seed=1))
        return [(engine.full, completion.text) async for completion in stream]

    done = asyncio.run(collect())
    assert len(done) == 150
    assert len({text for _, text in done}) > 5
    assert done[0][0], "many wait"
    assert not done[-1][0]


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("/no/such/folder", {}, ModelNotFoundError, "no model folder at '/no/such/folder'"),
        (WEIGHTS / "config.json", {}, ModelNotFoundError, "is a file"),
        (WEIGHTS, {"tensor_paralel_size": 2}, UnknownNameError, "Did you mean 'tensor_parallel_size'"),
        (WEIGHTS, {"max_model_len": 5000}, InputError, "max_model_len.*5000"),
        (WEIGHTS, {"dtype": "float31"}, InputError, "float31"),
        (
            WEIGHTS,
            {"kv_cache_memory_bytes": 1 << 20},
            EngineError,
            r"\(KV cache\) holds \d+ tokens, .* 1024\. .*max_model_len",
        ),
        (WEIGHTS, {"kv_cache_memory_bytes": 1 << 20, "max_model_len": 512}, EngineError, "KV cache.*max_model_len"),
    ],
)
def test_what_cannot_start_says_why(model: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        load(model, **options)
    assert "[type=" not in str(raised.value), "pydantic's own words"


def test_a_context_that_the_memory_does_not_hold_is_cut_to_what_it_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model with a context of 262,144 tokens did not start at all on a GPU that it shared with its scorer."""
    folder = save(tmp_path / "model", "Qwen3", "ascii", head_dim=32, max_position_embeddings=8192)
    per_token = 2 * 3 * 2 * 32 * 4
    with caplog.at_level("INFO", "bon"):
        engine = load(folder, kv_cache_memory_bytes=3100 * per_token)
    limit = engine.max_model_len
    assert 3000 < limit < 3100
    assert f"prompt and completion may have {limit} tokens together" in caplog.text
    [too_long] = generate(engine, [Prompt.of([Message("user", "x" * 3100)])])
    assert isinstance(too_long.error, PromptTooLongError)
    assert f"than the {limit - 1} that fit" in str(too_long.error)
    prompt = Prompt.of([Message("user", "x" * (limit - 100))])
    [completion] = generate(engine, [prompt], max_tokens=1000, extra={"ignore_eos": True})
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens + completion.completion_tokens == limit
    asyncio.run(engine.aclose())


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Path]]:
    """What was in shared memory before a model was spread over two cores; what then is left by a kill is removed."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("a core for each of two workers")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    before = set(Path("/dev/shm").glob("vllm_dist_*"))
    yield before
    for left in set(Path("/dev/shm").glob("vllm_dist_*")) - before:
        left.unlink()


def test_a_model_on_two_devices_says_the_same_and_leaves_no_memory(engine: Any, shared_memory: set[Path]) -> None:
    """Workers that did not take their interpreter apart left 4 MiB each in /dev/shm."""
    wide = load(WEIGHTS, tensor_parallel_size=2)
    texts = [c.text for c in generate(engine, PROMPTS, temperature=0.0)]
    assert [c.text for c in generate(wide, PROMPTS, temperature=0.0)] == texts
    segments = 2 if torch.cpu._is_avx512_supported() else 0  # vLLM's build for AVX2 has no communicator of its own
    assert len(set(Path("/dev/shm").glob("vllm_dist_*")) - shared_memory) == segments
    asyncio.run(wide.aclose())
    assert set(Path("/dev/shm").glob("vllm_dist_*")) == shared_memory


def test_the_end_of_a_worker_is_named_and_ends_the_others(shared_memory: set[Path]) -> None:
    wide = load(WEIGHTS, tensor_parallel_size=2)
    assert generate(wide, PROMPTS[:1])
    core = psutil.Process(wide._engine.processes[0].pid)
    workers = [child for child in core.children() if "Worker" in child.name()]
    assert len(workers) == 2
    workers[0].kill()
    with pytest.raises(EngineError, match=r"died: Worker proc \S+ died unexpectedly \(exit code: \S+\)"):
        generate(wide, PROMPTS, max_tokens=400, extra={"ignore_eos": True})
    asyncio.run(wide.aclose())
    _, alive = psutil.wait_procs([core, *workers], timeout=10)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive), alive


def test_a_build_for_cuda_without_a_gpu_says_so() -> None:
    """It can be imported, and then failed with "Device string must not be empty"."""
    code = (
        "import vllm.platforms as p; from vllm.platforms.interface import UnspecifiedPlatform as U;"
        "p._current_platform = U(); from bon.models import ModelPool; ModelPool().engine('mini,engine=vllm')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "bon.errors.EngineError: this vLLM is not built for any device that is here" in done.stderr


@pytest.mark.parametrize("flip", [str, Flip], ids=["bare", "in a scorer"])
def test_two_models_by_name_start_at_the_same_time_and_work_together(engine: Any, tmp_path: Path, flip: Any) -> None:
    copy = shutil.copytree(WEIGHTS, tmp_path / "copy")
    with BestOfN("mini,engine=vllm", flip(f"{copy},engine=vllm"), n=4, sampling={"seed": 1}) as bon:
        loaded = time.time()
        pair = (bon.policy, bon.scorer.engine)  # type: ignore[attr-defined]
        begun = [psutil.Process(made._engine.processes[0].pid).create_time() for made in pair]  # type: ignore[union-attr]
        assert max(begun) - min(begun) < (loaded - min(begun)) / 2
        result = bon(TEXTS[0])
        assert pair[0] is not pair[1]
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert BestOfN(engine, "flip", n=4, sampling={"seed": 1})(TEXTS[0]).text == result.text


def test_two_models_on_what_is_said_to_be_one_gpu_get_what_the_rule_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = 7 << 30
    monkeypatch.setattr("bon.engines.placement.visible_gpus", lambda: [gpu])
    small = save(tmp_path / "scorer", "Qwen3", "ascii", head_dim=32, max_position_embeddings=4096)
    with BestOfN(f"{WEIGHTS},engine=vllm", f"{small},engine=vllm", n=4, sampling={"seed": 1}) as bon:
        pair = (bon.policy, bon.scorer.engine)  # type: ignore[attr-defined]
        caches = [made._engine.llm.vllm_config.cache_config for made in pair]  # type: ignore[union-attr]
        needs = [need_of(str(WEIGHTS)), need_of(str(small))]
        assert [cache.kv_cache_memory_bytes // need.per_token for cache, need in zip(caches, needs, strict=True)] == [
            (int(SHARE * gpu) - sum(need.weights + WORKSPACE for need in needs))
            // sum(need.per_token for need in needs)
        ] * 2
        assert sum(cache.gpu_memory_utilization for cache in caches) <= SHARE
        assert len(bon(TEXTS[0]).candidates) == 4


def test_a_lora_adapter_changes_what_the_model_says(engine: Any, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    layers = [f"base_model.model.model.layers.{i}.self_attn.o_proj" for i in range(4)]
    weights = {f"{name}.lora_{side}.weight": torch.randn(*size) for name in layers for side, size in _SIDES.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    adapted = load(WEIGHTS, lora=folder)
    texts = [c.text for c in generate(engine, PROMPTS, temperature=0.0)]
    assert [c.text for c in generate(adapted, PROMPTS, temperature=0.0)] != texts
    asyncio.run(adapted.aclose())
    with pytest.raises(ModelNotFoundError, match="no LoRA adapter"):
        load(WEIGHTS, lora=tmp_path)


_SIDES = {"A": (4, 128), "B": (128, 4)}


def test_an_engine_that_dies_says_why_once_and_another_can_be_loaded(tmp_path: Path) -> None:
    """vLLM's CPU attention knows no heads of 16 and dies of it at the first request."""
    dying = load(save(tmp_path / "model", "Llama", "ascii", head_dim=16), max_model_len=128)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"died: RuntimeError: Unsupported CPU attention .*head_dim=16"):
            generate(dying, PROMPTS)
    with pytest.raises(EngineError, match="died"):
        rate(dying, PROMPTS[:1], ["x"])
    asyncio.run(dying.aclose())
    again = load(WEIGHTS)
    assert generate(again, PROMPTS)
    asyncio.run(again.aclose())
    with pytest.raises(EngineError, match="is closed"):
        generate(again, PROMPTS)


def test_an_engine_whose_process_is_killed_does_not_hang() -> None:
    engine = load(WEIGHTS)

    async def killed() -> list[Completion]:
        stream = engine.generate(requests_for(PROMPTS, 4, max_tokens=900, extra={"ignore_eos": True}))
        threading.Timer(0.3, engine._engine.processes[0].kill).start()
        return [c async for c in stream]

    with pytest.raises(EngineError, match=r"died: its process was ended by signal 9 \(out of memory\?\)"):
        asyncio.run(asyncio.wait_for(killed(), 30))
    asyncio.run(engine.aclose())


# A script without ``if __name__ == "__main__"``: a spawned process must not run it again.
SCRIPT = """
    import signal, sys
    from bon import BestOfN
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    bon = BestOfN("mini,engine=vllm", n=2, sampling={"max_tokens": 16})
    result = bon("Write a slogan for a bakery called Sunrise.")
    print(len(result.candidates), *(p.pid for p in bon.policy._engine.processes), flush=True)
    how = sys.argv[1]
    if how == "exception":
        raise ValueError("on purpose")
    elif how != "exit":
        bon("Write a slogan for a bakery called Sunrise.", n=4000)
"""


@pytest.mark.parametrize("how", ["exit", "exception", "SIGINT", "SIGTERM", "SIGKILL"])
def test_no_process_is_left_behind(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(script), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    candidates, child = map(int, line.split())
    assert candidates == 2
    if how.startswith("SIG"):
        time.sleep(0.5)
        process.send_signal(getattr(signal, how))
    out, err = process.communicate(timeout=60)
    assert out == ""  # standard output belongs to the caller
    expected = {"exit": 0, "exception": 1}
    assert process.returncode == expected.get(how, -getattr(signal, how, 0)), err
    assert {"exit": "", "exception": "on purpose", "SIGINT": "KeyboardInterrupt"}.get(how, "") in err
    deadline = time.monotonic() + 15
    while _alive(child):
        assert time.monotonic() < deadline, f"process {child} is still there"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
