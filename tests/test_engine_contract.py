"""What every engine promises: the same checks run on each of them.

A new engine joins by adding a maker to ``ENGINES``; nothing below knows which engine it talks to.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
from tiny import save, save_adapter

from bon.engines.base import (
    Completion,
    Engine,
    Generates,
    Keep,
    Loglikelihood,
    Partial,
    Prompt,
    Rates,
    Request,
)
from bon.engines.function import FunctionEngine
from bon.engines.scripted import ScriptedEngine
from bon.errors import BonError, EngineError, InputError, PromptTooLongError
from bon.mini import WEIGHTS
from bon.task import Message
from bon.types import Sampling

CONTEXT = 256
TEXTS = (
    "Write a short and friendly reminder for Anna about the meeting on Friday at nine o'clock sharp please",
    "Name three colours and say in one sentence each why somebody could like them more than all others",
    "Hi there how are you doing today my dear old friend from the school by the river",
)


def torch_engine(folder: Any, family: str, **options: Any) -> Engine:
    from bon.engines.torch.engine import TorchEngine

    return TorchEngine(save(folder / family, family, "ascii"), max_model_len=CONTEXT, **options)


def vllm_engine(folder: Any) -> Engine:
    from bon.engines.vllm.engine import VLLMEngine

    # vLLM's CPU attention knows no heads narrower than 32.
    return VLLMEngine(save(folder / "vllm", "Qwen3", "ascii", head_dim=32), max_model_len=CONTEXT)


def torch_view(folder: Any) -> Engine:
    from bon.engines.torch.engine import TorchEngine

    base = save(folder / "Llama", "Llama", "ascii")
    return TorchEngine(base, max_model_len=CONTEXT).adapted(save_adapter(folder / "adapter", base))


def vllm_view(folder: Any) -> Engine:
    from bon.engines.vllm.engine import VLLMEngine

    base = save(folder / "vllm", "Qwen3", "ascii", head_dim=32)
    adapter = save_adapter(folder / "adapter", base)
    return VLLMEngine(base, max_model_len=CONTEXT, adapters=[adapter]).adapted(adapter)


def mini_engine() -> Engine:
    from bon.engines.torch.engine import TorchEngine

    return TorchEngine(WEIGHTS, max_model_len=CONTEXT)


def http_engine(folder: Any) -> Engine:
    from model_server import ModelServer

    from bon.engines.http.engine import HTTPEngine

    save(folder, "Llama", "ascii")
    server = ModelServer(folder, CONTEXT)

    class OwnServer(HTTPEngine):
        async def aclose(self) -> None:
            await super().aclose()
            server.__exit__()

    engine = OwnServer(server.__enter__().url, tokenizer=folder)
    generate(engine, PROMPTS[:1])  # the server says how long its context is
    return engine


ENGINES: dict[str, Callable[[Any], Engine]] = {
    "scripted": lambda folder: ScriptedEngine(max_model_len=CONTEXT),
    "torch-llama": lambda folder: torch_engine(folder, "Llama"),
    "torch-qwen3": lambda folder: torch_engine(folder, "Qwen3"),
    "torch-adapter": torch_view,
    "vllm": vllm_engine,
    "vllm-adapter": vllm_view,
    "torch-small-batches": lambda folder: torch_engine(folder, "Llama", max_batch_tokens=500),
}
"""Engines that run a model, or pretend to."""
if find_spec("aiohttp"):
    ENGINES["http"] = http_engine
if (WEIGHTS / "config.json").exists():
    ENGINES["torch-mini"] = lambda folder: mini_engine()

FUNCTIONS: dict[str, Callable[[Any], Engine]] = {
    "function": lambda folder: FunctionEngine(lambda prompt: f"to {prompt}"),
    "function-n": lambda folder: FunctionEngine(lambda prompt, n: [f"{i} to {prompt}" for i in range(n)]),
}


def params(names: Sequence[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.vllm if name.startswith("vllm") else ()) for name in names]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Engine]]:
    """Each engine, made once."""
    engines: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in engines:
            engines[name] = {**ENGINES, **FUNCTIONS}[name](tmp_path_factory.mktemp("model"))
        return engines[name]

    yield get
    for engine in engines.values():
        asyncio.run(engine.aclose())


@pytest.fixture(params=params([*ENGINES, *FUNCTIONS]))
def writer(request: pytest.FixtureRequest, made: Callable[[str], Engine]) -> Engine:
    """Whatever generates, functions among them: they know no tokens, no seeds and no sampling."""
    return made(request.param)


@pytest.fixture(params=params([*ENGINES]))
def engine(request: pytest.FixtureRequest, made: Callable[[str], Engine]) -> Engine:
    return made(request.param)


def prompt(text: str) -> Prompt:
    return Prompt.of([Message("user", text)])


PROMPTS = [prompt(text) for text in TEXTS]


def collect(engine: Any, requests: Sequence[Request], keep: Keep | None = None) -> list[Completion]:
    async def run() -> list[Completion]:
        return [completion async for completion in engine.generate(requests, keep=keep)]

    return sorted(asyncio.run(run()), key=lambda c: (c.request_index, c.sample_index))


def generate(
    engine: Any, prompts: Sequence[Prompt], n: int = 1, keep: Keep | None = None, **sampling: Any
) -> list[Completion]:
    options = Sampling(**{"max_tokens": 12, "logprobs": True, **sampling})
    return collect(engine, [Request(p, options, n) for p in prompts], keep)


def over_http(engine: Engine) -> bool:
    return hasattr(engine, "endpoints")


def rate(engine: Any, prompts: list[Prompt], texts: list[str], **options: Any) -> list[Loglikelihood]:
    return asyncio.run(engine.loglikelihood(prompts, texts, **options))


def test_what_an_engine_can_do_is_found_by_looking(engine: Engine) -> None:
    assert isinstance(engine, Generates)
    assert isinstance(engine, Rates)
    assert not isinstance(FUNCTIONS["function"](None), Rates)


def test_every_sample_of_every_prompt_comes_exactly_once(writer: Engine) -> None:
    done = generate(writer, PROMPTS, n=5)
    assert [(c.request_index, c.sample_index) for c in done] == [(p, s) for p in range(3) for s in range(5)]
    assert all(c.finish_reason in ("stop", "length") for c in done)


def test_a_later_request_counts_its_samples_on(writer: Engine) -> None:
    options = Sampling(max_tokens=12)
    asked = [Request(PROMPTS[0], options, 2, 3), Request(PROMPTS[1], options), Request(PROMPTS[0], options, 1, 9)]
    done = collect(writer, asked)
    assert [(c.request_index, c.sample_index) for c in done] == [(0, 3), (0, 4), (1, 0), (2, 9)]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (2, 4), (3, 2, 1)])
def test_a_sample_under_a_seed_is_the_same_however_the_samples_are_divided(
    engine: Engine, sizes: tuple[int, ...]
) -> None:
    """A second call with the same seed repeated the first, so a budget that asked twice had every sample twice."""
    whole = [c.text for c in generate(engine, PROMPTS[:1], n=6, seed=11)]
    options = Sampling(max_tokens=12, logprobs=True, seed=11)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rounds = [Request(PROMPTS[0], options, n, first) for n, first in zip(sizes, starts, strict=True)]
    assert [c.text for c in collect(engine, rounds)] == whole, "as requests of one call"
    assert [c.text for each in rounds for c in collect(engine, [each])] == whole, "as calls of their own"
    assert len(set(whole)) > 3


def test_requests_of_one_call_may_be_sampled_differently(engine: Engine) -> None:
    ways = [Sampling(0.0, max_tokens=12), Sampling(max_tokens=3, seed=2), Sampling(0.5, stop=("e",), seed=4)]
    together = collect(engine, [Request(PROMPTS[0], way, 2) for way in ways])
    alone = [c for way in ways for c in collect(engine, [Request(PROMPTS[0], way, 2)])]
    assert [(c.text, c.finish_reason) for c in together] == [(c.text, c.finish_reason) for c in alone]


@pytest.mark.parametrize("stop", [(), ("e", "o")])
def test_the_prompt_is_counted_as_often_as_it_was_read(engine: Engine, stop: tuple[str, ...]) -> None:
    """It stood with sample 0, whichever ended first; and over HTTP it was sent n times and counted once."""
    lengths = [rated.prompt_tokens for rated in rate(engine, PROMPTS, ["x"] * 3)]
    done = generate(engine, PROMPTS, n=4, seed=1, stop=stop)
    for index, length in enumerate(lengths):
        counts = [c.prompt_tokens for c in done if c.request_index == index]
        assert sorted(counts) == ([length] * 4 if over_http(engine) else [0, 0, 0, length])
        assert all(0 <= c.cached_tokens <= c.prompt_tokens for c in done)


def test_counts_and_logprobs_fit_together(engine: Engine) -> None:
    for completion in generate(engine, PROMPTS, n=3, seed=1):
        assert completion.completion_tokens > 0
        assert completion.logprobs is not None
        assert completion.cumulative_logprob is not None
        assert len(completion.logprobs) == completion.completion_tokens
        assert max(completion.logprobs) <= 0
        assert completion.cumulative_logprob == pytest.approx(math.fsum(completion.logprobs), abs=1e-4)
        if completion.pieces is not None:
            assert len(completion.pieces) == len(completion.logprobs)
            said = "".join(completion.pieces)
            assert said.startswith(completion.text) or "\ufffd" in said, "the texts of the tokens make the text"
        if completion.tokens is not None:
            assert completion.tokens.text == completion.text


def test_logprobs_that_nobody_asked_for_change_nothing_but_what_is_told(engine: Engine) -> None:
    asked, not_asked = (generate(engine, PROMPTS, n=2, seed=1, stop=("e",), logprobs=flag) for flag in (True, False))
    for got, expected in zip(not_asked, asked, strict=True):
        assert (got.text, got.finish_reason, got.completion_tokens) == (
            expected.text,
            expected.finish_reason,
            expected.completion_tokens,
        )
        assert got.logprobs in (None, expected.logprobs)
        assert (got.logprobs is None) == (got.cumulative_logprob is None)


def test_the_same_seed_gives_the_same_completions(engine: Engine) -> None:
    texts = [c.text for c in generate(engine, PROMPTS, n=4, seed=7)]
    assert [c.text for c in generate(engine, PROMPTS, n=4, seed=7)] == texts
    assert len(set(texts)) > 3


def test_a_seeded_completion_does_not_depend_on_the_rest_of_the_call(engine: Engine) -> None:
    together = {(c.request_index, c.sample_index): c.text for c in generate(engine, PROMPTS, n=4, seed=7)}
    for index, alone in enumerate(PROMPTS):
        assert [c.text for c in generate(engine, [alone], n=2, seed=7)] == [together[index, 0], together[index, 1]]
    turned = generate(engine, PROMPTS[::-1], n=4, seed=7)
    assert {(2 - c.request_index, c.sample_index): c.text for c in turned} == together


def test_temperature_zero_gives_equal_samples(engine: Engine) -> None:
    assert len({c.text for c in generate(engine, PROMPTS[:1], n=3, temperature=0.0)}) == 1


@pytest.mark.parametrize("options", [{}, {"max_tokens": 3}, {"stop": ("e",)}, {"temperature": 1.0, "seed": 5}])
def test_a_draft_changes_no_completion(engine: Engine, options: dict[str, Any]) -> None:
    options = {"temperature": 0.0, **options}
    plain = generate(engine, PROMPTS * 2, **options)
    texts = [c.text for c in plain]
    for drafts in (
        [*texts[:3], "", texts[4][:5], texts[5] + " and so on"],
        [texts[1], texts[0], *(text[:4] + "#" + text[5:] for text in texts[2:])],
        ["Something else altogether"] * 6,
    ):
        drafted = generate(engine, [replace(p, draft=d) for p, d in zip(PROMPTS * 2, drafts, strict=True)], **options)
        for got, expected in zip(drafted, plain, strict=True):
            assert (got.text, got.finish_reason, got.tokens) == (expected.text, expected.finish_reason, expected.tokens)
            assert got.completion_tokens == expected.completion_tokens
            assert got.prompt_tokens == expected.prompt_tokens
            assert 0 <= got.drafted_tokens <= got.completion_tokens
            assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_max_tokens_cuts_with_reason_length(engine: Engine) -> None:
    for completion in generate(engine, PROMPTS, n=2, max_tokens=2, seed=0):
        assert completion.completion_tokens <= 2
        assert completion.finish_reason == "length" or completion.completion_tokens < 3
    assert any(c.finish_reason == "length" for c in generate(engine, PROMPTS, n=2, max_tokens=2, seed=0))


def test_a_stop_string_ends_the_text_before_itself(engine: Engine) -> None:
    whole = generate(engine, PROMPTS, n=2, seed=3)
    text = max((c.text for c in whole), key=len)
    stop = text[len(text) // 2 :][:3]
    for before, cut in zip(whole, generate(engine, PROMPTS, n=2, seed=3, stop=(stop, "\0never")), strict=True):
        if stop in before.text:
            assert cut.text == before.text[: before.text.index(stop)]
            assert cut.finish_reason == "stop"
            assert cut.completion_tokens <= before.completion_tokens
        else:
            assert (cut.text, cut.finish_reason) == (before.text, before.finish_reason)


def test_keep_sees_every_few_tokens_and_stops_a_completion(engine: Engine) -> None:
    whole = {(c.request_index, c.sample_index): c for c in generate(engine, PROMPTS, n=2, seed=3)}
    seen: list[Partial] = []

    def keep(partial: Partial) -> bool:
        seen.append(partial)
        return partial.request_index != 1

    for completion in generate(engine, PROMPTS, n=2, seed=3, keep=keep):
        before = whole[completion.request_index, completion.sample_index]
        calls = [p for p in seen if (p.request_index, p.sample_index) == (before.request_index, before.sample_index)]
        assert len(calls) == len({p.completion_tokens for p in calls})
        assert all(before.text.startswith(p.text) for p in calls)
        assert all(p.completion_tokens <= completion.completion_tokens for p in calls)
        if completion.request_index == 1:
            assert calls or before.completion_tokens <= 4
        if completion.request_index == 1 and calls:
            assert completion.finish_reason == "abort"
            assert completion.completion_tokens <= 4
            assert completion.text == calls[-1].text
        else:
            assert (completion.text, completion.finish_reason) == (before.text, before.finish_reason)
            assert len(calls) >= (before.completion_tokens - 1) // 4


def test_what_keep_raises_reaches_the_caller_and_the_engine_stays_usable(engine: Engine) -> None:
    def keep(partial: Partial) -> bool:
        raise LookupError("no such candidate")

    with pytest.raises(LookupError, match="no such candidate"):
        generate(engine, PROMPTS, n=2, max_tokens=100, seed=3, keep=keep)
    assert len(generate(engine, PROMPTS, n=2)) == 6


def test_leaving_early_stops_the_work_and_the_engine_stays_usable(writer: Any) -> None:
    async def leave() -> Completion:
        stream = writer.generate([Request(p, Sampling(max_tokens=150), 4) for p in PROMPTS])
        async for completion in stream:
            await stream.aclose()
            return completion
        raise AssertionError("nothing came")

    assert asyncio.run(leave()).finish_reason in ("stop", "length")
    assert len(generate(writer, PROMPTS, n=2)) == 6


def test_a_cancelled_caller_leaves_nothing_running(writer: Any) -> None:
    async def run() -> set[Any]:
        async def consume() -> None:
            async with aclosing(writer.generate([Request(p, Sampling(max_tokens=150), 4) for p in PROMPTS])) as stream:
                async for _ in stream:
                    await asyncio.sleep(60)

        before = asyncio.all_tasks()
        task = asyncio.create_task(consume())
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.all_tasks() - before

    assert not asyncio.run(run())
    assert len(generate(writer, PROMPTS, n=2)) == 6


def test_calls_at_the_same_time_do_not_disturb_each_other(engine: Any) -> None:
    async def both() -> list[list[str]]:
        async def one(request: Request) -> list[str]:
            done = [c async for c in engine.generate([request])]
            return [c.text for c in sorted(done, key=lambda c: c.sample_index)]

        return list(await asyncio.gather(*(one(Request(p, Sampling(max_tokens=12, seed=5), 2)) for p in PROMPTS)))

    assert asyncio.run(both()) == [[c.text for c in generate(engine, [p], n=2, seed=5)] for p in PROMPTS]


def test_a_prompt_that_does_not_fit_fails_in_its_place_and_the_others_run(engine: Engine) -> None:
    assert engine.max_model_len == CONTEXT
    huge = prompt("word " * 3000)
    plain = generate(engine, PROMPTS[:2], n=2, seed=4)
    first, *failed, last = [
        [c for c in generate(engine, [PROMPTS[0], huge, huge, PROMPTS[1]], n=2, seed=4) if c.request_index == index]
        for index in range(4)
    ]
    assert [c.text for c in (*first, *last)] == [c.text for c in plain]
    for completion in (c for some in failed for c in some):
        assert completion.finish_reason == "error"
        assert isinstance(completion.error, PromptTooLongError)
        assert completion.error.tokens > completion.error.limit
    assert [len(some) for some in failed] == [2, 2], "one for each sample"


def test_a_continuation_that_does_not_fit_fails_in_its_place_and_the_others_are_rated(engine: Engine) -> None:
    first, failed, last = rate(engine, [PROMPTS[0], PROMPTS[1], PROMPTS[2]], ["red", "word " * 3000, "blue"])
    assert isinstance(failed.error, PromptTooLongError)
    assert math.isnan(failed.mean)
    assert [first.error, last.error] == [None, None]
    assert [first.total, last.total] == pytest.approx(
        [r.total for r in rate(engine, [PROMPTS[0], PROMPTS[2]], ["red", "blue"])], abs=1e-3
    )


def test_prompt_and_completion_stay_within_the_context(engine: Engine) -> None:
    lengths = [rated.prompt_tokens for rated in rate(engine, PROMPTS, ["x"] * 3)]
    for completion in generate(engine, PROMPTS, n=2, max_tokens=10_000, seed=1):
        assert lengths[completion.request_index] + completion.completion_tokens <= CONTEXT


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 0), (1, -1)])
def test_a_request_asks_for_at_least_one_sample(arguments: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="n must be at least 1"):
        Request(PROMPTS[0], Sampling(), *arguments)


def test_an_unknown_option_is_refused_by_the_call_itself(writer: Any) -> None:
    with pytest.raises(InputError, match="repetition_penalti"):
        writer.generate([Request(PROMPTS[0], Sampling(extra={"repetition_penalti": 1.1}))])


def test_an_engine_that_runs_a_model_here_refuses_tools_by_name(engine: Any) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    tools = Prompt.of([Message("user", "x"), Message("assistant", "", (call,)), Message("tool", "y", (), "1")])
    if over_http(engine):
        return
    with pytest.raises(InputError, match=r"message 1 has tool_calls.* reads only text"):
        collect(engine, [Request(tools)])


def test_an_answer_that_has_begun_is_continued(writer: Any) -> None:
    """Greedy decoding from what it had begun to say itself goes on as it went on."""
    begun = Message("assistant", "to")
    if isinstance(writer, FunctionEngine):
        with pytest.raises(InputError, match=r"the last message is the assistant's, and the function .* cannot"):
            collect(writer, [Request(Prompt.of([Message("user", TEXTS[0]), begun]))])
        return
    if isinstance(writer, ScriptedEngine):
        return
    (whole,) = generate(writer, PROMPTS[:1], temperature=0.0)
    half = Message("assistant", whole.text[: len(whole.text) // 2])
    (rest,) = generate(writer, [Prompt.of([Message("user", TEXTS[0]), half])], temperature=0.0)
    assert half.content
    assert (half.content + rest.text).startswith(whole.text)


def test_no_requests_give_no_completions(writer: Any) -> None:
    assert collect(writer, []) == []


def test_nothing_to_rate_gives_nothing_and_lists_of_different_lengths_are_refused(engine: Engine) -> None:
    assert rate(engine, [], []) == []
    with pytest.raises(InputError, match="there are 3 prompts and 1 continuations"):
        rate(engine, PROMPTS, ["x"])


def test_the_loglikelihood_of_a_completion_is_the_sum_of_its_logprobs(engine: Engine) -> None:
    compared = 0
    for completion in generate(engine, PROMPTS, n=3, seed=2, max_tokens=20):
        ended = completion.finish_reason == "stop"
        (rated,) = rate(engine, [PROMPTS[completion.request_index]], [completion.text], end=ended)
        if completion.cumulative_logprob is not None and rated.tokens == completion.completion_tokens:
            assert rated.total == pytest.approx(completion.cumulative_logprob, abs=2e-3)
            compared += 1
    assert compared >= 3


def test_the_loglikelihood_does_not_depend_on_the_rest_of_the_call(engine: Engine) -> None:
    texts = ["Dear Anna", "red", "I am fine, thank you very much, and how are you"]
    together = rate(engine, PROMPTS, texts)
    for index, text in enumerate(texts):
        (alone,) = rate(engine, [PROMPTS[index]], [text])
        assert alone.total == pytest.approx(together[index].total, abs=1e-3)
        assert alone.tokens == together[index].tokens


def test_the_end_of_the_turn_is_one_more_token(engine: Engine) -> None:
    texts = ["Dear Anna", "red", "fine"]
    for bare, ended in zip(rate(engine, PROMPTS, texts, end=False), rate(engine, PROMPTS, texts), strict=True):
        assert ended.tokens == bare.tokens + 1
        assert ended.total < bare.total < 0
        assert bare.mean == pytest.approx(bare.total / bare.tokens)


def test_closing_twice_is_harmless_and_what_comes_after_is_refused(tmp_path: Any) -> None:
    async def twice(made: Engine) -> None:
        await made.aclose()
        await made.aclose()

    for name in ("scripted", "torch-llama", "function"):
        asyncio.run(twice({**ENGINES, **FUNCTIONS}[name](tmp_path)))
    closed = ENGINES["torch-llama"](tmp_path)
    asyncio.run(closed.aclose())
    with pytest.raises(EngineError, match="is closed"):
        generate(closed, PROMPTS)


def test_a_function_that_fails_fails_the_samples_of_its_call_alone() -> None:
    """One failing call of eight lost the prompt."""
    calls = []

    def flaky(prompt: str) -> str:
        calls.append(prompt)
        if len(calls) == 2:
            raise ValueError("not now")
        return "fine"

    done = generate(FunctionEngine(flaky), PROMPTS[:1], n=4)
    assert [c.finish_reason for c in done].count("error") == 1
    (failed,) = (c.error for c in done if c.error is not None)
    assert isinstance(failed, BonError)
    assert "raised ValueError: not now" in str(failed)
