"""What every engine promises: the same checks run on each of them.

A new engine joins by adding a maker to ``ENGINES``; nothing below knows which engine it talks to.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
from tiny import save

from bon.engines.base import Completion, Engine, Loglikelihood, Partial, Prompt
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError, PromptTooLongError, UnknownNameError
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


def mini_engine() -> Engine:
    from bon.engines.torch.engine import TorchEngine

    return TorchEngine(WEIGHTS, max_model_len=CONTEXT)


def http_engine(folder: Any) -> Engine:
    from model_server import ModelServer

    from bon.engines.http.engine import OpenAIEngine

    save(folder, "Llama", "ascii")
    server = ModelServer(folder, CONTEXT)

    class OwnServer(OpenAIEngine):
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
    "vllm": vllm_engine,
    "torch-small-batches": lambda folder: torch_engine(folder, "Llama", max_batch_tokens=500),
}
if find_spec("openai"):
    ENGINES["openai"] = http_engine
if (WEIGHTS / "config.json").exists():
    ENGINES["torch-mini"] = lambda folder: mini_engine()


PARAMS = [pytest.param(name, marks=pytest.mark.vllm if name == "vllm" else ()) for name in ENGINES]


@pytest.fixture(scope="module", params=PARAMS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = ENGINES[request.param](tmp_path_factory.mktemp("model"))
    yield made
    asyncio.run(made.aclose())


def prompt(text: str) -> Prompt:
    return Prompt.of([Message("user", text)])


PROMPTS = [prompt(text) for text in TEXTS]


def generate(engine: Engine, prompts: list[Prompt], n: int = 1, keep: Any = None, **sampling: Any) -> list[Completion]:
    async def collect() -> list[Completion]:
        options = Sampling(**{"max_tokens": 12, "logprobs": True, **sampling})
        return [c async for c in engine.generate(prompts, options, n, keep=keep)]

    return sorted(asyncio.run(collect()), key=lambda c: (c.prompt_index, c.sample_index))


def rate(engine: Engine, prompts: list[Prompt], texts: list[str], **options: Any) -> list[Loglikelihood]:
    return asyncio.run(engine.loglikelihood(prompts, texts, **options))


def test_every_sample_of_every_prompt_comes_exactly_once(engine: Engine) -> None:
    done = generate(engine, PROMPTS, n=5)
    assert [(c.prompt_index, c.sample_index) for c in done] == [(p, s) for p in range(3) for s in range(5)]
    assert all(c.finish_reason in ("stop", "length") for c in done)


def test_counts_and_logprobs_fit_together(engine: Engine) -> None:
    for completion in generate(engine, PROMPTS, n=3, seed=1):
        assert completion.completion_tokens > 0
        assert completion.prompt_tokens > 0
        assert 0 <= completion.cached_tokens < completion.prompt_tokens
        assert completion.logprobs is not None
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
    together = {(c.prompt_index, c.sample_index): c.text for c in generate(engine, PROMPTS, n=4, seed=7)}
    for index, alone in enumerate(PROMPTS):
        assert [c.text for c in generate(engine, [alone], n=2, seed=7)] == [together[index, 0], together[index, 1]]
    turned = generate(engine, PROMPTS[::-1], n=4, seed=7)
    assert {(2 - c.prompt_index, c.sample_index): c.text for c in turned} == together


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
    whole = {(c.prompt_index, c.sample_index): c for c in generate(engine, PROMPTS, n=2, seed=3)}
    seen: list[Partial] = []

    def keep(partial: Partial) -> bool:
        seen.append(partial)
        return partial.prompt_index != 1

    for completion in generate(engine, PROMPTS, n=2, seed=3, keep=keep):
        before = whole[completion.prompt_index, completion.sample_index]
        calls = [p for p in seen if (p.prompt_index, p.sample_index) == (before.prompt_index, before.sample_index)]
        assert len(calls) == len({p.completion_tokens for p in calls})
        assert all(before.text.startswith(p.text) for p in calls)
        assert all(p.completion_tokens <= completion.completion_tokens for p in calls)
        if completion.prompt_index == 1:
            assert calls or before.completion_tokens <= 4
        if completion.prompt_index == 1 and calls:
            assert completion.finish_reason == "pruned"
            assert completion.completion_tokens <= 4
            assert completion.text == calls[-1].text
        else:
            assert (completion.text, completion.finish_reason) == (before.text, before.finish_reason)
            assert len(calls) >= (before.completion_tokens - 1) // 4


def test_leaving_early_stops_the_work_and_the_engine_stays_usable(engine: Engine) -> None:
    async def leave() -> Completion:
        stream = engine.generate(PROMPTS, Sampling(max_tokens=150), 4)
        async for completion in stream:
            await stream.aclose()  # type: ignore[attr-defined]
            return completion
        raise AssertionError("nothing came")

    assert asyncio.run(leave()).finish_reason in ("stop", "length")
    assert len(generate(engine, PROMPTS, n=2)) == 6


def test_calls_at_the_same_time_do_not_disturb_each_other(engine: Engine) -> None:
    async def both() -> list[list[str]]:
        async def one(prompts: list[Prompt]) -> list[str]:
            done = [c async for c in engine.generate(prompts, Sampling(max_tokens=12, seed=5), 2)]
            return [c.text for c in sorted(done, key=lambda c: c.sample_index)]

        return list(await asyncio.gather(*(one([p]) for p in PROMPTS)))

    assert asyncio.run(both()) == [[c.text for c in generate(engine, [p], n=2, seed=5)] for p in PROMPTS]


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_sampled(engine: Engine) -> None:
    assert engine.max_model_len == CONTEXT
    huge = prompt("word " * 3000)
    with pytest.raises(PromptTooLongError, match=r"prompt 1 has .* tokens") as caught:
        generate(engine, [PROMPTS[0], huge, huge])
    assert caught.value.indices == (1, 2)
    assert caught.value.tokens > caught.value.limit
    with pytest.raises(PromptTooLongError):
        rate(engine, [huge], ["x"])


def test_prompt_and_completion_stay_within_the_context(engine: Engine) -> None:
    for completion in generate(engine, PROMPTS, n=2, max_tokens=10_000, seed=1):
        assert completion.prompt_tokens + completion.completion_tokens <= CONTEXT


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_sample_is_refused(engine: Engine, n: int) -> None:
    with pytest.raises(InputError, match="n must be at least 1"):
        generate(engine, PROMPTS, n=n)


def test_an_unknown_option_is_refused(engine: Engine) -> None:
    with pytest.raises(UnknownNameError, match="repetition_penalti"):
        generate(engine, PROMPTS, extra={"repetition_penalti": 1.1})


def test_no_prompts_give_no_completions(engine: Engine) -> None:
    assert generate(engine, []) == []
    assert rate(engine, [], []) == []


def test_the_loglikelihood_of_a_completion_is_the_sum_of_its_logprobs(engine: Engine) -> None:
    compared = 0
    for completion in generate(engine, PROMPTS, n=3, seed=2, max_tokens=20):
        ended = completion.finish_reason == "stop"
        (rated,) = rate(engine, [PROMPTS[completion.prompt_index]], [completion.text], end=ended)
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


def test_closing_twice_is_harmless(tmp_path: Any) -> None:
    async def twice(made: Engine) -> None:
        await made.aclose()
        await made.aclose()

    for name in ("scripted", "torch-llama"):
        asyncio.run(twice(ENGINES[name](tmp_path)))
