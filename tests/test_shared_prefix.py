"""Shared prefixes: what is computed once is exactly what transformers computes for every row."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import model, save, tokenizer

from bon.engines.base import Completion, Prompt, Request, Turn
from bon.engines.loading import load
from bon.engines.torch import paths
from bon.engines.torch.engine import TorchEngine
from bon.engines.torch.prefix import attention as prefix_attention
from bon.engines.torch.prefix.attention import NAME, NotServedError, Step, merge, part
from bon.engines.torch.prefix.shared import Preamble, SharedRows, Store
from bon.engines.torch.prefix.tree import MIN_SHARED, arrange, common, pieces, preamble, tree
from bon.engines.torch.rows import PlainRows, Rows, Run, Stats, token_logprobs
from bon.engines.torch.worker import StoppedError
from bon.errors import EngineError
from bon.mini import WEIGHTS
from bon.types import Sampling

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3", "GPTNeoX", "Phi3")
VOCABULARY = 98

# --- the tree ------------------------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 3), min_size=0, max_size=40).map(tuple)


@st.composite
def families(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Prompts that share a preamble, some of them a context, with tails of their own."""
    root, contexts = draw(ids), draw(st.lists(ids, min_size=1, max_size=3))
    tails = draw(st.lists(st.tuples(st.integers(0, len(contexts) - 1), ids), min_size=1, max_size=8))
    return [(*root, *contexts[at], *tail, 1, 2) for at, tail in tails]


@given(first=ids, second=ids)
def test_common_counts_the_equal_start(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    count = common(first, second)
    assert first[:count] == second[:count]
    assert count in (len(first), len(second)) or first[count] != second[count]


@given(prompts=families(), data=st.data())
def test_a_tree_holds_every_prompt_and_shares_none_of_the_wanted_tokens(
    prompts: list[tuple[int, ...]], data: st.DataObject
) -> None:
    prompts = [prompts[i] for i in arrange(prompts)]
    root = preamble(prompts)
    wanted = [data.draw(st.integers(1, len(p) - len(root) - 1)) for p in prompts]
    levels, saved = tree(prompts, len(root), wanted)
    assert len(levels[-1]) == len(prompts)
    for prompt, leaf, count in zip(prompts, levels[-1], wanted, strict=True):
        above = levels[0][leaf.parent].ids if len(levels) == 2 else ()
        assert (*root, *above, *leaf.ids) == prompt
        assert leaf.start == len(root) + len(above)
        assert len(leaf.ids) >= count
        assert len(levels) == 1 or above
    total = sum(len(p) - len(root) for p in prompts)
    assert total - sum(saved) == sum(len(node.ids) for level in levels for node in level)
    if len(levels) == 2:
        assert [node.parent for node in levels[1]] == sorted(node.parent for node in levels[1])


def test_prompts_with_a_context_in_common_stand_side_by_side_and_short_ones_first() -> None:
    root, one, other = ((n,) * (MIN_SHARED + 4) for n in (1, 2, 3))
    prompts = [(*root, *one, 5, 6, 7), (*root, *other, 5), (*root, *one, 5), (*root, *other, 6, 6), (*root, 9, 9)]
    assert arrange(prompts) == [4, 1, 3, 2, 0]
    assert preamble(prompts) == root


def test_a_short_common_start_is_not_worth_a_level() -> None:
    assert preamble([(1, 2, 3, 4), (1, 2, 3, 5, 6)]) == ()
    assert preamble([tuple(range(50))]) == ()


@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=12),
    tokens=st.integers(1, 30),
    logits=st.integers(1, 30),
)
def test_passes_read_every_token_once_and_hold_their_limits(
    rows: list[tuple[int, int]], tokens: int, logits: int
) -> None:
    lengths, wanted = [length for length, _ in rows], [min(rows_) for rows_ in rows]
    read: list[tuple[int, int]] = []
    for piece in pieces(lengths, wanted, tokens, logits):
        single = piece.last == piece.first + 1
        spans = [(piece.start, piece.stop) if single else (0, lengths[row]) for row in range(piece.first, piece.last)]
        here = [(row, at) for row, span in enumerate(spans, piece.first) for at in range(*span)]
        assert 0 < len(here) == piece.stop - piece.start <= tokens
        assert sum(at >= lengths[row] - wanted[row] for row, at in here) <= logits
        read += here
    assert read == [(row, at) for row, length in enumerate(lengths) for at in range(length)]


