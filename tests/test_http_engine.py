"""The HTTP engine against a real server on loopback that misbehaves on demand."""

import asyncio
import gzip
import json
import threading
import time
from contextlib import aclosing

import pytest

pytest.importorskip("aiohttp")

from fake_openai import FakeServer, Reply, Stream, error

import bon
from bon.budget import StopAt
from bon.engines.base import Prompt, Request
from bon.engines.http import wire
from bon.engines.http.endpoints import pause, retry_after
from bon.engines.http.engine import HTTPEngine
from bon.engines.http.link import Endpoint
from bon.engines.scripted import ScriptedEngine
from bon.errors import (
    EngineError,
    InputError,
    ModelNotFoundError,
    PromptTooLongError,
    RefusedError,
    UnavailableError,
    UnknownNameError,
)
from bon.mini import WEIGHTS
from bon.portal import run
from bon.scorers.base import Scorer
from bon.task import Message, as_messages
from bon.types import Sampling, Score

PROMPT = Prompt.of([Message("user", "Name a colour.")])


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("bon.engines.http.endpoints.FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server


async def collect(engine, prompts=(PROMPT,), n=1, keep=None, first_sample=0, **sampling):
    """All completions, in order."""
    requests = [Request(prompt, Sampling(**sampling), n, first_sample) for prompt in prompts]
    done = [c async for c in engine.generate(requests, keep=keep)]
    return sorted(done, key=lambda c: (c.request_index, c.sample_index))


def generate(engine, prompts=(PROMPT,), n=1, **options):
    """All completions, in order, with the engine closed after."""

    async def once():
        try:
            return await collect(engine, prompts, n, **options)
        finally:
            await engine.aclose()

    return asyncio.run(once())


def sent_seed(sample, seed=0):
    return wire.seed_of(seed, sample)


def messages(error_completions):
    return " ".join(str(c.error) for c in error_completions)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tiny import tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer("chatml").save_pretrained(folder)
    return folder


@pytest.fixture
def http():
    """Makes engines for the background loop, and closes them."""
    made = []

    def make(*urls, **options):
        made.append(HTTPEngine(urls, **options))
        return made[-1]

    yield make
    for engine in made:
        run(engine.aclose())


def waits(check, seconds=10.0):
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.01)
    return check()


# --- what it asks for and what comes back ---


def test_a_url_is_enough_and_the_server_says_which_model_it_has(server):
    engine = HTTPEngine(server.url)
    [done] = generate(engine, logprobs=True)
    assert (done.text, done.finish_reason) == ("answer 0", "stop")
    assert done.logprobs == (-0.5,) * 3
    assert done.cumulative_logprob == -1.5
    assert (done.prompt_tokens, done.completion_tokens, done.cached_tokens) == (7, 3, 4)
    assert server.posts[0].body["model"] == engine.name == "fake-model"
    assert server.posts[0].body["messages"] == [{"role": "user", "content": "Name a colour."}]


def test_only_options_that_are_set_are_sent_under_the_servers_names(server):
    generate(HTTPEngine(server.url), max_tokens=9)
    generate(
        HTTPEngine(server.url, extra_body={"repetition_penalty": 1.1, "wait": True}),
        n=2,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        stop=("\n",),
        seed=40,
        extra={"repetition_penalty": 1.2, "presence_penalty": 0.5},
    )
    plain, first, second = sorted((p.body for p in server.posts), key=lambda b: b.get("seed", 0))
    assert {first["seed"], second["seed"]} == {sent_seed(0, 40), sent_seed(1, 40)}, "each sample has a seed of its own"
    assert plain.keys() == {"model", "messages", "max_tokens"}, "what was not said is the server's to choose"
    assert first == second | {"seed": first["seed"]}
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop": ["\n"], "max_tokens": 1024}
    assert options.items() <= first.items()
    assert (first["repetition_penalty"], first["presence_penalty"], first["wait"]) == (1.2, 0.5, True)


