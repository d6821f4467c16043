"""What vLLM's outputs say, in the shapes of both of its model runners; no vLLM is needed to read them."""

import asyncio
from types import SimpleNamespace

import pytest
from tiny import tokenizer

from bon.engines.text.render import Renderer
from bon.engines.vllm.running import Running, SharedPrompt, last

PROMPT, DRAFT = (5, 6, 7, 8, 9), (10, 11, 12)
RATED = [(-0.1, 1), (-0.2, 1), (-3.0, 4)]  # the last token of the draft is not the model's first choice


def flat(rows):
    """vLLM's ``FlatLogprobs``: one entry for each position but the first, which has none."""
    starts = [0, *range(len(rows))]
    return SimpleNamespace(
        start_indices=starts,
        end_indices=[0, *range(1, len(rows) + 1)],
        logprobs=[logprob for logprob, _ in rows],
        ranks=[rank for _, rank in rows],
    )


# Four tokens of the prompt came from the cache.
SHAPES = {"nothing is listed for them": [], "uninitialised memory": [(7.7, 0)] * 4}


@pytest.mark.parametrize("cached", SHAPES.values(), ids=SHAPES)
def test_numbers_of_the_last_tokens_are_found_whatever_came_from_the_cache(cached):
    """Counting from the start took others' numbers on a GPU, whose model runner leaves out what was cached."""
    assert last(flat([*cached, *RATED]), 3) == RATED
    assert last(flat([*cached, *RATED]), 0) == []


@pytest.mark.parametrize("cached", SHAPES.values(), ids=SHAPES)
def test_a_draft_is_taken_up_to_where_the_model_departs(cached):
    class Host:
        name, renderer = "host", Renderer(tokenizer("chatml"))

        async def prefill(self, context, target):
            return SimpleNamespace(num_cached_tokens=4, prompt_logprobs=flat([*cached, *RATED]), outputs=[])

        async def stream(self, ids, params):
            assert ids == (*PROMPT, 10, 11)
            sampled = SimpleNamespace(token_ids=[13], logprobs=flat([(-0.5, 1)]), finish_reason="length")
            sampled.logprobs.start_indices, sampled.logprobs.end_indices = [0], [1]
            yield SimpleNamespace(outputs=[sampled], num_cached_tokens=0)

    params = SimpleNamespace(stop_token_ids=[], max_tokens=3, logprobs=0, clone=lambda: SimpleNamespace(max_tokens=3))
    done = asyncio.run(Running(Host(), 0, 0, SharedPrompt(PROMPT), params, draft=DRAFT).run())
    assert (done.completion_tokens, done.drafted_tokens, done.cached_tokens) == (3, 2, 4)
    assert done.logprobs == pytest.approx((-0.1, -0.2, -0.5))


def test_the_first_sample_to_end_carries_the_prompt_and_what_the_first_one_scheduled_found_in_the_cache():
    """Every other sample finds the whole prompt there: with the first to end's own number it looked as if nothing had
    been computed."""

    def output(tokens, cached, reason=None):
        sampled = SimpleNamespace(token_ids=tokens, logprobs=None, finish_reason=reason)
        return SimpleNamespace(outputs=[sampled], num_cached_tokens=cached)

    class Host:
        name, renderer = "host", Renderer(tokenizer("chatml"))

        async def stream(self, ids, params):
            if params.first:
                yield output([10], 0)
                await asyncio.sleep(0.01)
                yield output([11], 0, "length")
            else:
                await asyncio.sleep(0)
                yield output([10, 11], 4, "length")

    async def run():
        prompt = SharedPrompt(PROMPT)
        params = [SimpleNamespace(stop_token_ids=[], max_tokens=2, logprobs=None, first=i == 0) for i in range(2)]
        return await asyncio.gather(*(Running(Host(), 0, i, prompt, p).run() for i, p in enumerate(params)))

    first, other = asyncio.run(run())
    assert (other.prompt_tokens, other.cached_tokens) == (len(PROMPT), 0)
    assert (first.prompt_tokens, first.cached_tokens, first.completion_tokens) == (0, 0, 2)
