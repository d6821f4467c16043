"""bon serve in front of an OpenAI-compatible server: what is passed on, and what a client sees of its faults."""

import json
import re

import pytest
from fake_openai import FakeServer, error
from serving import openai, served, until

from bon import BestOfN, Flip
from bon.engines.http.engine import HTTPEngine
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError

MESSAGES = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture
def upstream():
    with FakeServer() as it:
        yield it


@pytest.fixture
def site(upstream):
    engine = HTTPEngine(upstream.url, retries=1, timeout_s=2.0, cooldown_s=0.05)
    with served(BestOfN(engine, ScriptedEngine(), n=2), model_names=("m",)) as it:
        yield it


def test_fields_that_only_the_policy_needs_are_passed_on(site, upstream):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    answer = site.chat(
        tools=tools, tool_choice="auto", response_format={"type": "json_object"}, frequency_penalty=0.5, logit_bias={}
    )
    assert answer.status_code == 200, answer.text
    body = upstream.posts[-1].body
    assert body["tools"] == tools
    assert (body["tool_choice"], body["response_format"]) == ("auto", {"type": "json_object"})
    assert body["frequency_penalty"] == 0.5
    assert "logit_bias" not in body, "what changes nothing is left out"


def test_tool_calls_are_scored_as_text_and_returned_as_tool_calls(site, upstream):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    reply = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    upstream.refuse = lambda seen: {"id": "x", "object": "chat.completion", "model": "m", **reply}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    create = site.openai().chat.completions.create
    choice = create(model="m", messages=MESSAGES, tools=tools).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls[0].function.name == "weather"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Rome"}
    chunks = list(create(model="m", messages=MESSAGES, tools=tools, stream=True))
    calls = [c.choices[0].delta.tool_calls for c in chunks if c.choices and c.choices[0].delta.tool_calls]
    assert calls[0][0].function.name == "weather"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"


def test_a_conversation_goes_on_after_tool_calls(site, upstream):
    """The loop of every client that calls tools: what came back goes into the history, with the tools' results."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    reply = {"choices": [{"index": 0, "message": called, "finish_reason": "tool_calls"}]}
    upstream.refuse = lambda seen: reply if len(seen.body.get("messages", ())) == 1 else None
    tools = [{"type": "function", "function": {"name": "weather"}}]
    create = site.openai().chat.completions.create
    message = create(model="m", messages=MESSAGES, tools=tools).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 degrees"}
    answer = create(model="m", messages=[*MESSAGES, message, result], tools=tools)
    assert upstream.posts[-1].body["messages"] == [*MESSAGES, called, result]
    assert answer.choices[0].message.content.startswith("answer")
    assert answer.best_of_n["instruction"] == MESSAGES[0]["content"], "not what the tool said"


def test_logprobs_are_what_upstream_says(site, upstream):
    upstream.text = lambda seen, draw: "x"
    for stream in (False, True):
        answer = site.chat(logprobs=True, stream=stream)
        text = answer.text if stream else json.dumps(answer.json(), separators=(",", ":"))
        assert '"logprobs":{"content":[{"token":"x","logprob":-0.5,"bytes":[120],"top_logprobs":[]}]' in text


def test_one_request_that_upstream_refuses_does_not_take_the_server_out_of_service(site, upstream):
    upstream.refuse = lambda seen: error(400, "not to our liking") if "bad" in str(seen.body) else None
    with pytest.raises(openai.APIStatusError, match="not to our liking") as refused:
        site.openai().with_options(max_retries=3).chat.completions.create(
            model="m", messages=[{"role": "user", "content": "bad words"}]
        )
    assert (refused.value.status_code, refused.value.code) == (502, "refused_upstream")
    assert "http" not in refused.value.message
    asked = len([seen for seen in upstream.posts if "bad" in str(seen.body)])
    assert asked <= 4, "the official client does not repeat it"
    until(lambda: any("Say yes" in str(seen.body) for seen in upstream.posts))
    assert site.http.get("/ready").status_code == 200


def test_what_upstream_cannot_do_for_one_request_does_not_take_the_server_out_of_service(site, upstream):
    """A 500 to one client's response_format made /ready fail for everybody."""
    upstream.refuse = lambda seen: error(500, "boom") if "response_format" in seen.body else None
    failed = site.chat(response_format={"type": "json_object"})
    assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_error")
    until(lambda: any("Say yes" in str(seen.body) for seen in upstream.posts))
    assert site.http.get("/ready").status_code == 200