@pytest.mark.parametrize("name", ["tempreature", "repetition_penalty"])
def test_an_option_that_nobody_listed_is_refused(name):
    with pytest.raises(UnknownNameError, match=name):
        HTTPEngine("http://127.0.0.1:1").generate([Request(PROMPT, Sampling(extra={name: 1}))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "localhost:8000"}, "http://127.0.0.1:8000/v1"),
        ({"base_url": []}, "at least one base URL"),
        ({"n_per_request": 0}, "n_per_request"),
        ({"max_concurrency": 1.5}, "max_concurrency"),
        ({"retries": -1}, "retries"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"extra_body": {"stream": True}}, "stream"),
        ({"extra_body": "wait"}, "extra_body must be an object"),
        ({"retrys": 1}, "Did you mean 'retries'"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"timeout_s": None}, "timeout_s"),
        ({"base_url": "http://x:99999"}, "not 'http://x:99999'"),
        ({"api_key": "sk-1", "api_key_env": "KEY"}, "not both"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ({"api_key": "sk-secret\n"}, "line break"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        HTTPEngine(**{"base_url": "http://x", **arguments})


def test_an_address_without_a_path_gets_v1_and_may_name_the_model(server):
    assert Endpoint("http://host:1/").url == "http://host:1/v1"
    assert Endpoint("https://host/api/v3/").url == "https://host/api/v3"
    server.models *= 2
    [done] = generate(HTTPEngine(server.url.removesuffix("/v1") + "#other"))
    assert done.text
    assert server.posts[0].body["model"] == "other"


def test_each_sample_is_a_request_of_its_own_and_is_there_as_soon_as_it_is_done(server):
    server.refuse = lambda seen: "hang" if seen.body["seed"] == sent_seed(1) else None
    server.hold = 2

    async def first_of_two():
        engine = HTTPEngine(server.url)
        stream = engine.generate([Request(PROMPT, Sampling(seed=0), 2)])
        first = await anext(stream)
        await stream.aclose()
        await engine.aclose()
        return first

    assert asyncio.run(first_of_two()).sample_index == 0
    hanging = next(p for p in server.posts if p.body["seed"] == sent_seed(1))
    assert hanging.aborted.wait(10), "closing the iterator aborts what is under way"


def test_two_seeds_share_no_sample_however_the_samples_are_divided(server):
    # The seed that was sent used to be seed + index, so that seeds 0 and 1 had 63 of 64 samples in common.
    server.text = lambda seen, draw: str(seen.body["seed"])

    async def both():
        engine = HTTPEngine(server.url)
        texts = [[c.text for c in await collect(engine, n=64, seed=seed)] for seed in (0, 1)]
        parts = [await collect(engine, n=n, seed=0, first_sample=first) for first, n in ((0, 5), (5, 1), (6, 58))]
        await engine.aclose()
        return (*texts, [c for part in parts for c in part])

    zero, one, parts = asyncio.run(both())
    assert len({*zero, *one}) == 128
    assert [c.text for c in parts] == zero
    assert [c.sample_index for c in parts] == [*range(64)]


def test_with_several_samples_in_one_request_they_are_the_same_however_they_are_divided():
    # vLLM gives choice i of a request the seed plus i.
    async def sent(*parts):
        seeds = []
        with FakeServer() as server:
            engine = HTTPEngine(server.url, n_per_request=4)
            for first, n in parts:
                await collect(engine, n=n, seed=3, first_sample=first)
            await engine.aclose()
            for post in server.posts:
                seeds += [post.body["seed"] + i for i in range(post.body.get("n", 1))]
        return sorted(seeds)

    whole = asyncio.run(sent((0, 12)))
    assert len({*whole}) == 12
    assert asyncio.run(sent((0, 3), (3, 4), (7, 5))) == whole


def test_at_temperature_0_no_seed_is_sent(server):
    generate(HTTPEngine(server.url), temperature=0.0, seed=1)
    assert "seed" not in server.posts[0].body


def test_each_request_has_its_own_sampling(server):
    async def once():
        engine = HTTPEngine(server.url)
        requests = [
            Request(PROMPT, Sampling(max_tokens=5), 2),
            Request(PROMPT, Sampling(stop=("x",)), 1, first_sample=7),
        ]
        done = [c async for c in engine.generate(requests)]
        await engine.aclose()
        return {(c.request_index, c.sample_index) for c in done}

    assert asyncio.run(once()) == {(0, 0), (0, 1), (1, 7)}
    assert sorted((p.body["max_tokens"], p.body.get("stop")) for p in server.posts) == [(5, None)] * 2 + [(1024, ["x"])]


def test_every_http_request_carries_the_prompt_that_it_sent(server):
    server.refuse = lambda seen: error(500, "oops") if seen.body["seed"] == sent_seed(0) else None
    done = generate(HTTPEngine(server.url, retries=0), n=3, seed=0)
    assert [(c.finish_reason, c.prompt_tokens, c.cached_tokens) for c in done] == [
        ("error", 0, 0),
        ("stop", 7, 4),
        ("stop", 7, 4),
    ]


def test_the_choices_of_one_http_request_share_one_prompt(server):
    done = generate(HTTPEngine(server.url, n_per_request=2), n=4)
    assert [(c.prompt_tokens, c.cached_tokens) for c in done] == [(7, 4), (0, 0), (7, 4), (0, 0)]


def test_n_per_request_asks_for_that_many_at_once(server):
    done = generate(HTTPEngine(server.url, n_per_request=4), n=6, seed=10)
    assert [c.sample_index for c in done] == [*range(6)]
    assert {c.text for c in done} == {f"answer {i}" for i in range(6)}
    assert sorted((p.body["n"], p.body["seed"]) for p in server.posts) == [
        (2, wire.seed_of(10, 4)),
        (4, wire.seed_of(10, 0)),
    ]
    assert [c.completion_tokens for c in done] == [3] * 6


def test_a_server_that_ignores_n_is_topped_up_and_not_asked_for_n_again(server):
    server.honours_n = False
    engine = HTTPEngine(server.url, n_per_request=3)

    async def twice():
        for _ in range(2):
            assert [c.sample_index for c in await collect(engine, n=3)] == [0, 1, 2]
        await engine.aclose()

    asyncio.run(twice())
    assert [p.body.get("n") for p in server.posts] == [3] + [None] * 5
    assert server.draws == 6, "nothing is sampled in vain"


@pytest.mark.parametrize(
    "message", ["Only one completion choice is allowed", "Unsupported value: 'n' must be 1", "what is this?"]
)
def test_a_server_that_refuses_n_is_asked_one_by_one(server, message):
    server.refuse = lambda seen: error(400, message) if "n" in seen.body else None
    done = generate(HTTPEngine(server.url, n_per_request=3), n=3)
    assert [c.finish_reason for c in done] == ["stop"] * 3
    assert [p.body.get("n") for p in server.posts].count(3) == 1


def said(text):
    return Prompt.of(as_messages(text))


def together(engine, texts, n=1, **sampling):
    """What comes of prompts whose asker waits for all of them."""

    async def once():
        try:
            requests = [Request(said(text), Sampling(**sampling), n, together=True) for text in texts]
            async with aclosing(engine.generate(requests)) as completions:
                return sorted([c async for c in completions], key=lambda c: (c.request_index, c.sample_index))
        finally:
            await engine.aclose()

    return asyncio.run(once())


def test_samples_that_are_waited_for_together_are_one_request_at_each_replica(server):
    with FakeServer() as other:
        done = together(HTTPEngine([server.url, other.url]), ["hello"], n=5, seed=3)
        asked = sorted((p.body["n"], p.body["seed"]) for p in [*server.posts, *other.posts])
        assert len(server.posts) == len(other.posts) == 1
    assert [c.sample_index for c in done] == [*range(5)]
    assert asked == [(2, wire.seed_of(3, 3)), (3, wire.seed_of(3, 0))], "choice i of a request has its seed plus i"


def test_prompts_that_are_waited_for_together_are_one_request_to_a_server_that_takes_several(server):
    server.takes_batches = True
    done = together(HTTPEngine(server.url), ["one", "two", "three"])
    [post] = server.posts
    assert [turns[0]["content"] for turns in post.body["messages"]] == ["one", "two", "three"]
    assert [(c.request_index, c.text) for c in done] == [(0, "answer 0"), (1, "answer 1"), (2, "answer 2")]
    assert [(c.prompt_tokens, c.completion_tokens) for c in done] == [(7, 3)] * 3
    assert sum(c.cached_tokens for c in done) == 4, "what the whole request had cached"


def test_a_server_that_takes_one_prompt_at_a_time_is_tried_once_and_then_asked_as_it_likes(server):
    engine = HTTPEngine(server.url)

    async def twice():
        for _ in range(2):
            requests = [Request(said(text), together=True) for text in ("one", "two")]
            async with aclosing(engine.generate(requests)) as completions:
                assert {c.finish_reason async for c in completions} == {"stop"}
        await engine.aclose()

    asyncio.run(twice())
    assert [p.path.endswith("/batch") for p in server.posts] == [True] + [False] * 4


def test_a_prompt_that_is_refused_fails_alone_and_not_with_those_beside_it(server):
    server.takes_batches = True
    server.refuse = lambda seen: error(400, "bad word") if "bad" in json.dumps(seen.body["messages"]) else None
    done = together(HTTPEngine(server.url), ["one", "bad", "three"])
    assert [c.finish_reason for c in done] == ["stop", "error", "stop"]


@pytest.mark.parametrize("answer", [{"choices": []}, {"choices": [{"message": {"content": "x"}}]}, b"<html>"])
def test_an_answer_that_is_no_batch_is_not_taken_for_one(server, answer):
    server.takes_batches = True
    server.faults += [answer]
    done = together(HTTPEngine(server.url), ["one", "two"])
    assert [c.text for c in done] == ["answer 0", "answer 1"]


def test_choices_beyond_those_asked_for_are_dropped(server):
    server.faults += [{"choices": [{"message": {"content": t}} for t in "abc"]}]
    done = generate(HTTPEngine(server.url, n_per_request=2), n=2)
    assert [c.text for c in done] == ["a", "b"]


@pytest.mark.parametrize("field", ["chat_template_kwargs", "logprobs"])
def test_a_field_that_bon_can_do_without_is_dropped_where_it_is_refused(server, field):
    message = f"Unrecognized request argument supplied: {field}"
    server.refuse = lambda seen: error(400, message) if field in seen.body else None
    engine = HTTPEngine(server.url)
    prompt = Prompt(PROMPT.turns, {"enable_thinking": False})

    async def twice():
        for _ in range(2):
            [done] = await collect(engine, [prompt], logprobs=True)
            assert done.text
        await engine.aclose()

    asyncio.run(twice())
    assert [field in p.body for p in server.posts] == [True, False, False], "found out once and remembered"
    kept = {"chat_template_kwargs", "logprobs"} - {field}
    assert all(kept < p.body.keys() for p in server.posts), "the others are still sent"


def test_template_variables_of_the_prompt_reach_the_server(server):
    prompt = Prompt(PROMPT.turns, {"enable_thinking": False})
    engine = HTTPEngine(server.url, extra_body={"chat_template_kwargs": {"tone": "dry", "enable_thinking": True}})
    generate(engine, [prompt])
    assert server.posts[0].body["chat_template_kwargs"] == {"tone": "dry", "enable_thinking": False}


def test_an_option_of_the_user_is_never_dropped_silently(server):
    server.refuse = lambda seen: error(400, "top_k is not supported") if "top_k" in seen.body else None
    [done] = generate(HTTPEngine(server.url), top_k=3)
    assert isinstance(done.error, RefusedError)
    assert "top_k is not supported" in str(done.error)


def test_max_tokens_goes_by_its_newer_name_where_the_old_one_is_refused(server):
    message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    server.refuse = lambda seen: error(400, message) if "max_tokens" in seen.body else None
    generate(HTTPEngine(server.url), max_tokens=5)
    assert server.posts[1].body["max_completion_tokens"] == 5


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("stop", "stop"), ("length", "length"), ("eos_token", "stop"), ("tool_calls", "stop"), (None, "stop")],
)
def test_finish_reasons_mean_what_the_contract_says(server, reason, expected):
    server.faults += [{"choices": [{"message": {"content": "x"}, "finish_reason": reason}]}]
    assert generate(HTTPEngine(server.url))[0].finish_reason == expected