# --- parts of a softmax --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("sizes", [(3, 5), (700, 40, 3), (1,)])
def test_merged_parts_are_the_softmax_over_all_keys(sizes: tuple[int, ...], softcap: float) -> None:
    make = torch.Generator().manual_seed(0)
    query, *rest = (torch.randn(2, 3, n, 16, generator=make) for n in (7, *sizes, *sizes))
    keys, values = rest[: len(sizes)], rest[len(sizes) :]
    scores = query @ torch.cat(keys, 2).transpose(2, 3)
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    expected = scores.softmax(-1) @ torch.cat(values, 2)
    merged = merge([part(query, k, v, softcap=softcap) for k, v in zip(keys, values, strict=True)])
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


def test_scores_are_made_a_block_of_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 30, 16, generator=make) for _ in range(3))
    for causal in (False, True):
        monkeypatch.setattr(prefix_attention, "_SCORES", 1 << 26)
        whole = part(query, key, value, causal=causal, softcap=9.0)
        monkeypatch.setattr(prefix_attention, "_SCORES", 2 * 3 * 30 * 7)
        for a, b in zip(part(query, key, value, causal=causal, softcap=9.0), whole, strict=True):
            torch.testing.assert_close(a, b)


def test_causal_and_padded_parts_hide_what_they_must() -> None:
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 90, 16, generator=make) for _ in range(3))
    fused, _ = part(query, key, value, causal=True)
    explicit, _ = part(query, key, value, causal=True, softcap=1e6)  # a cap takes the path without the fused kernel
    torch.testing.assert_close(fused, explicit, atol=1e-4, rtol=1e-4)
    bias = torch.zeros(2, 1, 1, 90)
    bias[1, ..., 50:] = -torch.inf
    padded, _ = part(query, key, value, bias=bias)
    torch.testing.assert_close(padded[1:], part(query[1:], key[1:, :, :50], value[1:, :, :50])[0], atol=1e-5, rtol=1e-5)


# --- rows ----------------------------------------------------------------------------------------------------------


SMALL = {"tokens": 11, "logits": 3}  # of one pass: every row comes in several


@cache
def small(family: str) -> Any:
    return model(family, tokenizer("ascii"))