def test_a_server_is_ready_once_the_one_behind_it_answers(upstream, monkeypatch):
    """It said so with nothing there, and one that was started too early was never asked."""
    monkeypatch.setattr("bon.serve.health.PROBE_EVERY_S", 0.05)
    upstream.die()
    with served(BestOfN(HTTPEngine(upstream.url, retries=0), ScriptedEngine(), n=1)) as site:
        assert site.http.get("/ready").status_code == 503
        assert site.http.get("/health").status_code == 200
        unnamed = site.http.get("/v1/models")
        assert (unnamed.status_code, unnamed.json()["error"]["code"]) == (503, "engine_error")
        upstream.listen()
        until(lambda: site.http.get("/ready").status_code == 200, 15)
        assert site.openai().models.list().data[0].id == "fake-model"


def test_a_server_that_refuses_the_key_is_noticed_before_a_client_asks(upstream):
    upstream.models = []
    with served(BestOfN(HTTPEngine(upstream.url, retries=0), ScriptedEngine(), n=1)) as site:
        assert site.http.get("/ready").status_code == 503, "it has no model"
    assert not upstream.posts, "nothing is sampled to find out"


def test_the_models_name_is_upstreams_own_and_no_address_or_key_reaches_a_client(upstream):
    """The URL, with its password and its query, was the model's name in every answer and in the page."""
    address = upstream.url.replace("http://", "http://user:hunter22@") + "?key=hunter23"
    upstream.text = lambda seen, draw: "fine"

    def refuse(seen):
        if "completions" in seen.path and "trouble" in str(seen.body):
            return error(500, f"{upstream.url} is out of order, key sk-proj-abc, /srv/models/x, see 10.1.2.3:8000")
        return None

    upstream.refuse = refuse
    with served(BestOfN(HTTPEngine(address, retries=0), ScriptedEngine(), n=2)) as site:
        listed = site.http.get("/v1/models")
        assert [model["id"] for model in listed.json()["data"]] == ["fake-model"]
        answer = site.chat()
        assert answer.json()["model"] == "fake-model"
        draws = []
        upstream.refuse = lambda seen: (
            refuse(seen) if "completions" in seen.path and not draws.append(0) and len(draws) < 2 else None
        )
        one_failed = site.chat("trouble", best_of_n={"return_candidates": True})
        assert one_failed.status_code == 200
        assert "out of order" in one_failed.text
        upstream.refuse = refuse
        failed = site.chat("trouble")
        assert failed.status_code == 503
        for told in (listed, answer, one_failed, failed, site.http.get("/"), site.http.get("/ready")):
            for secret in ("hunter2", "user:", "sk-proj", "/srv/", "10.1.2.3"):
                assert secret not in told.text
            # As a number of its own: the digits of a duration may be the same.
            assert not re.search(rf"(?<![\d.]){upstream.port}(?!\d)", told.text)


def test_a_tie_that_a_model_behind_the_server_could_not_decide_is_said_without_its_address():
    class Broken(ScriptedEngine):
        async def loglikelihood(self, prompts, continuations, *, end=True):
            raise InputError("http://10.1.2.3:8000/v1 gives no log-probabilities of a prompt.")

    with served(BestOfN(ScriptedEngine(), Flip(Broken(lambda prompt, draw: "qqq")), n=2)) as site:
        [warning] = [w for w in site.chat().json()["best_of_n"]["warnings"] if "shares the best reward" in w]
        assert "gives no log-probabilities" in warning
        assert "10.1.2.3" not in warning


def test_what_is_meant_for_the_operator_does_not_reach_clients(upstream):
    upstream.refuse = lambda seen: error(
        401, "Incorrect API key provided: sk-****wxyz. Get one at https://keys.example"
    )
    with served(BestOfN(HTTPEngine(upstream.url, api_key="sk-1"), ScriptedEngine(), n=1), model_names=("m",)) as site:
        refused = site.chat()
        assert refused.status_code == 502
        for secret in ("wxyz", "API_KEY", "api_key=", "example", "401"):
            assert secret not in refused.text
        assert "the log has the details" in refused.text
        unknown = site.chat(ignore_eos=True).json()["error"]
        assert unknown["message"] == "ignore_eos: the policy cannot honour this field."


def test_the_default_scorer_asks_no_upstream_for_what_it_cannot_give(upstream):
    """Two candidates always tie by consensus, and the likelihood that was to decide ended the request."""
    with served(BestOfN(HTTPEngine(upstream.url), n=2)) as site:
        assert site.chat().status_code == 200
        assert "likelihood" not in site.http.get("/v1/models").json()["data"][0]["best_of_n"]["scorers"]


