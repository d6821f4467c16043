"""The torch engine against transformers itself: same tokens, same numbers, right distribution."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import threading
import weakref
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import model, save, tokenizer

from bon import BestOfN
from bon.engines.base import Completion, Generates, Keep, Partial, Prompt, Rates, Request
from bon.engines.loading import load
from bon.engines.text.watch import KEEP_EVERY
from bon.engines.torch import pack as packing
from bon.engines.torch.decode import MAX_ROWS, Job, Source
from bon.engines.torch.engine import TorchEngine
from bon.engines.torch.pack import PackedLinear
from bon.engines.torch.prefix.shared import SharedRows
from bon.engines.torch.rows import PlainRows, Run
from bon.engines.torch.sampling import Uniforms, choose, row_key
from bon.errors import EngineError, InputError, ModelNotFoundError, PromptTooLongError, UnknownNameError
from bon.task import Message
from bon.types import Drawing, Sampling

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3", "GPTNeoX")
TEXTS = ("Hello", "Write a haiku about the autumn rain, please.", "Dear Anna,\nwhat is 12 + 30? " * 4, "x")


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return TorchEngine(save(tmp_path_factory.mktemp("model"), request.param, "ascii"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return TorchEngine(save(tmp_path_factory.mktemp("llama"), "Llama", "ascii"))


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt.of([Message("user", text)]) for text in texts]


def generate(engine: TorchEngine, asked: list[Prompt], n: int = 1, **sampling: Any) -> list[Completion]:
    return ask(engine, [Request(prompt, Sampling(**sampling), n) for prompt in asked])


def ask(engine: TorchEngine, requests: list[Request], **options: Any) -> list[Completion]:
    async def collect() -> list[Completion]:
        return [c async for c in engine.generate(requests, **options)]

    return sorted(asyncio.run(collect()), key=lambda c: (c.request_index, c.sample_index))


def own_model(engine: TorchEngine) -> Any:
    """The model as transformers itself runs it."""
    return load(engine.name)[0]


def reference(plain: Any, engine: TorchEngine, prompt: Prompt, tokens: int) -> list[int]:
    ids = torch.tensor([engine.renderer.render(prompt)])
    made = plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=sorted(engine.renderer.end_ids),
        pad_token_id=0,
    )
    new: list[int] = made[0, ids.shape[1] :].tolist()
    return new


def plain_logprobs(plain: Any, prompt: tuple[int, ...], ids: list[int]) -> list[float]:
    with torch.inference_mode():
        logits = plain(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    found: list[float] = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
    return found


def test_greedy_output_is_that_of_generate_token_for_token(engine: TorchEngine) -> None:
    asked = prompts(*TEXTS)
    plain = own_model(engine)
    for completion in generate(engine, asked, n=2, temperature=0.0, max_tokens=24):
        expected = reference(plain, engine, asked[completion.request_index], 24)
        ended = expected[-1] in engine.renderer.end_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert completion.text == engine.renderer.decode(expected[: len(expected) - ended])
        prompt = engine.renderer.render(asked[completion.request_index])
        assert completion.logprobs == pytest.approx(plain_logprobs(plain, prompt, expected), abs=1e-4)


def test_logprobs_are_those_of_a_plain_forward_pass(engine: TorchEngine) -> None:
    asked = prompts(*TEXTS)
    plain = own_model(engine)
    compared = 0
    for completion in generate(engine, asked, n=3, seed=3, max_tokens=12, top_k=20, temperature=0.7):
        assert engine.renderer.end_id is not None
        ids = [] if completion.tokens is None else list(completion.tokens.ids)
        ids += [engine.renderer.end_id] * (completion.finish_reason == "stop")
        if completion.completion_tokens == len(ids):  # no special tokens in the middle
            prompt = engine.renderer.render(asked[completion.request_index])
            assert completion.logprobs == pytest.approx(plain_logprobs(plain, prompt, ids), abs=1e-4)
            compared += 1
    assert compared >= 4


def test_loglikelihood_is_that_of_a_plain_forward_pass(engine: TorchEngine) -> None:
    asked, texts = prompts(*TEXTS), ["Dear Anna", "no", "It is 42. " * 5, "?"]
    plain = own_model(engine)
    rated = asyncio.run(engine.loglikelihood(asked, texts))
    for prompt, text, found in zip(asked, texts, rated, strict=True):
        context, target = engine.renderer.render(prompt), [*engine.renderer.encode(text), engine.renderer.end_id]
        assert found.total == pytest.approx(sum(plain_logprobs(plain, context, target)), abs=1e-4 * len(target))
        assert found.tokens == len(target)


def test_permuted_prompts_give_permuted_completions(engine: TorchEngine) -> None:
    asked = prompts(*TEXTS)
    straight = generate(engine, asked, n=3, seed=9, max_tokens=10)
    turned = generate(engine, asked[::-1], n=3, seed=9, max_tokens=10)
    assert {(len(asked) - 1 - c.request_index, c.sample_index, c.text) for c in turned} == {
        (c.request_index, c.sample_index, c.text) for c in straight
    }


def test_changing_one_prompt_changes_no_other(engine: TorchEngine) -> None:
    first = generate(engine, prompts(*TEXTS), n=2, seed=9, max_tokens=10)
    changed = generate(
        engine, prompts(TEXTS[0], "Something else, and longer than before!", *TEXTS[2:]), n=2, seed=9, max_tokens=10
    )
    for before, after in zip(first, changed, strict=True):
        assert (before.text == after.text) == (before.request_index != 1)


def test_splitting_the_work_changes_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, "Llama", "ascii")
    whole = generate(TorchEngine(folder), prompts(*TEXTS), n=5, seed=4, max_tokens=10)
    split = generate(TorchEngine(folder, max_batch_tokens=200), prompts(*TEXTS), n=5, seed=4, max_tokens=10)
    assert [c.text for c in split] == [c.text for c in whole]


def test_short_completions_take_the_places_of_others_beside_a_long_one(tmp_path: Path) -> None:
    """They ran after it: a batch began only when the longest row of the one before it had ended."""
    folder = save(tmp_path, "Llama", "ascii")
    asked = prompts("a", *(f"{i} bottles" for i in range(12)))
    requests = [Request(asked[0], Sampling(temperature=1.0, seed=3, max_tokens=60))]
    requests += [Request(prompt, Sampling(temperature=1.0, seed=3, max_tokens=5), 2) for prompt in asked[1:]]
    engine = TorchEngine(folder, max_batch_tokens=600)  # seven rows of 60 and their prompts
    found = ask(engine, requests)
    longest = max(c.completion_tokens for c in found)
    assert longest > 20  # the model ends a text when it likes
    assert engine.stats.steps < longest + 10
    assert engine.stats.decoded == sum(c.completion_tokens - 1 for c in found)
    alone = [c for i, request in enumerate(requests) for c in ask(TorchEngine(folder), [request])]
    assert [c.text for c in found] == [c.text for c in alone]
    assert [c.logprobs for c in found] == [pytest.approx(c.logprobs, abs=1e-4) for c in alone]


def test_equal_prompts_without_a_seed_get_their_own_samples(llama: TorchEngine) -> None:
    done = generate(llama, prompts("Hello", "Hello"), n=2, max_tokens=12)
    assert len({c.text for c in done}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_what_the_layer_computes(rows: int, bias: bool, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU multiplies no bfloat16")
    torch.manual_seed(rows)
    layer = torch.nn.Linear(24, 60, bias=bias, dtype=dtype)
    inputs = torch.randn(2, rows, 24, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(layer)(inputs), layer(inputs))


def test_packing_a_model_changes_no_logits_and_keeps_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_LEAST", 1)
    made, ids = model("Qwen3", tokenizer("ascii")), torch.arange(12).view(2, 6)
    layer = weakref.ref(made.model.layers[0].mlp.up_proj.weight)
    with torch.inference_mode():
        before = made(ids).logits
        packing.pack(made)
        torch.testing.assert_close(made(ids).logits, before)
    gc.collect()
    assert layer() is None
    assert isinstance(made.lm_head, PackedLinear)
    assert made.get_input_embeddings().weight.shape == (98, 32)


# --- requests ------------------------------------------------------------------------------------------------------


def test_the_engine_generates_and_rates_one_call_at_a_time(llama: TorchEngine) -> None:
    assert isinstance(llama, Generates)
    assert isinstance(llama, Rates)
    assert not llama.concurrent


def with_defaults(folder: Path, **said: Any) -> TorchEngine:
    """A model whose generation_config.json says how it is to be sampled."""
    save(folder, "Llama", "ascii")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    return TorchEngine(folder)


def test_a_model_is_sampled_as_it_says_itself_where_nobody_says_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "bon"):
        engine = with_defaults(tmp_path, do_sample=True, temperature=0.3, top_k=7, repetition_penalty=1.1)
    told = [record.getMessage() for record in caplog.records if "generation_config" in record.getMessage()]
    assert told == [
        f"{tmp_path} is sampled as its generation_config.json says, unless you say otherwise: temperature=0.3, top_k=7"
    ]
    assert "engine does not apply its repetition_penalty=1.1" in caplog.text

    def texts(**said: Any) -> list[str]:
        return [c.text for c in generate(engine, prompts("Hello"), 6, seed=1, max_tokens=20, **said)]

    assert texts() == texts(temperature=0.3, top_k=7)
    assert texts(temperature=1.0) == texts(temperature=1.0, top_k=7)
    assert texts(top_k=0) == texts(temperature=0.3, top_k=0)
    assert len({*texts(temperature=0.0)}) == 1


@pytest.mark.parametrize("greedy", [{"do_sample": False}, {"temperature": 0.0}, {"temperature": 1e-6}])
def test_candidates_differ_although_a_model_would_rather_be_greedy(tmp_path: Path, greedy: dict[str, Any]) -> None:
    done = generate(with_defaults(tmp_path, **greedy), prompts("Hello"), 6, seed=1, max_tokens=20)
    assert len({completion.text for completion in done}) > 1


def test_a_call_may_hold_requests_of_different_sampling(llama: TorchEngine) -> None:
    kinds = [
        Sampling(temperature=0.0, max_tokens=9),
        Sampling(seed=1, max_tokens=12),
        Sampling(seed=1, max_tokens=5, stop=("a", "e", "i", "o", "u")),
        Sampling(seed=2, temperature=0.5, top_k=5, max_tokens=7),
        Sampling(temperature=0.0, max_tokens=20),
    ]
    requests = [Request(prompt, kind, n=2) for kind, prompt in zip(kinds, prompts(*TEXTS, "y"), strict=True)]
    together = ask(llama, requests)
    alone = [c for i, request in enumerate(requests) for c in ask(llama, [request])]
    assert [(c.text, c.finish_reason) for c in together] == [(c.text, c.finish_reason) for c in alone]
    assert [c.request_index for c in together] == [i for i in range(5) for _ in range(2)]


def test_a_sample_under_a_seed_is_the_same_however_the_samples_are_divided(llama: TorchEngine) -> None:
    """A second round of sampling with the same seed used to repeat the first."""
    prompt, sampling = prompts("Hello")[0], Sampling(seed=3, max_tokens=12)
    whole = {c.sample_index: c.text for c in ask(llama, [Request(prompt, sampling, n=8)])}
    rounds = [
        Request(prompt, sampling, 3),
        Request(prompt, sampling, 4, first_sample=3),
        Request(prompt, sampling, 1, 7),
    ]
    for calls in ([rounds], [[request] for request in rounds]):
        divided = {c.sample_index: c.text for requests in calls for c in ask(llama, requests)}
        assert divided == whole
    assert len(set(whole.values())) > 1


def test_a_prompt_that_is_too_long_fails_by_itself(llama: TorchEngine) -> None:
    long, sampling = prompts("x" * 600)[0], Sampling(max_tokens=4, seed=0)
    done = ask(llama, [Request(prompts("Hello")[0], sampling), Request(long, sampling, 2, first_sample=5)])
    assert [(c.request_index, c.sample_index, c.finish_reason) for c in done[1:]] == [(1, 5, "error"), (1, 6, "error")]
    assert done[0].completion_tokens == 4
    assert all(isinstance(c.error, PromptTooLongError) and "prompt 1 has" in str(c.error) for c in done[1:])
    good, bad = asyncio.run(llama.loglikelihood([prompts("Hello")[0], long], ["yes", "no"]))
    assert good.error is None
    assert good.tokens == 4
    assert isinstance(bad.error, PromptTooLongError)


def test_the_first_completion_of_a_request_to_end_carries_its_prompt(llama: TorchEngine) -> None:
    requests = [Request(p, Sampling(seed=0, max_tokens=10), n=3) for p in prompts("Hello", "Hello there")]
    before = llama.stats.computed
    done = ask(llama, requests)
    for index, request in enumerate(requests):
        carried = [c.prompt_tokens for c in done if c.request_index == index]
        assert sorted(carried)[:2] == [0, 0]
        assert sum(carried) == len(llama.renderer.render(request.prompt))
    assert sum(c.prompt_tokens - c.cached_tokens for c in done) == llama.stats.computed - before


def test_bad_options_are_refused_by_the_call_itself(llama: TorchEngine) -> None:
    with pytest.raises(UnknownNameError, match="sampling option of the torch engine 'best_of'"):
        llama.generate([Request(prompts("Hello")[0], Sampling(extra={"best_of": 2}))])
    with pytest.raises(InputError, match="there are 1 prompts and 2 continuations"):
        asyncio.run(llama.loglikelihood(prompts("Hello"), ["a", "b"]))


def test_keep_is_called_in_the_event_loop_and_aborts(llama: TorchEngine) -> None:
    """``keep`` ran in the worker thread, and read what the event loop was changing."""
    threads, asked = set(), []

    def keep(partial: Partial) -> bool:
        threads.add(threading.get_ident())
        asked.append((partial.request_index, partial.sample_index, partial.completion_tokens))
        return partial.sample_index != 1

    request = Request(prompts("Hello")[0], Sampling(temperature=0.0, max_tokens=10), n=2)
    kept, dropped = ask(llama, [request], keep=keep)
    assert threads == {threading.get_ident()}
    assert (dropped.finish_reason, dropped.completion_tokens) == ("abort", KEEP_EVERY)
    assert kept.text.startswith(dropped.text)
    assert kept.completion_tokens == 10
    assert asked == [(0, 0, 4), (0, 1, 4), (0, 0, 8)]


# --- the distribution ----------------------------------------------------------------------------------------------


def draws(logits: torch.Tensor, count: int, **sampling: Any) -> Counter[int]:
    keys = np.stack([row_key(0, (1, 2, 3), i) for i in range(count)])
    uniforms = torch.from_numpy(Uniforms(keys).next())
    tokens, _ = choose(logits.expand(count, -1), Drawing(**sampling), uniforms)
    return Counter(tokens.tolist())


def chi_square(counts: Counter[int], probabilities: torch.Tensor) -> float:
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probabilities.tolist()) if p > 0)


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-9, 1e-5])
@pytest.mark.parametrize("filters", [{}, {"min_p": 0.1}, {"top_k": 3}, {"top_p": 0.5}])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature: float, filters: dict[str, Any]) -> None:
    """Divided by 1e-300 all logits were infinite, the draw an index out of range, and a server not ready any more."""
    logits = torch.tensor([[9.0, -80.0, 3.0, 8.5], [-5.0, 0.0, 55.0, -1e4]])
    tokens, logprobs = choose(logits, Drawing(temperature, **filters), torch.tensor([0.999, 0.0]))
    assert tokens.tolist() == [0, 2]
    assert logprobs.tolist() == pytest.approx(logits.log_softmax(-1)[[0, 1], [0, 2]].tolist())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    counts = draws(logits, 20_000, temperature=temperature)
    assert chi_square(counts, (logits[0] / temperature).softmax(-1)) < 43.8  # 0.1% of chi-square with 19 degrees


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.39}, [0]),
        ({"min_p": 0.3}, [0, 1, 2]),
        ({"min_p": 0.3, "top_p": 0.7}, [0, 1]),
        ({"top_k": 4, "top_p": 0.79}, [0, 1, 2]),
        ({"top_k": 2, "min_p": 0.1, "top_p": 0.99}, [0, 1]),
    ],
)
@pytest.mark.parametrize("vocabulary", [6, 3000])
def test_filters_keep_the_right_tokens_in_the_right_proportion(
    sampling: dict[str, Any], kept: list[int], vocabulary: int
) -> None:
    probabilities = torch.zeros(vocabulary)
    probabilities[:6] = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    shuffle = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))
    counts = draws((probabilities.log())[shuffle].unsqueeze(0), 20_000, **sampling)
    found = Counter({int(shuffle[i]): c for i, c in counts.items()})
    assert sorted(found) == kept
    assert chi_square(found, probabilities[kept] / probabilities[kept].sum()) < 13.8


def test_a_nucleus_wider_than_the_likeliest_thousand_is_not_cut() -> None:
    counts = draws(torch.zeros(1, 5000), 20_000, top_p=0.9)
    assert 4300 < len(counts) <= 4500


def test_draws_do_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0))
    logits[3:] *= 10  # peaked rows and flat rows take different paths through the nucleus
    uniforms = torch.rand(8, generator=torch.Generator().manual_seed(1))
    for drawing in (Drawing(), Drawing(top_p=0.9), Drawing(top_k=50, top_p=0.9), Drawing(min_p=0.05)):
        together, _ = choose(logits, drawing, uniforms)
        for row in range(8):
            alone, _ = choose(logits[row : row + 1], drawing, uniforms[row : row + 1])
            assert int(alone) == int(together[row])


def test_a_draw_never_lands_on_a_token_without_probability() -> None:
    logits = torch.full((2, 50), -math.inf)
    logits[:, 7] = 0.0
    for uniform in (0.0, 1.0 - 2**-53):
        tokens, logprobs = choose(logits, Drawing(), torch.tensor([uniform, uniform], dtype=torch.float64))
        assert tokens.tolist() == [7, 7]
        assert logprobs.tolist() == [0.0, 0.0]


def test_uniform_numbers_belong_to_seed_prompt_and_sample() -> None:
    keys = np.stack([row_key(1, (5, 6), 0), row_key(1, (5, 6), 1), row_key(2, (5, 6), 0), row_key(1, (5, 7), 0)])
    numbers = Uniforms(keys)
    table = np.stack([numbers.next() for _ in range(150)])
    assert len(np.unique(table)) == table.size
    alone = Uniforms(keys[2:3])
    assert [float(alone.next()[0]) for _ in range(150)] == table[:, 2].tolist()


# --- batches -------------------------------------------------------------------------------------------------------


def cost(prompts: int, rows: int, longest: int, new: int) -> int:
    return rows * (longest + new)


def source(jobs: list[Job]) -> Source:
    return Source(deque(jobs), lambda jobs: PlainRows(Run(None)), cost, lambda completion: None)


def test_batches_hold_the_budget_and_lose_nothing() -> None:
    jobs = [Job(i, tuple(range(length)), range(8), 30) for i, length in enumerate([5, 5, 9, 40, 40, 300, 900])]
    jobs.append(Job(7, (1, 2), range(3 * MAX_ROWS), 5))
    seen, waiting = [], source(jobs)
    while waiting.jobs:
        batch = waiting.take([], 0, 1000)
        rows = sum(len(j.samples) for j in batch)
        assert 0 < rows <= MAX_ROWS
        if rows > 1:
            assert cost(len(batch), rows, max(len(j.ids) for j in batch), max(j.limit for j in batch)) <= 1000
        seen += [(j.index, s) for j in batch for s in j.samples]
    assert seen == [(j.index, s) for j in jobs for s in j.samples]


def test_jobs_join_where_they_fit_whole() -> None:
    jobs = [Job(0, (1, 2, 3), range(10), 5), Job(1, (1, 2, 3), range(9), 5), Job(2, (1,) * 8, range(2), 5)]
    waiting = source(jobs)

    def take(left: int) -> list[tuple[int, range]]:
        going = [replace(jobs[0], samples=range(left))] if left else []
        return [(job.index, job.samples) for job in waiting.take(going, left, 100)]

    assert take(0) == [(0, range(10))]
    assert take(4) == []  # 13 rows of 8 tokens are too many
    assert take(3) == [(1, range(9))]
    assert take(7) == []  # 9 rows of 8 + 5
    assert take(5) == [(2, range(2))]
    assert not waiting.jobs


# --- calls side by side --------------------------------------------------------------------------------------------


async def listen(stream: Any) -> list[Completion]:
    return [completion async for completion in stream]


def texts(found: list[Completion]) -> set[tuple[int, int, str]]:
    return {(c.request_index, c.sample_index, c.text) for c in found}


def long_and_short(n: int = 2) -> tuple[list[Request], list[list[Request]]]:
    """A call that takes a while, and others that come meanwhile, all drawing in the same way."""
    first, *others = prompts("a", "b", "c", "d")
    own = [Request(first, Sampling(temperature=1.0, seed=3, max_tokens=300), 4)]
    return own, [[Request(prompt, Sampling(temperature=1.0, seed=3, max_tokens=6), n)] for prompt in others]


def test_calls_that_draw_alike_join_the_one_under_way(tmp_path: Path) -> None:
    """Each waited for the end of those before it, so that eight clients of a server took turns."""
    folder = save(tmp_path, "Llama", "ascii")
    own, others = long_and_short()
    alone = [texts(ask(TorchEngine(folder), requests)) for requests in (own, *others)]
    engine, ended = TorchEngine(folder), []

    async def one(name: int, requests: list[Request]) -> list[Completion]:
        found = await listen(engine.generate(requests))
        ended.append(name)
        return found

    async def run() -> list[list[Completion]]:
        return await asyncio.gather(*(one(i, requests) for i, requests in enumerate((own, *others))))

    found = asyncio.run(run())
    assert [texts(each) for each in found] == alone
    longest = max(c.completion_tokens for c in found[0])
    assert longest > 20
    assert engine.stats.steps < longest + 6
    assert ended[-1] == 0  # nobody waited for the first call


def test_a_call_that_waits_for_something_else_is_not_overtaken_for_ever(llama: TorchEngine) -> None:
    """Calls that join must not keep one behind which they came from its turn."""
    own, others = long_and_short()
    order: list[str] = []

    async def one(name: str, waited: Any) -> None:
        await waited
        order.append(name)

    async def run() -> None:
        rated = llama.loglikelihood(prompts("e"), ["an answer"])
        async with asyncio.TaskGroup() as tasks:
            for name, waited in (
                ("own", listen(llama.generate(own))),
                ("rated", rated),
                ("later", listen(llama.generate(others[0]))),
            ):
                tasks.create_task(one(name, waited))
                await asyncio.sleep(0)

    asyncio.run(run())
    assert order == ["own", "rated", "later"]


def test_a_call_that_stops_leaves_those_it_ran_with(tmp_path: Path) -> None:
    """Be it the first, whose thread runs all of them, or one that joined; and one whose ``keep`` fails."""
    folder = save(tmp_path, "Llama", "ascii")
    own, others = long_and_short()
    alone = [texts(ask(TorchEngine(folder), requests)) for requests in others]
    engine = TorchEngine(folder)

    def broken(partial: Any) -> bool:
        raise ValueError("of the caller's own")

    async def closed() -> None:
        stream = engine.generate([replace(own[0], n=8)])
        async for _ in stream:
            break
        await stream.aclose()

    async def run(requests: list[Request]) -> list[Any]:
        failing = engine.generate([replace(own[0], prompt=prompts("z")[0])], keep=broken)
        calls = (closed(), listen(failing), *(listen(engine.generate(other)) for other in others))
        return await asyncio.gather(*calls, return_exceptions=True)

    for _ in range(2):
        _, failed, *found = asyncio.run(run(own))
        assert isinstance(failed, ValueError)
        assert [texts(each) for each in found] == alone


def test_what_ends_a_batch_ends_all_calls_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(save(tmp_path, "Llama", "ascii"))
    own, others = long_and_short()
    step = SharedRows.step

    def broken(rows: SharedRows, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return step(rows, tokens)

    monkeypatch.setattr(SharedRows, "step", broken)

    async def run() -> list[Any]:
        calls = (listen(engine.generate(requests)) for requests in (own, others[0]))
        return await asyncio.gather(*calls, return_exceptions=True)

    for error in asyncio.run(run()):
        assert isinstance(error, EngineError)
        assert "ran out of memory" in str(error)


def test_a_call_whose_prompts_are_too_long_ends_beside_one_under_way(llama: TorchEngine) -> None:
    own, others = long_and_short()
    assert llama.max_model_len is not None
    long = [Request(prompts("x" * llama.max_model_len)[0], others[0][0].sampling)]

    async def run() -> list[list[Completion]]:
        return await asyncio.gather(*(listen(llama.generate(requests)) for requests in (own, long, others[0])))

    first, failed, other = asyncio.run(run())
    assert isinstance(failed[0].error, PromptTooLongError)
    assert (len(first), len(failed), len(other)) == (4, 1, 2)


# --- loading and failing -------------------------------------------------------------------------------------------


def test_an_unknown_engine_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'max_batch_tokens'"):
        TorchEngine("anything", max_batch_token=1)


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/model", Path("nowhere")])
def test_a_folder_that_does_not_exist_is_named(path: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no model folder at"):
        TorchEngine(path)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises((ModelNotFoundError, InputError), match=str(tmp_path)):
        TorchEngine(tmp_path)


def test_a_name_that_cannot_be_fetched_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match=r"HF_HUB_OFFLINE forbids fetching it.*hf download nobody/nothing"):
        TorchEngine("nobody/nothing")


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="encoder-decoder"):
        TorchEngine(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "there is no device 'abacus'"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be"),
        ({"max_model_len": 10_000}, "the model's own limit is 512"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TorchEngine(save(tmp_path, "Llama", "ascii"), **options)


def test_running_out_of_memory_says_what_to_lower(llama: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(llama._model, "forward", forward)
    with pytest.raises(EngineError, match="Lower max_batch_tokens"):
        generate(llama, prompts("Hello"))


def test_an_error_in_keep_reaches_the_caller_and_the_engine_survives(llama: TorchEngine) -> None:
    async def ask() -> None:
        async for _ in llama.generate(
            [Request(prompts("Hello")[0], Sampling(temperature=0))], keep=lambda partial: 1 / 0 > 1
        ):
            pass

    with pytest.raises(ZeroDivisionError):
        asyncio.run(ask())
    assert generate(llama, prompts("Hello"), max_tokens=3)


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    engine = TorchEngine(save(tmp_path, "Llama", "ascii"))
    asyncio.run(engine.aclose())
    with pytest.raises(EngineError, match="is closed"):
        generate(engine, prompts("Hello"))


def test_the_embedded_model_is_called_by_its_name_once_it_is_closed() -> None:
    """The message had the path of its weights within the installed package."""
    bon = BestOfN(n=1)
    bon.close()
    with pytest.raises(EngineError, match="the engine 'mini' is closed"):
        bon("Write a slogan for a bakery.")


def test_closing_an_engine_frees_its_weights(tmp_path: Path) -> None:
    """Another object still held the model, so its memory was gone until the process ended."""
    engine = TorchEngine(save(tmp_path, "Llama", "ascii"))
    generate(engine, prompts("Hello", "Hello"), max_tokens=3)
    weights = [weakref.ref(weight) for weight in engine._model.parameters()]
    asyncio.run(engine.aclose())
    gc.collect()
    assert not any(weight() is not None for weight in weights)


async def use(engine: TorchEngine, times: int, keep: Keep) -> list[list[str]]:
    """Calls one after the other, some of which are broken off; the texts of those that were not."""
    texts = []
    for i in range(times):
        requests = [Request(p, Sampling(seed=1, max_tokens=6)) for p in prompts(*TEXTS)]
        stream = engine.generate(requests, keep=keep if i % 3 else None)
        if i % 3 == 2:
            await anext(stream)
            await stream.aclose()
        else:
            done = [c async for c in stream]
            texts.append([c.text for c in sorted(done, key=lambda c: c.request_index)])
        await engine.loglikelihood(prompts("a"), ["b"])
    return texts


def test_event_loops_in_several_threads_share_an_engine(llama: TorchEngine) -> None:
    """``keep`` reads what the event loop changes, and closed calls met in a set that two threads change."""
    right = [c.text for c in generate(llama, prompts(*TEXTS), seed=1, max_tokens=6)]

    def one_loop(_: int) -> list[list[list[str]]]:
        seen: dict[int, int] = {}

        def keep(partial: Partial) -> bool:
            return sum(seen.values()) >= 0

        async def change() -> None:
            while True:
                seen.clear() if len(seen) > 100 else seen.update({len(seen): 1})
                await asyncio.sleep(0.0001)

        async def main() -> list[list[list[str]]]:
            changing = asyncio.create_task(change())
            try:
                return await asyncio.gather(*(use(llama, 3, keep) for _ in range(3)))
            finally:
                changing.cancel()

        return asyncio.run(main())

    with ThreadPoolExecutor(2) as threads:
        for users in threads.map(one_loop, range(2)):
            assert users == [[right] * 2] * 3


def test_closing_an_engine_ends_its_calls_and_refuses_new_ones(tmp_path: Path) -> None:
    engine = TorchEngine(save(tmp_path, "Llama", "ascii"))

    async def close_under_way() -> list[Any]:
        users = [asyncio.create_task(use(engine, 50, lambda partial: True)) for _ in range(4)]
        await asyncio.sleep(0.2)
        await engine.aclose()
        return await asyncio.gather(*users, return_exceptions=True)

    assert all(isinstance(e, EngineError) and "closed" in str(e) for e in asyncio.run(close_under_way()))


def test_models_in_tests_are_random_but_fixed() -> None:
    first, second = (model("Llama", tokenizer("ascii")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