def test_what_a_content_filter_withheld_is_an_error_and_no_text(server):
    server.faults += [{"choices": [{"message": {"content": "half"}, "finish_reason": "content_filter"}]}]
    done = sorted(generate(HTTPEngine(server.url), n=2), key=lambda c: c.finish_reason)
    assert [(c.text, c.finish_reason) for c in done] in ([("", "error"), ("answer 0", "stop")],)
    assert "content filter" in str(done[0].error)


def test_tool_calls_become_canonical_text_and_keep_their_form(server):
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b": 2,  "a": 1}'}}]
    server.faults += [{"choices": [{"message": {"content": None, "tool_calls": calls}, "finish_reason": "tool_calls"}]}]
    [done] = generate(HTTPEngine(server.url), extra={"tools": [{"type": "function"}]})
    assert done.text == '[{"arguments":{"a":1,"b":2},"name":"f"}]'
    assert done.tool_calls == tuple(calls)


def test_a_turn_about_tools_goes_to_the_chat_endpoint_even_where_prompts_are_token_ids(server):
    turns = [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
        {"role": "tool", "content": "yes", "tool_call_id": "c"},
    ]
    generate(HTTPEngine(server.url, tokenizer=str(WEIGHTS)), [Prompt.of(as_messages(turns))])
    [seen] = server.posts
    assert seen.path.endswith("/chat/completions")
    assert seen.body["messages"] == turns


# --- keep: streams, and only there ---


def test_nothing_is_streamed_without_keep(server):
    generate(HTTPEngine(server.url))
    assert "stream" not in server.posts[0].body