def test_a_key_that_upstream_no_longer_takes_turns_ready_red(site, upstream):
    upstream.refuse = lambda seen: error(401, "no such key")
    assert site.chat().status_code == 502
    until(lambda: site.http.get("/ready").status_code == 503)


def test_what_a_content_filter_withholds_does_not_take_the_server_out_of_service(site, upstream):
    withheld = {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}
    upstream.refuse = lambda seen: withheld if "bad" in str(seen.body) else None
    refused = site.chat("bad words")
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "refused_upstream")
    assert "content filter" in refused.json()["error"]["message"]
    assert site.http.get("/ready").status_code == 200


def test_a_client_is_told_to_wait_as_long_as_upstream_asks_for(site, upstream):
    upstream.refuse = lambda seen: error(429, "quota", {"retry-after": "90"}) if "completions" in seen.path else None
    told = site.chat()
    assert (told.status_code, told.headers["retry-after"]) == (503, "90")
    assert "asks to wait 90 s" in told.json()["error"]["message"]


FAULTS = {
    "an error of its own": error(500, "boom"),
    "too busy": error(429, "slow down", {"retry-after": "0"}),
    "garbage": b"<html>hello</html>",
    "JSON of another kind": {"hello": "world"},
    "no choices": {"id": "x", "object": "chat.completion", "model": "m", "choices": []},
    "reset": "reset",
    "reset mid-body": "reset mid-body",
    "hang": "hang",
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_upstream_is_a_503_that_says_so_and_heals_by_itself(site, upstream, fault, monkeypatch):
    monkeypatch.setattr("bon.serve.health.PROBE_EVERY_S", 0.05)
    upstream.refuse = lambda seen: fault if "completions" in seen.path else None
    with pytest.raises(openai.InternalServerError) as failed:
        site.openai().chat.completions.create(model="m", messages=MESSAGES)
    assert (failed.value.status_code, failed.value.code) == (503, "engine_error")
    assert "a model of this server does not answer" in failed.value.message
    assert "http" not in failed.value.message, "where that is, is none of the client's business"
    until(lambda: site.http.get("/ready").status_code == 503, 15)
    upstream.refuse = lambda seen: None
    until(lambda: site.http.get("/ready").status_code == 200, 15)
    assert site.chat().status_code == 200


def test_one_failed_sample_costs_one_candidate_and_not_the_answer(site, upstream):
    draws = []

    def refuse(seen):
        if "completions" not in seen.path:
            return None
        draws.append(seen)
        return error(500, "boom") if len(draws) in (1, 3) else None  # the first sample, and its retry

    upstream.refuse = refuse
    answer = site.chat(best_of_n={"n": 3})
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"].startswith("answer")


def test_upstream_dies_and_comes_back(site, upstream, monkeypatch):
    monkeypatch.setattr("bon.serve.health.PROBE_EVERY_S", 0.05)
    assert site.chat().status_code == 200
    upstream.die()
    assert site.chat().status_code == 503
    until(lambda: site.http.get("/ready").status_code == 503, 15)
    upstream.listen()
    until(lambda: site.http.get("/ready").status_code == 200, 15)


def test_a_client_that_leaves_is_gone_upstream_as_well(upstream):
    engine = HTTPEngine(upstream.url, retries=0)
    upstream.refuse = lambda seen: "hang" if "completions" in seen.path else None
    with served(BestOfN(engine, ScriptedEngine(), n=3)) as site:
        with pytest.raises(openai.APITimeoutError):
            site.openai().with_options(timeout=0.5).chat.completions.create(model=engine.name, messages=MESSAGES)
        until(lambda: len(upstream.posts) == 3 and all(seen.aborted.is_set() for seen in upstream.posts))


def test_a_client_that_sees_all_candidates_sees_their_texts_as_the_upstream_streams_them(upstream):
    upstream.text, upstream.pace = lambda seen, draw: f"draw {draw} goes on and on", 0.05
    with served(BestOfN(upstream.url, lambda prompt, texts: [1.0, 0.0], n=2), status_s=0) as site:
        chunks = site.events("Hello", best_of_n={"return_candidates": True})
        pieces = [c["best_of_n"] for c in chunks if c.get("best_of_n", {}).get("event") == "text"]
        assert {p["index"] for p in pieces} == {0, 1}
        assert len(pieces) > 2
        assert all(seen.body["stream"] for seen in upstream.posts)
        before = len(upstream.posts)
        site.events("Hello")
        assert not any(seen.body.get("stream") for seen in upstream.posts[before:]), "nobody reads them there"