def made_up(seed: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Prompts with a common preamble, with and without contexts in common, and copies of each."""
    random = np.random.default_rng(seed)
    root, *contexts = (random.integers(0, VOCABULARY, n).tolist() for n in (20, 18, 30))
    prompts = [
        (*root, *(contexts[i % 3] if i % 3 < 2 else []), *random.integers(0, VOCABULARY, 3 + 5 * (i % 4)).tolist())
        for i in range(7)
    ]
    prompts = [prompts[i] for i in arrange(prompts)]
    return prompts, [1] * 7 if seed % 2 else random.integers(1, 4, 7).tolist()


def run(rows: Rows, prompts: list[tuple[int, ...]], copies: list[int], seed: int) -> list[torch.Tensor]:
    """Logits of a few steps in which rows leave; in the rows' first order, whatever order they are kept in."""
    random = np.random.default_rng(seed)
    who = np.arange(sum(copies))
    outputs = [rows.prefill(prompts, copies)]
    for step in range(40):  # longer than one chunk of a row's own storage
        outputs.append(rows.step(torch.tensor([(7 * int(i) + step) % VOCABULARY for i in who])))
        outputs[-1] = outputs[-1][torch.from_numpy(np.argsort(who))]
        leaving = set(random.choice(sorted(who.tolist()), 2).tolist()) if step % 5 == 1 and len(who) > 4 else set()
        if leaving:
            who = who[rows.select(np.array([int(i) not in leaving for i in who]))]
    return outputs


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_plain_rows_while_rows_leave(
    family: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed:  # rows of different lengths attend in several parts
        monkeypatch.setattr(prefix_attention, "_SPARED", 1)
    made = small(family)
    prompts, copies = made_up(seed)
    plain = made.config._attn_implementation
    with torch.inference_mode():
        expected = run(PlainRows(Run(made)), prompts, copies, seed)
        parts = run(PlainRows(Run(made, **SMALL)), prompts, copies, seed)
        made.set_attn_implementation(NAME)
        limits = SMALL if seed else {}
        found = run(SharedRows(Run(made, **limits), Preamble(preamble(prompts))), prompts, copies, seed)
        made.set_attn_implementation(plain)
    for a, b, c in zip(expected, found, parts, strict=True):
        torch.testing.assert_close(b.log_softmax(-1), a.log_softmax(-1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(c.log_softmax(-1), a.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_rows_attend_to_no_more_padding_than_those_of_about_their_length_need(monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = small("Llama"), []
    prompts = [tuple(range(length)) for length in (4, 5, 20, 21, 60, 61, 90, 91)]
    of_rows = Step._of_rows

    def counted(*given: Any) -> torch.Tensor:
        first, last, columns = given[-3:]
        read.append((last - first) * columns)
        return of_rows(*given)

    monkeypatch.setattr(Step, "_of_rows", counted)
    made.set_attn_implementation(NAME)
    for spared in (1 << 40, 1):
        monkeypatch.setattr(prefix_attention, "_SPARED", spared)
        rows = SharedRows(Run(made), Preamble(()))
        with torch.inference_mode():
            rows.prefill([ids[::-1] for ids in prompts], [1] * 8)
            rows.step(torch.arange(8))
    made.set_attn_implementation("sdpa")
    whole, layers = 8 * 92, made.config.num_hidden_layers
    assert read == [whole] * layers + [2 * (length + 2) for length in (4, 20, 60, 90)] * layers


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_a_running_batch_get_the_logits_they_get_alone(
    family: str, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come with prefixes in common or without any, beside rows that are longer, and after others have left."""
    if not copied:
        monkeypatch.setattr(prefix_attention, "_SPARED", 1)
    made = small(family)
    prompts, _ = made_up(0)
    copies = [1 + copied * (i % 3) for i in range(len(prompts))]
    root = Preamble(preamble(prompts))
    plain = made.config._attn_implementation
    random = np.random.default_rng(0)
    made.set_attn_implementation(NAME)
    rows = SharedRows(Run(made), root)
    groups = [range(4), range(4, 6), range(6, 7)]  # the prompts that begin, and those that join then
    behind: list[list[int]] = []  # each row's tokens
    logits = torch.zeros(0, VOCABULARY)
    with torch.inference_mode():
        for joining in groups:
            mine, counts = [prompts[i] for i in joining], [copies[i] for i in joining]
            others = SharedRows(Run(made), Preamble(()) if joining == groups[2] else root)
            others.prefill(mine, counts)
            rows.join(others)
            behind += [list(ids) for ids, count in zip(mine, counts, strict=True) for _ in range(count)]
            for step in range(12):
                tokens = random.integers(0, VOCABULARY, len(behind))
                for ids, token in zip(behind, tokens, strict=True):
                    ids.append(int(token))
                logits = rows.step(torch.from_numpy(tokens))
                if step == 5 and len(behind) > 3:
                    alive = np.arange(len(behind)) % 3 != 1
                    order = rows.select(alive)
                    behind, logits = [behind[i] for i in order], logits[torch.from_numpy(order)]
        made.set_attn_implementation(plain)
        expected = torch.cat([made(torch.tensor([ids])).logits[:, -1] for ids in behind])
    torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_serves_rows_with_and_without_a_common_prefix(family: str, alone: bool) -> None:
    """Rows of different lengths that shared nothing failed: "expected m1 and m2 to have the same dtype"."""
    made = model(family, tokenizer("ascii")).to(torch.bfloat16)
    prompts, copies = made_up(0)
    if alone:
        prompts, copies = [ids[::-1][: 9 + 5 * i] for i, ids in enumerate(prompts)], [1] * 7
    plain = made.config._attn_implementation
    with torch.inference_mode():
        expected = run(PlainRows(Run(made)), prompts, copies, 1)
        made.set_attn_implementation(NAME)
        found = run(SharedRows(Run(made), Preamble(preamble(prompts))), prompts, copies, 1)
        others = SharedRows(Run(made), Preamble(()))
        others.prefill([(1, 2, 3)], [2])
        rows = SharedRows(Run(made), Preamble(preamble(prompts)))
        rows.prefill(prompts, copies)
        rows.join(others)
        joined = rows.step(torch.arange(sum(copies) + 2))[:-2].float()
        made.set_attn_implementation(plain)
        rows = PlainRows(Run(made))
        rows.prefill(prompts, copies)
        apart = joined - rows.step(torch.arange(sum(copies))).float()
    assert float(apart.square().mean().sqrt() / joined.std()) < 0.3
    for a, b in zip(expected, found, strict=True):
        assert float((a.float() - b.float()).square().mean().sqrt() / a.float().std()) < 0.3


def test_prompts_that_were_read_in_different_batches_are_resumed_together() -> None:
    """A round's prompts come from several rounds before it: only those that nobody read are read."""
    made, stats = small("Llama"), Stats()
    prompts, _ = made_up(0)
    plain = made.config._attn_implementation
    made.set_attn_implementation(NAME)
    store, root = Store(10_000), Preamble(preamble(prompts))
    with torch.inference_mode():
        for some in (prompts[:2], prompts[4:6]):
            SharedRows(Run(made, stats), root, store, keep=True).prefill(some, [2] * len(some))
        read = stats.computed
        asked, copies = [prompts[i] for i in (5, 0, 6, 4, 1)], [1, 2, 2, 1, 1]
        rows = SharedRows(Run(made, stats), root, store)
        found = [rows.prefill(asked, copies), rows.step(torch.arange(7))]
        assert stats.computed - read <= len(prompts[6])
        assert rows.cached[:2] == [len(ids) for ids in asked[:2]]
        alone = SharedRows(Run(made), Preamble(()))
        expected = [alone.prefill(asked, copies), alone.step(torch.arange(7))]
    made.set_attn_implementation(plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.log_softmax(-1), b.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ratings_are_those_of_plain_rows(family: str) -> None:
    made = small(family)
    contexts, _ = made_up(0)
    contexts = [*contexts, contexts[-1], contexts[-1]]  # one context three times, with continuations that begin alike
    random = np.random.default_rng(1)
    long = tuple(random.integers(0, VOCABULARY, 30).tolist())
    continuations = [*(tuple(random.integers(0, VOCABULARY, n).tolist()) for n in range(1, 7)), long, long, long[:29]]
    plain = made.config._attn_implementation
    with torch.inference_mode():
        expected = PlainRows(Run(made)).rate(contexts, continuations, token_logprobs)
        parts = PlainRows(Run(made, **SMALL)).rate(contexts, continuations, token_logprobs)
        made.set_attn_implementation(NAME)
        found = SharedRows(Run(made), Preamble(preamble(contexts))).rate(contexts, continuations, token_logprobs)
        shared_parts = SharedRows(Run(made, **SMALL), Preamble(preamble(contexts))).rate(
            contexts, continuations, token_logprobs
        )
        made.set_attn_implementation(plain)
    for other in (found, parts, shared_parts):
        assert other == pytest.approx(expected, abs=1e-4 * 30)


def test_a_context_is_whatever_neighbours_share_that_leaves_less_to_read() -> None:
    """Ten values of each of several answers: all that counted was the question, and each answer was read ten times."""
    question, tail = tuple(range(40)), tuple(range(200, 220))
    answers = [tuple(range(1000 * k, 1000 * k + 30 + k)) for k in range(1, 5)]
    values = [(*question, *answer, *tail, value) for answer in answers for value in (1, 2, 3)]
    (contexts, rest), saved = tree(values, 0, [1] * 12)
    assert [len(node.ids) for node in contexts] == [91, 92, 93, 94]
    assert [node.ids for node in rest] == [(1,), (2,), (3,)] * 4
    assert sum(saved) == sum(map(len, values)) - 12 - 370
    alone = [(*question, *answer, 1) for answer in answers]
    (contexts, rest), _ = tree(alone, 0, [1] * 4)
    assert [node.ids for node in contexts] == [question]
    assert [len(node.ids) for node in rest] == [32, 33, 34, 35]


def test_continuations_of_one_context_are_read_once() -> None:
    """Both labels of a slot are one token: each response was read twice, where a call had several tasks."""
    made, stats = small("Llama"), Stats()
    random = np.random.default_rng(0)
    tasks = [random.integers(0, VOCABULARY, 30).tolist() for _ in range(2)]
    contexts = [(*tasks[i % 2], *random.integers(0, VOCABULARY, 20 + i).tolist()) for i in range(4)]
    asked = [(context, continuation) for context in contexts for continuation in ((1,), (2,), (3,), (1, 2))]
    asked = [asked[i] for i in arrange([(*a, *b[:-1]) for a, b in asked])]
    plain = made.config._attn_implementation
    with torch.inference_mode():
        expected = PlainRows(Run(made)).rate(*zip(*asked, strict=True), token_logprobs)
        made.set_attn_implementation(NAME)
        for limits in ({}, SMALL):
            rows = SharedRows(Run(made, stats, **limits), Preamble(()))
            found = rows.rate(*zip(*asked, strict=True), token_logprobs)
            assert found == pytest.approx(expected, abs=1e-3)
            assert stats.computed <= sum(len(context) for context in contexts) + sum(len(b) for _, b in asked)
            assert stats.computed + stats.cached == sum(len(a) + len(b) - 1 for a, b in asked)
            assert all(some <= len(context) for some, (context, _) in zip(rows.cached, asked, strict=True))
            stats.computed = stats.cached = 0
        made.set_attn_implementation(plain)


@pytest.mark.parametrize("family", ["Mistral", "Gemma3", "Gemma2"])
def test_a_window_slides_over_passes_as_over_one(family: str) -> None:
    made = model(family, tokenizer("ascii"), sliding_window=12)
    prompts, copies = made_up(1)
    with torch.inference_mode():
        expected, found = (run(PlainRows(Run(made, **limits)), prompts, copies, 0) for limits in ({}, SMALL))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b.log_softmax(-1), a.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_a_call_that_is_stopped_ends_before_the_next_pass() -> None:
    """A batch could be read for minutes after its caller had gone."""
    made, passes = small("Llama"), []

    def check() -> None:
        passes.append(1)
        if len(passes) == 3:
            raise StoppedError

    with torch.inference_mode(), pytest.raises(StoppedError):
        PlainRows(Run(made, tokens=16, check=check)).prefill([tuple(range(90))], [1])
    assert len(passes) == 3


@settings(max_examples=25)
@given(prompts=families())
def test_any_family_of_prompts_gets_the_logits_of_plain_rows(prompts: list[tuple[int, ...]]) -> None:
    made = small("Qwen3")
    prompts = [prompts[i] for i in arrange(prompts)]
    plain = made.config._attn_implementation
    with torch.inference_mode():
        expected = PlainRows(Run(made)).prefill(prompts, [1] * len(prompts))
        made.set_attn_implementation(NAME)
        found = SharedRows(Run(made), Preamble(preamble(prompts))).prefill(prompts, [1] * len(prompts))
        made.set_attn_implementation(plain)
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_a_preamble_is_computed_once_for_all_batches_of_a_call() -> None:
    made, stats = small("Llama"), Stats()
    prompts, _ = made_up(1)
    root = Preamble(preamble(prompts))
    plain = made.config._attn_implementation
    made.set_attn_implementation(NAME)
    with torch.inference_mode():
        first, second = SharedRows(Run(made, stats), root), SharedRows(Run(made, stats), root)
        first.prefill(prompts[:3], [1] * 3)
        second.prefill(prompts[3:], [1] * 4)
    made.set_attn_implementation(plain)
    assert stats.computed + stats.cached == sum(map(len, prompts))
    assert first.cached[0] == 0
    assert min(second.cached) >= len(root.ids)


def test_keys_and_values_of_a_prefix_exist_once() -> None:
    made, shared, plain = small("Llama"), Stats(), Stats()
    prompt = tuple(range(64))
    before = made.config._attn_implementation
    with torch.inference_mode():
        PlainRows(Run(made, plain)).prefill([prompt], [32])
        made.set_attn_implementation(NAME)
        SharedRows(Run(made, shared), Preamble(())).prefill([prompt], [32])
        made.set_attn_implementation(before)
    per_token = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert shared.prefix_bytes == 64 * per_token
    assert plain.prefix_bytes == 32 * shared.prefix_bytes
    assert shared.computed == 64


# --- the engine ----------------------------------------------------------------------------------------------------

PREAMBLE = "A language model was given an instruction. Guess the instruction from what it wrote.\n\n"
CONTEXTS = ("It was said before that the weather is fine.\n", "Somebody asked for a list of colours.\n", "")
CANDIDATES = ("red, green, blue", "Dear Anna,\nit rains. Yours, Tom " * 3, "no", "no idea", "It rains again " * 6)


def prompts(*candidates: str) -> list[Prompt]:
    """Inversion prompts: every candidate after each context, all after one preamble."""
    return [
        Prompt((Turn("user", (PREAMBLE, context, f"Response: {candidate}\n", "The instruction was:")),))
        for candidate in candidates
        for context in CONTEXTS
    ]


def generate(
    engine: TorchEngine, asked: list[Prompt], n: int = 1, first: int = 0, *, continued: bool = False, **sampling: Any
) -> list[Completion]:
    async def collect() -> list[Completion]:
        options = Sampling(**{"max_tokens": 16, **sampling})
        requests = [Request(p, options, n, first, continued=continued) for p in asked]
        return [c async for c in engine.generate(requests)]

    return sorted(asyncio.run(collect()), key=lambda c: (c.request_index, c.sample_index))


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = save(tmp_path_factory.mktemp("model"), request.param, "ascii")
    return made


def test_sharing_changes_no_completion_and_no_rating(folder: Path) -> None:
    shared, plain = TorchEngine(folder), TorchEngine(folder, share_prefix=False)
    asked = prompts(*CANDIDATES)
    for sampling in ({"temperature": 0.0}, {"seed": 5}):
        for a, b in zip(generate(shared, asked, 3, **sampling), generate(plain, asked, 3, **sampling), strict=True):
            assert a.text == b.text
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    texts = ["Write about the rain", "x"] * 7 + ["Name colours"]
    both = [asyncio.run(engine.loglikelihood(asked, texts)) for engine in (shared, plain)]
    for a, b in zip(*both, strict=True):
        assert a.total == pytest.approx(b.total, abs=1e-4 * a.tokens)
    assert shared.stats.computed < 0.5 * plain.stats.computed
    assert shared.stats.padding == 0
    assert shared.stats.cached > 0


def test_a_prompt_is_read_once_while_more_of_its_samples_are_to_come(folder: Path) -> None:
    """Each round of an adaptive N read all of its prompts again."""
    engine, asked = TorchEngine(folder), prompts(*CANDIDATES)
    whole = [c.text for c in generate(TorchEngine(folder), asked, 8, seed=5)]
    for size in (1, 2, 4):
        generate(engine, asked, size, continued=True, seed=5)
        read = engine.stats.computed
        for first in range(size, 8, size):  # fewer prompts from round to round, some of which share a context
            left = range(first % 5, 15, 1 + first // size)
            done = generate(engine, [asked[i] for i in left], size, first, continued=True, seed=5)
            assert [c.text for c in done] == [whole[8 * i + first + j] for i in left for j in range(size)]
            assert sum(c.cached_tokens for c in done) == sum(c.prompt_tokens for c in done) > 0
        assert engine.stats.computed == read
    assert engine._store.tokens > 0
    asyncio.run(engine.aclose())
    assert engine._store.tokens == 0


def test_prompts_for_which_there_is_no_room_are_read_again(folder: Path) -> None:
    engine, asked = TorchEngine(folder, max_batch_tokens=2500), prompts(*CANDIDATES)
    whole = [c.text for c in generate(TorchEngine(folder), asked, 4, seed=5)]
    read = []
    for first in (0, 2):
        done = generate(engine, asked, 2, first, continued=True, seed=5)
        assert [c.text for c in done] == [whole[4 * i + first + j] for i in range(15) for j in range(2)]
        assert engine._store.tokens <= 625
        read.append(engine.stats.computed)
    assert read[1] == 2 * read[0]


def test_every_candidate_but_one_has_cached_tokens(folder: Path) -> None:
    engine = TorchEngine(folder)
    done = generate(engine, prompts(*CANDIDATES))
    assert sorted(c.cached_tokens for c in done)[:2] == [0, min(c.cached_tokens for c in done if c.cached_tokens)]
    assert sum(c.prompt_tokens - c.cached_tokens for c in done) == engine.stats.computed
    rated = asyncio.run(engine.loglikelihood(prompts(*CANDIDATES), ["x"] * 15))
    assert sum(r.cached_tokens > 0 for r in rated) == 14


def test_one_changed_candidate_changes_no_other(folder: Path) -> None:
    engine = TorchEngine(folder)
    before = generate(engine, prompts(*CANDIDATES), 2, seed=1)
    after = generate(engine, prompts(*CANDIDATES[:2], "something else altogether", *CANDIDATES[3:]), 2, seed=1)
    for a, b in zip(before, after, strict=True):
        if a.request_index // 3 == 2:
            assert a.logprobs != b.logprobs
        else:
            assert (a.text, b.logprobs) == (b.text, pytest.approx(a.logprobs, abs=1e-4))


def test_a_draft_is_taken_up_to_where_the_models_own_choice_departs(folder: Path) -> None:
    engine, asked = TorchEngine(folder), prompts(*CANDIDATES)
    plain = generate(engine, asked, temperature=0.0)
    decoded = engine.stats.decoded
    texts = [c.text for c in plain]
    own = generate(engine, [replace(p, draft=t) for p, t in zip(asked, texts, strict=True)], temperature=0.0)
    assert [c.text for c in own] == texts
    # The last token comes from the logits behind the draft, and every token before it from the draft.
    assert [c.drafted_tokens for c in own] == [c.completion_tokens - 1 for c in plain]
    assert engine.stats.decoded == decoded
    engine._paths._run = replace(engine._paths._run, tokens=70, logits=70)
    again = generate(engine, [replace(p, draft=t) for p, t in zip(asked, texts, strict=True)], temperature=0.0)
    assert [(c.text, c.drafted_tokens) for c in again] == [(c.text, c.drafted_tokens) for c in own]
    half = [replace(p, draft=t[: len(t) // 2] + "#") for p, t in zip(asked, texts, strict=True)]
    for got, text in zip(generate(engine, half, temperature=0.0), texts, strict=True):
        assert got.text == text
        assert got.drafted_tokens == len(engine.renderer.encode(text[: len(text) // 2]))


def test_permuted_candidates_give_permuted_completions(folder: Path) -> None:
    engine = TorchEngine(folder)
    asked = prompts(*CANDIDATES)
    straight = generate(engine, asked, 2, seed=1)
    turned = generate(engine, asked[::-1], 2, seed=1)
    last = len(asked) - 1
    assert {(last - c.request_index, c.sample_index, c.text) for c in turned} == {
        (c.request_index, c.sample_index, c.text) for c in straight
    }


def test_small_batches_change_nothing(folder: Path) -> None:
    whole = generate(TorchEngine(folder), prompts(*CANDIDATES), 3, seed=2)
    split = generate(TorchEngine(folder, max_batch_tokens=300), prompts(*CANDIDATES), 3, seed=2)
    assert [c.text for c in whole] == [c.text for c in split]


def test_ratings_on_the_plain_path_waste_less_than_a_tenth_on_padding(folder: Path) -> None:
    engine = TorchEngine(folder, share_prefix=False)
    asyncio.run(engine.loglikelihood(prompts(*CANDIDATES), ["Write about the rain " * (i % 4) for i in range(15)]))
    assert engine.stats.padding < 0.1 * (engine.stats.padding + engine.stats.computed)


# --- models that cannot be served ----------------------------------------------------------------------------------


def fallback_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "not shared" in r.getMessage()]


@pytest.mark.parametrize("family", ["Mistral", "Gemma3"])
def test_a_sliding_window_that_binds_takes_the_plain_path_and_says_so_once(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = save(tmp_path, family, "ascii", sliding_window=64)
    engine = TorchEngine(folder)
    plain = TorchEngine(folder, share_prefix=False)
    for _ in range(2):
        asked = prompts(*CANDIDATES)
        assert [c.text for c in generate(engine, asked, 2, seed=0)] == [
            c.text for c in generate(plain, asked, 2, seed=0)
        ]
    assert engine.stats.cached == 0
    (line,) = fallback_lines(caplog)
    assert "some layers attend to 64 tokens" in line
    short = [Prompt((Turn("user", ("Hi",)),))]
    assert generate(engine, short, 4)
    assert engine.stats.computed == plain.stats.computed + generate(plain, short, 1)[0].prompt_tokens


def test_an_attention_that_is_not_known_takes_the_plain_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-OSS adds a learned sink to the softmax, which the shared path does not know."""
    caplog.set_level(logging.INFO)
    engine = TorchEngine(save(tmp_path, "GptOss", "ascii", sliding_window=600))
    assert len(generate(engine, prompts(*CANDIDATES), 2)) == 30
    (line,) = fallback_lines(caplog)
    assert "s_aux" in line


def test_a_model_whose_logits_come_out_different_takes_the_plain_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    folder = save(tmp_path, "Llama", "ascii")
    right = [c.text for c in generate(TorchEngine(folder), prompts(*CANDIDATES), seed=0)]

    def forgetful(parts: Any) -> torch.Tensor:
        only: torch.Tensor = parts[0][0]
        return only

    monkeypatch.setattr(prefix_attention, "merge", forgetful)
    engine = TorchEngine(folder)
    assert [c.text for c in generate(engine, prompts(*CANDIDATES), seed=0)] == right
    (line,) = fallback_lines(caplog)
    assert "standard deviations" in line


@pytest.mark.parametrize("lost", ["_grouped_part", "_part_of_one"])
def test_half_precision_hides_no_lost_prefix_from_the_check(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, right = load(WEIGHTS, device="cpu", dtype="bfloat16")[0], getattr(prefix_attention, lost)
    with torch.inference_mode():
        paths.check(made)
        made.set_attn_implementation("sdpa")

        def without(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
            mean, log_sum = right(*given)
            return mean, log_sum - torch.inf

        monkeypatch.setattr(prefix_attention, lost, without)
        with pytest.raises(NotServedError, match="came out different"):
            paths.check(made)


def failing_once(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The check of the first engine to be asked ends with an error."""
    right, left = paths.check, [error]

    def check_or_fail(model: Any) -> None:
        if left:
            raise left.pop()
        right(model)

    monkeypatch.setattr(paths, "check", check_or_fail)


def test_running_out_of_memory_in_the_check_is_said_and_switches_nothing_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was logged as a model that cannot share prefixes, and every later call took twice as long."""
    engine = TorchEngine(save(tmp_path, "Llama", "ascii"))
    failing_once(monkeypatch, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(EngineError, match="Lower max_batch_tokens"):
        generate(engine, prompts(*CANDIDATES))
    generate(engine, prompts(*CANDIDATES))
    assert engine.stats.cached > 0
    assert fallback_lines(caplog) == []


def test_a_fault_in_the_check_is_a_warning_and_the_plain_path_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(save(tmp_path, "Llama", "ascii"))
    failing_once(monkeypatch, TypeError("unexpected keyword argument"))
    assert len(generate(engine, prompts(*CANDIDATES))) == 15
    assert engine.stats.cached == 0
    (record,) = [r for r in caplog.records if "not shared" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert "unexpected keyword argument" in record.getMessage()