def test_keep_sees_the_text_grow_and_the_whole_is_what_a_plain_request_gives(server):
    server.text = lambda seen, draw: "one two three"
    seen = []
    [done] = generate(HTTPEngine(server.url), keep=lambda p: seen.append(p.text) or True, logprobs=True)
    assert seen == ["one", "one two", "one two three"]
    assert (done.text, done.finish_reason, done.cumulative_logprob) == ("one two three", "stop", -1.5)
    assert (done.prompt_tokens, done.completion_tokens) == (7, 4)


def test_a_completion_that_keep_gives_up_is_aborted_at_the_server(server):
    server.text = lambda seen, draw: "word " * 1000
    server.pace = 0.01
    [done] = generate(HTTPEngine(server.url), keep=lambda p: p.completion_tokens < 3)
    assert done.finish_reason == "abort"
    assert done.text == "word word word"
    assert server.posts[0].aborted.wait(10)


def test_stream_options_that_are_refused_are_left_out(server):
    server.refuse = lambda seen: (
        error(400, "Unknown parameter: 'stream_options.continuous_usage_stats'.")
        if "continuous_usage_stats" in seen.body.get("stream_options", {})
        else None
    )
    [done] = generate(HTTPEngine(server.url), keep=lambda p: True)
    assert done.prompt_tokens == 7
    assert server.posts[1].body["stream_options"] == {"include_usage": True}


def test_a_stream_that_breaks_off_is_made_again_as_a_plain_request(server):
    # A bound may hold on to what it saw, so a text that starts anew is not shown to keep.
    server.text = lambda seen, draw: "one <cut> two" if draw == 0 else "other"
    shown = []
    [done] = generate(HTTPEngine(server.url), keep=lambda p: shown.append(p.text) or True)
    assert (done.text, shown) == ("other", ["one"])
    assert "stream" not in server.posts[1].body


def test_a_stream_that_was_never_shown_is_tried_again_as_a_stream(server):
    server.faults += [error(429, "slow down", {"Retry-After": "0"})]
    generate(HTTPEngine(server.url), keep=lambda p: True)
    assert [p.body.get("stream") for p in server.posts] == [True, True]


def test_the_whole_answer_of_a_server_that_cannot_stream_is_taken(server):
    server.refuse = lambda seen: server.completion(seen)
    [done] = generate(HTTPEngine(server.url), keep=lambda p: True)
    assert (done.text, done.finish_reason, done.prompt_tokens) == ("answer 0", "stop", 7)
    assert len(server.posts) == 1


# --- misbehaviour ---


@pytest.mark.parametrize(
    "fault",
    [
        "reset",
        "reset mid-body",
        error(429, "slow down", {"Retry-After": "0"}),
        error(500, "oops"),
        error(503, "loading"),
        b"<html>",
        b"",
        {"choices": []},
        {"choices": [{"message": None}]},
        {"choices": "?"},
        {"error": {"message": "upstream"}},
        {"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("keep", [None, lambda partial: True], ids=["plain", "streamed"])
def test_passing_trouble_is_retried_and_leaves_no_trace(server, fault, keep):
    server.faults += [fault, fault]
    [done] = generate(HTTPEngine(server.url), keep=keep)
    assert (done.text, done.finish_reason) == ("answer 0", "stop")
    assert len(server.posts) == 3


@pytest.mark.parametrize("fault", ["reset", error(500, "oops"), b"<html>", {"choices": []}], ids=str)
def test_trouble_that_stays_makes_an_error_completion_that_says_where_and_what(server, fault):
    server.refuse = lambda seen: fault
    [done] = generate(HTTPEngine(server.url, retries=1))
    assert (done.finish_reason, done.text) == ("error", "")
    assert isinstance(done.error, UnavailableError)
    assert done.error.retryable
    assert server.url in str(done.error)
    assert "(2 tries)" in str(done.error)
    assert len(server.posts) == 2


def test_a_server_that_is_not_there_is_named(server):
    server.die()
    [done] = generate(HTTPEngine(server.url, model="m", retries=0))
    assert f"cannot reach {server.url}" in str(done.error)
    assert "Is a server running there?" in str(done.error)


@pytest.mark.parametrize("fault", ["reset", "reset mid-body"])
def test_a_server_that_breaks_off_is_not_called_unreachable(server, fault):
    server.refuse = lambda seen: fault
    [done] = generate(HTTPEngine(server.url, retries=0))
    assert f"{server.url} broke off: " in str(done.error)
    assert "running there" not in str(done.error)


def test_a_server_that_hangs_is_given_up_and_told_so(server):
    server.faults += ["hang"]
    [done] = generate(HTTPEngine(server.url, timeout_s=0.2))
    assert done.text == "answer 0", "the retry got through"
    assert server.posts[0].aborted.wait(10)


def test_a_deadline_keeps_what_is_there(server):
    server.refuse = lambda seen: "hang" if seen.body["seed"] == sent_seed(2) else None
    done = generate(HTTPEngine(server.url, deadline_s=1.0), n=3, seed=0)
    assert [c.finish_reason for c in done] == ["stop", "stop", "error"]
    assert "deadline" in str(done[2].error)


def chat(**choice):
    return {"choices": [{"message": {"content": "x"}, "finish_reason": "stop", **choice}]}


GARBAGE = {
    "no token id": chat(token_ids=[-1]),
    "token ids that are a number": chat(token_ids=5),
    "tool calls that are a number": chat(message={"content": None, "tool_calls": 5}),
    "tool calls that are numbers": chat(message={"content": None, "tool_calls": [5]}),
    "a tool call too deep": chat(message={"tool_calls": [{"function": {"arguments": "[" * 300 + "]" * 300}}]}),
    "content that is an object": chat(message={"content": {"text": "x"}}),
    "an unpaired surrogate": b'{"choices": [{"message": {"content": "\\ud800"}}]}',
    "no UTF-8": b'{"choices": [{"message": {"content": "\xff"}}]}',
    "choices null": {"choices": None},
    "a choice that is null": {"choices": [None]},
    "nested beyond reason": b'{"choices": [' * 900 + b"]}" * 900,
    "an error that is nested beyond reason": Reply(400, b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b"}}"),
    "a number of tokens without end": error(400, f"context length is {'9' * 5000} tokens, 1 input tokens"),
    "compressed": Reply(200, gzip.compress(b"{}"), {"Content-Encoding": "gzip"}),
    "a stream of numbers": Stream([b"5"]),
    "a stream that is no UTF-8": Stream([b'{"choices": [{"delta": {"content": "\xff"}}]}']),
    "a stream of null": Stream([b'{"choices": [null]}']),
    "a stream with content that is a number": Stream([b'{"choices": [{"delta": {"content": 5}}]}']),
    "a stream with token ids that are a number": Stream([b'{"choices": [{"delta": {}, "token_ids": 5}]}']),
    "a stream with an error": Stream([b'{"error": {"message": "no room"}}']),
    "a stream without an end": Stream([b'{"choices": [{"delta": {"content": "x"}}]}']),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("keep", [None, lambda partial: True], ids=["plain", "streamed"])
def test_whatever_a_server_sends_costs_one_candidate_and_says_why(server, garbage, keep, tokenizer):
    # Building a completion from a token id of -1 raised; the task ended unseen and the call waited for ever.
    server.refuse = lambda seen: garbage if seen.body["seed"] == sent_seed(1) else None
    engine = HTTPEngine(server.url, tokenizer=tokenizer, retries=0)
    engine.endpoints.all[0].refused.add("token ids")  # so that the fake server's chat endpoint answers
    done = generate(engine, n=3, seed=0, keep=keep)
    assert [c.finish_reason for c in done] == ["stop", "error", "stop"]
    assert done[1].text == ""
    assert server.url in str(done[1].error)


def test_a_choice_that_cannot_be_read_is_made_again_by_itself(server):
    bad = {"index": 1, "message": None}
    good = [{"index": i, "message": {"content": f"at once {i}"}} for i in (2, 0)]
    server.faults += [{"choices": [bad, *good]}]
    done = generate(HTTPEngine(server.url, n_per_request=3), n=3, seed=0)
    assert [c.text for c in done] == ["at once 0", "answer 0", "at once 2"]
    assert server.posts[1].body["seed"] == wire.seed_of(0, 1)


def test_what_keep_raises_comes_out_of_the_call(server):
    def keep(partial):
        raise ZeroDivisionError("in the caller's own code")

    with pytest.raises(ZeroDivisionError, match="own code"):
        generate(HTTPEngine(server.url), n=3, keep=keep)


def test_a_redirect_is_not_followed_and_says_where_it_leads(server):
    with FakeServer() as other:
        there = other.url + "/chat/completions"
        server.refuse = lambda seen: Reply(307, b"", {"Location": f"{there}?token=abc"})
        [done] = generate(HTTPEngine(server.url))
        assert f"redirects to {there!r} (307)" in str(done.error)
        assert not other.seen


def test_one_request_that_is_refused_does_not_end_the_others(server):
    server.refuse = lambda seen: error(400, "not to our liking") if "bad" in json.dumps(seen.body) else None
    done = generate(HTTPEngine(server.url), [Prompt.of([Message("user", "bad words")]), PROMPT])
    assert [c.finish_reason for c in done] == ["error", "stop"]
    assert isinstance(done[0].error, RefusedError)
    assert "not to our liking" in str(done[0].error)


def test_a_prompt_of_megabytes_is_sent(server):
    text = "word " * 500_000
    generate(HTTPEngine(server.url), [Prompt.of([Message("user", text)])])
    assert server.posts[0].body["messages"][0]["content"] == text


def test_a_wait_that_is_too_long_is_not_waited_for(server):
    server.refuse = lambda seen: error(429, "quota", {"Retry-After": "86400"})
    [done] = generate(HTTPEngine(server.url))
    assert "asks to wait 86400 s" in str(done.error)
    assert len(server.posts) == 1


def test_pauses_grow_are_random_and_never_undercut_retry_after():
    assert [pause(k, jitter=lambda: 1.0) for k in (1, 2, 3)] == [0.01, 0.02, 0.04]
    assert pause(1, jitter=lambda: 0.0) == 0.005
    assert pause(1, retry_after=3.0) == 3.0
    assert pause(1000) <= 8.0
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({}) is None


def test_a_refused_key_ends_the_call_at_once_and_never_shows_the_key(server, monkeypatch):
    monkeypatch.setenv("BON_UPSTREAM_API_KEY", "sk-secret")
    server.refuse = lambda seen: error(401, "Incorrect API key: sk-secret")
    with pytest.raises(RefusedError) as caught:
        generate(HTTPEngine(server.url, model="m"), n=1)
    assert server.url in str(caught.value)
    assert "API key" in str(caught.value)
    assert "sk-secret" not in f"{caught.value} {HTTPEngine(server.url)!r}"
    assert not caught.value.retryable
    assert server.posts[0].headers["authorization"] == "Bearer sk-secret"
    assert len(server.posts) == 1


def test_the_key_may_be_in_a_variable_that_is_named(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-mine")
    generate(HTTPEngine(server.url, api_key_env="MY_KEY"))
    assert server.posts[0].headers["authorization"] == "Bearer sk-mine"


def test_a_key_is_not_shown_by_halves_where_a_message_is_cut(server):
    server.refuse = lambda seen: error(400, "x" * 390 + " sk-secret-and-more")
    [done] = generate(HTTPEngine(server.url, api_key="sk-secret-and-more"))
    assert "sk-s" not in str(done.error)


def test_credentials_in_a_url_are_sent_and_not_shown(server):
    server.refuse = lambda seen: error(500, "who is hunter2?")
    address = server.url.replace("//", "//anna:hunter2@") + "?version=2024-06-01"
    engine = HTTPEngine(address, retries=0, model="m")
    shown = [repr(engine), HTTPEngine(address).name, str(generate(engine)[0].error)]
    assert all(server.url in text for text in shown)
    assert not [text for text in shown if "anna" in text or "hunter2" in text or "2024" in text]
    [seen] = server.posts
    assert seen.headers["authorization"] == "Basic YW5uYTpodW50ZXIy"
    assert seen.path == "/v1/chat/completions?version=2024-06-01"
    with pytest.raises(InputError) as caught:
        HTTPEngine("anna:hunter2@host/v1?key=hunter2")
    assert "hunter2" not in str(caught.value)


def test_a_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    monkeypatch.setenv("no_proxy", "near.example")
    generate(HTTPEngine("http://far.example/v1", model="m"))
    assert server.posts[0].path == "http://far.example/v1/chat/completions"
    monkeypatch.setenv("http_proxy", "socks5://anna:hunter2@127.0.0.1")
    with pytest.raises(InputError, match=r"'socks5://127\.0\.0\.1' is no HTTP proxy"):
        generate(HTTPEngine("http://far.example/v1", model="m"))


def test_openais_key_is_not_sent_in_the_clear(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.delenv("BON_UPSTREAM_API_KEY", raising=False)
    assert HTTPEngine("http://far.example/v1").endpoints.api_key is None
    assert HTTPEngine("https://far.example/v1").endpoints.api_key == "sk-secret"
    monkeypatch.delenv("OPENAI_API_KEY")
    generate(HTTPEngine(server.url))
    assert "authorization" not in server.posts[0].headers


def test_a_model_that_is_not_there_is_named(server):
    server.refuse = lambda seen: error(404, "The model `m` does not exist.", code="model_not_found")
    with pytest.raises(ModelNotFoundError, match=r"no such model: The model `m`.*/v1/models"):
        generate(HTTPEngine(server.url, model="m"))


def test_several_models_are_listed_when_none_was_named(server):
    server.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(ModelNotFoundError, match=r"several models \(a, b\).*#name"):
        generate(HTTPEngine(server.url))


def test_a_wrong_path_is_told_from_a_wrong_model(server):
    server.refuse = lambda seen: Reply(404, {"detail": "Not Found"})
    with pytest.raises(RefusedError, match="/v1"):
        generate(HTTPEngine(server.url, model="m"))


def test_text_that_is_no_unicode_is_the_callers_mistake(server):
    bad, good = generate(HTTPEngine(server.url), [Prompt.of([Message("user", "\ud800")]), PROMPT])
    assert isinstance(bad.error, InputError)
    assert "surrogate" in str(bad.error)
    assert good.text == "answer 0"


# --- the length of the context ---

OVERFLOWS = [
    "This model's maximum context length is 100 tokens. However, you requested 170 tokens ({} in the messages, 90 in "
    "the completion). Please reduce the length of the messages or completion.",
    "'max_tokens' or 'max_completion_tokens' is too large: 90. This model's maximum context length is 100 tokens and "
    "your request has {} input tokens (90 > 100 - {}).",
    "You passed {} input tokens and requested 90 output tokens. However, the model's context length is only 100 "
    "tokens, resulting in a maximum input length of 10 tokens.",
    "Requested token count exceeds the model's maximum context length of 100 tokens. You requested a total of 170 "
    "tokens: {} tokens from the input messages and 90 tokens for the completion.",
    "request ({} tokens) exceeds the available context size (100 tokens), try increasing it",
]


@pytest.mark.parametrize("message", OVERFLOWS)
def test_a_prompt_that_does_not_fit_says_by_how_much(server, message):
    server.refuse = lambda seen: error(400, message.replace("{}", "120"))
    done = generate(HTTPEngine(server.url), n=2, max_tokens=90)
    assert [c.sample_index for c in done] == [0, 1]
    for completion in done:
        assert isinstance(completion.error, PromptTooLongError)
        assert (completion.error.tokens, completion.error.limit) == (120, 99)


@pytest.mark.parametrize("message", OVERFLOWS)
def test_max_tokens_are_bounded_by_the_room_in_the_context(server, message):
    server.refuse = lambda seen: error(400, message.replace("{}", "30")) if seen.body["max_tokens"] > 70 else None
    engine = HTTPEngine(server.url)
    [done] = generate(engine, max_tokens=90)
    assert done.text
    assert server.posts[-1].body["max_tokens"] == 70
    assert engine.max_model_len == 100


def test_more_tokens_than_the_context_has_are_not_asked_for(server):
    server.models[0]["max_model_len"] = 512
    generate(HTTPEngine(server.url), max_tokens=1024)
    assert "max_tokens" not in server.posts[0].body


# --- many at a time, several replicas, several loops ---


def test_64_samples_are_under_way_at_the_same_time(server):
    server.hold = 64
    done = generate(HTTPEngine(server.url), n=64)
    assert sorted(c.text for c in done) == sorted(f"answer {i}" for i in range(64))
    assert server.peak == 64


def test_no_more_requests_are_under_way_than_allowed(server):
    server.hold = 3
    done = generate(HTTPEngine(server.url, max_concurrency=3), n=20)
    assert len(done) == 20
    assert server.peak == 3


def test_replicas_share_the_work(server):
    with FakeServer() as other:
        server.hold = other.hold = 2
        done = generate(HTTPEngine([server.url, other.url]), n=8)
        assert len(done) == 8
        assert min(len(server.posts), len(other.posts)) >= 2


def test_a_replica_that_dies_is_set_aside_and_used_again_when_it_is_back(server):
    with FakeServer() as other:
        engine = HTTPEngine(f"{server.url},{other.url}", cooldown_s=0.05)

        async def story():
            async def calls(n):
                assert [c.finish_reason for c in await collect(engine, n=n)] == ["stop"] * n

            await calls(4)
            assert server.posts
            await asyncio.to_thread(server.die)
            await calls(8)
            assert engine.endpoints.all[0].failures
            before = len(server.posts)
            await asyncio.to_thread(server.listen)
            while len(server.posts) == before:
                await calls(2)
            assert not engine.endpoints.all[0].failures
            await engine.aclose()

        asyncio.run(asyncio.wait_for(story(), 60))


def test_a_failing_endpoint_is_set_aside_for_longer_each_time():
    endpoint = Endpoint("http://x/v1")
    endpoint.failed(5.0)
    first = endpoint.aside_until
    for _ in range(50):
        endpoint.failed(5.0)
    assert endpoint.failures == 1, "requests that fail together are one failure"
    assert first <= endpoint.aside_until < first + 5
    endpoint.failed(5.0, retry_after=30)
    assert endpoint.aside_until > first + 20
    endpoint.answered()
    assert (endpoint.failures, endpoint.aside_until) == (0, 0.0)


def test_one_engine_serves_several_event_loops(server):
    engine = HTTPEngine(server.url)

    async def one():
        [done] = await collect(engine)
        return done.text

    texts = [asyncio.run(one()) for _ in range(3)]
    threads = [threading.Thread(target=lambda: texts.append(asyncio.run(one()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == [f"answer {i}" for i in range(7)]
    assert not engine.endpoints.loops, "a loop that ends takes its connections with it"


def test_a_closed_engine_says_so(server):
    engine = HTTPEngine(server.url)
    generate(engine)
    with pytest.raises(EngineError, match="has been closed"):
        generate(engine)


def test_a_cancelled_call_aborts_its_requests(server):
    server.refuse = lambda seen: "hang"

    async def cancelled():
        engine = HTTPEngine(server.url)
        task = asyncio.create_task(anext(engine.generate([Request(PROMPT, n=5)])))
        await asyncio.to_thread(waits, lambda: len(server.posts) == 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.aclose()

    asyncio.run(cancelled())
    assert all(post.aborted.wait(10) for post in server.posts)


# --- token ids and likelihoods ---


def test_without_a_tokenizer_rating_says_what_to_do(server):
    with pytest.raises(InputError, match="tokenizer="):
        rate(HTTPEngine(server.url))


def rate(engine, continuation="red"):
    async def once():
        try:
            return await engine.loglikelihood([PROMPT], [continuation])
        finally:
            await engine.aclose()

    return asyncio.run(once())


def echo(seen):
    """Answer a rating as OpenAI's completions with echo, or as vLLM's prompt_logprobs."""
    length = len(seen.body["prompt"])
    values = [None, *(-float(i) for i in range(1, length)), *[-9.0] * seen.body["max_tokens"]]
    choice = {"text": "", "finish_reason": "length"}
    if "prompt_logprobs" in seen.body:
        rows = [None if v is None else {"5": {"logprob": v}} for v in values[:length]]
        return {"choices": [{**choice, "prompt_logprobs": rows}]}
    return {"choices": [{**choice, "logprobs": {"token_logprobs": values}}]}


@pytest.mark.parametrize("refused", [(), ("max_tokens 0",), ("max_tokens 0", "echo")])
def test_rating_takes_the_way_that_the_server_offers(server, tokenizer, refused):
    def answer(seen):
        if "max_tokens 0" in refused and seen.body["max_tokens"] == 0:
            return error(400, "max_tokens must be at least 1")
        if "echo" in refused and "echo" in seen.body:
            return error(400, "echo is not supported")
        return echo(seen)

    server.refuse = answer
    engine = HTTPEngine(server.url, tokenizer=tokenizer)
    start, tail = len(engine.renderer.render(PROMPT)), len(engine.renderer.encode("red")) + 1
    [rated] = rate(engine)
    assert (rated.tokens, rated.prompt_tokens) == (tail, start)
    assert rated.total == -sum(range(start, start + tail))


def test_a_row_that_is_refused_without_a_word_leaves_the_way_of_rating_as_it_is(server, tokenizer):
    """After one 400 that explained nothing, no later row of any call could be rated."""
    engine = HTTPEngine(server.url, tokenizer=tokenizer, retries=0)
    bad = engine.renderer.encode("bad")
    server.refuse = lambda seen: (
        error(400, "no") if tuple(seen.body["prompt"][-len(bad) - 1 : -1]) == bad else echo(seen)
    )

    async def rate_both():
        try:
            return [(await engine.loglikelihood([PROMPT], [text]))[0] for text in ("bad", "red")]
        finally:
            await engine.aclose()

    refused, red = asyncio.run(rate_both())
    assert "(400): no" in str(refused.error)
    assert red.error is None


def test_what_cannot_be_rated_says_why_in_its_place(server, tokenizer):
    engine = HTTPEngine(server.url, tokenizer=tokenizer, retries=0)
    ids = [engine.renderer.encode(text) for text in ("red", "blue " * 100, "broken")]
    server.models[0]["max_model_len"] = 120

    def answer(seen):
        broken = tuple(seen.body["prompt"][-len(ids[2]) - 1 : -1]) == ids[2]
        return error(500, "oops") if broken else echo(seen)

    server.refuse = answer

    async def three():
        rated = await engine.loglikelihood([PROMPT] * 3, ["red", "blue " * 100, "broken"])
        await engine.aclose()
        return rated

    red, blue, broken = asyncio.run(three())
    assert red.error is None
    assert red.total < 0
    assert isinstance(blue.error, PromptTooLongError)
    assert isinstance(broken.error, UnavailableError)


def test_a_server_that_gives_no_prompt_logprobs_is_named_with_what_to_use_instead(server, tokenizer):
    with pytest.raises(InputError, match=r"gives no log-probabilities of a prompt.*Flip"):
        rate(HTTPEngine(server.url, tokenizer=tokenizer))


def test_with_a_tokenizer_prompts_are_sent_as_token_ids(server, tokenizer):
    engine = HTTPEngine(server.url, tokenizer=tokenizer)
    ids = engine.renderer.encode("green")
    server.faults += [{"choices": [{"text": "green", "finish_reason": "stop", "token_ids": [*ids]}]}]
    [done] = generate(engine)
    assert server.posts[0].path == "/v1/completions"
    assert server.posts[0].body["prompt"] == [*engine.renderer.render(PROMPT)]
    assert done.tokens.ids == ids
    assert done.tokens.vocabulary == engine.renderer.fingerprint


def test_a_server_that_takes_no_token_ids_gets_messages(server, tokenizer):
    server.refuse = lambda seen: error(400, "prompt must be text") if "prompt" in seen.body else None
    done = generate(HTTPEngine(server.url, tokenizer=tokenizer), n=2)
    assert [c.finish_reason for c in done] == ["stop", "stop"]
    assert server.posts[-1].path == "/v1/chat/completions"


def test_with_a_tokenizer_a_prompt_that_is_too_long_is_never_sent(server, tokenizer):
    engine = HTTPEngine(server.url, tokenizer=tokenizer)
    limit = len(engine.renderer.render(PROMPT))
    server.models[0]["max_model_len"] = limit + 1
    done = generate(engine, [Prompt.of([Message("user", "Name a colour " * 9)]), PROMPT], 2)
    assert [(c.request_index, c.sample_index) for c in done] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(isinstance(c.error, PromptTooLongError) and c.error.limit == limit for c in done[:2])
    assert {c.text for c in done[2:]} == {"answer 0", "answer 1"}
    assert [p.body["max_tokens"] for p in server.posts] == [1, 1]


def test_a_tokenizer_that_is_not_there_is_named(server):
    with pytest.raises(ModelNotFoundError, match="no/such"):
        generate(HTTPEngine(server.url, tokenizer="no/such/tokenizer"))


def test_log_probabilities_are_given_whole_or_not_at_all():
    for missing in ({"token_logprobs": [-1.0, None]}, {"content": []}, None, 5, {"content": [5]}):
        assert wire.read_logprobs(missing) == (None, None)
    assert wire.read_logprobs({"token_logprobs": [-1.0], "tokens": ["a", "b"]}) == ((-1.0,), None)
    assert wire.prompt_logprobs({"choices": [{"logprobs": {"token_logprobs": [None, -1.0]}}]}, 3) is None


# --- the pipeline ---


def test_best_of_n_over_http_end_to_end(server, http):
    server.text = lambda seen, draw: "A red fox." if "Response" not in json.dumps(seen.body) else "Write about a fox"
    policy = http(server.url)
    result = bon.BestOfN(policy, bon.Flip(policy), n=4, prune=False)("Write about a fox")
    assert (result.text, result.reward) == ("A red fox.", 1.0)
    assert [p.body.get("n") for p in server.posts] == [4, None], "one request brings all samples, which are one text"
    assert result.usage.policy_prompt_tokens == 7, "and reads the prompt once"
    assert result.usage.policy_completion_tokens == 16
    assert result.errors == ()


def test_one_failed_sample_degrades_n_and_says_so(server, http):
    server.refuse = lambda seen: error(500, "oops") if seen.body["seed"] == sent_seed(2) else None
    policy = http(server.url, retries=0)
    result = bon.BestOfN(policy, bon.Flip(ScriptedEngine(["Write"])), n=4, sampling={"seed": 0})("Write")
    assert result.text.startswith("answer")
    assert [c.finish_reason for c in result.candidates] == ["stop", "stop", "error", "stop"]
    assert result.scores[2].status == "failed"
    assert result.scores[2].reward is None
    assert result.counts["failed"] == 1
    [reason] = result.errors
    assert "oops" in reason
    assert reason in result.scores[2].reason
    assert result.to_dict()["candidates"][2]["error"] == reason


def test_when_every_sample_fails_the_call_fails_with_the_cause(server, http):
    server.refuse = lambda seen: error(500, "oops")
    with pytest.raises(UnavailableError, match="oops"):
        bon.BestOfN(http(server.url, retries=0), bon.Flip(ScriptedEngine(["x"])), n=3)("Write")


def test_a_judge_that_fails_once_does_not_void_the_run(server, http):
    server.text = lambda seen, draw: "Write"
    server.refuse = lambda seen: error(500, "oops") if "bad" in json.dumps(seen.body) else None
    policy = ScriptedEngine(["good", "bad", "fine"])
    result = bon.BestOfN(policy, bon.Flip(http(server.url, retries=0)), n=3, prune=False)("Write")
    assert [s.status for s in result.scores] == ["ok", "failed", "ok"]
    assert "oops" in result.scores[1].reason


class Judge(Scorer):
    """A scorer that cannot be reached for some of the candidates."""

    concurrent = True

    def __init__(self, unreachable):
        self.unreachable = unreachable

    async def score(self, pending):
        for position, one in enumerate(pending):
            if one.candidate.text in self.unreachable:
                raise UnavailableError("http://judge is away.")
            yield position, Score(0.5)


def test_a_scorer_that_cannot_be_reached_for_one_candidate_fails_that_one_only():
    result = bon.BestOfN(ScriptedEngine(["a", "b"]), Judge({"b"}), n=2)("Write")
    assert [s.status for s in result.scores] == ["ok", "failed"]
    assert "away" in result.scores[1].reason


def test_a_scorer_that_can_never_be_reached_is_an_error():
    with pytest.raises(UnavailableError, match="away"):
        bon.BestOfN(ScriptedEngine(["a", "b"]), Judge({"a", "b"}), n=2)("Write")


def test_stopping_at_a_reward_aborts_what_is_under_way_at_the_server(server, http):
    """Each candidate was streamed so that it could be given up, which cost the server more than stopping saved."""
    server.text = lambda seen, draw: "good"
    server.refuse = lambda seen: "hang" if seen.body["seed"] == sent_seed(1) else None
    flip = ScriptedEngine(lambda text, draw: "Write" if "good" in text else "zzz")
    result = bon.BestOfN(http(server.url), bon.Flip(flip), n=StopAt(1.0, 2), sampling={"seed": 0})("Write")
    assert result.candidates[1].finish_reason == "abort"
    assert next(p for p in server.posts if p.body["seed"] == sent_seed(1)).aborted.wait(10)
    assert not any(p.body.get("stream") for p in server.posts)
