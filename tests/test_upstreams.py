"""Upstreams as they are: what they refuse, say apart, leave out and send too much of."""

import asyncio
import gzip
import json
import logging

import orjson
import pytest
from command import rows_of, write_rows
from fake_openai import FakeServer, Raw, Reply, Stream, error
from serving import served

from bon import BestOfN, Flip
from bon.cli import main
from bon.engines.base import Prompt, Request
from bon.engines.http.engine import HTTPEngine
from bon.engines.scripted import ScriptedEngine
from bon.errors import PromptTooLongError
from bon.mini import WEIGHTS
from bon.portal import run
from bon.task import as_messages
from bon.types import Sampling

PROMPT = Prompt.of(as_messages("Name a colour."))
BY_DEVELOPER = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
BY_SYSTEM = [{**BY_DEVELOPER[0], "role": "system"}, BY_DEVELOPER[1]]
MERGED = [{"role": "user", "content": "Be brief.\n\nName a colour."}]


@pytest.fixture
def server():
    with FakeServer() as it:
        yield it


@pytest.fixture
def http(server):
    """An engine for the background loop."""
    engine = HTTPEngine(server.url, retries=0)
    yield engine
    run(engine.aclose())


def each(engine, *prompts, keep=None, **sampling):
    """What one sample of each prompt becomes, one after the other; the engine is closed at the end."""

    async def collect():
        try:
            requests = [Request(prompt, Sampling(**sampling)) for prompt in prompts]
            return [one for request in requests async for one in engine.generate([request], keep=keep)]
        finally:
            await engine.aclose()

    return asyncio.run(collect())


def generate(engine, **options):
    """What one sample becomes."""
    [done] = each(engine, PROMPT, **options)
    return done


def asked_twice(server, messages="Name a colour.", **sampling):
    """The bodies that a server got for two calls of one engine, and how the calls ended."""
    prompt = Prompt.of(as_messages(messages))
    ended = each(HTTPEngine(server.url, retries=0), prompt, prompt, **sampling)
    return [post.body for post in server.posts], [done.finish_reason for done in ended]


# --- what they refuse ---


REFUSALS = {
    "OpenAI, temperature": (
        "temperature",
        error(
            400,
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported.",
            param="temperature",
            code="unsupported_value",
        ),
    ),
    "OpenAI, logprobs": ("logprobs", error(403, "You are not allowed to request logprobs from this model")),
    "a gateway, 422": ("logprobs", Reply(422, {"detail": [{"loc": ["body", "logprobs"], "msg": "Extra inputs"}]})),
    "one that lists what it takes": (
        "logprobs",
        error(400, "logprobs is not supported. Supported: temperature, max_tokens, n, stream_options", param=None),
    ),
}


@pytest.mark.parametrize(("field", "refusal"), REFUSALS.values(), ids=REFUSALS)
def test_a_field_that_is_named_is_left_out_remembered_and_told_and_no_other_is(server, field, refusal, caplog):
    """FLIP always says temperature 0, which reasoning models refuse: no reconstruction was ever made."""
    server.refuse = lambda seen: refusal if field in seen.body else None
    with caplog.at_level(logging.WARNING, "bon"):
        bodies, ended = asked_twice(server, temperature=0.0, logprobs=True)
    assert ended == ["stop", "stop"]
    assert [field in body for body in bodies] == [True, False, False]
    assert all({"temperature", "logprobs"} - {field} < body.keys() for body in bodies)
    [line] = [record.getMessage() for record in caplog.records]
    assert f"{server.url} refuses {field} (" in line


def test_flip_scores_with_a_model_that_takes_no_temperature_no_logprobs_and_no_system_role(server, http):
    server.text = lambda seen, draw: "Write about a fox"

    def refuse(seen):
        for name in ("temperature", "logprobs"):
            if name in seen.body:
                return error(400, f"Unsupported parameter: '{name}' is not supported with this model.", param=name)
        return error(400, "System role not supported") if "system" in json.dumps(seen.body["messages"]) else None

    server.refuse = refuse
    result = BestOfN(ScriptedEngine(["A red fox."]), Flip(http), n=2)("Write about a fox")
    assert [score.status for score in result.scores] == ["ok", "ok"]
    assert result.reward == 1.0


def test_a_refusal_that_explains_nothing_removes_nothing_for_good(server):
    """One 400 of a passing fault took the log-probabilities, and with them the tie-break, from every later call."""
    server.faults += [error(400, "bad request")]
    bodies, ended = asked_twice(server, temperature=0.0, logprobs=True)
    assert ended == ["stop", "stop"]
    assert ["logprobs" in body for body in bodies] == [True, False, True]
    assert all("temperature" in body for body in bodies)


def test_a_field_that_a_refusal_only_happens_to_mention_is_not_learnt(server):
    said = "flagged by moderation: 'What is the temperature of logprobs?'"
    server.refuse = lambda seen: error(400, said) if "flagged" in str(seen.body) else None
    engine = HTTPEngine(server.url, retries=0)
    failed, _ = each(engine, Prompt.of(as_messages("flagged")), PROMPT, temperature=0.0, logprobs=True)
    assert said in str(failed.error)
    assert not engine.endpoints.all[0].refused
    assert {"temperature", "logprobs"} < server.posts[-1].body.keys()


def test_an_unexplained_refusal_of_token_ids_changes_no_later_call(server):
    engine = HTTPEngine(server.url, tokenizer=str(WEIGHTS), retries=0)
    server.faults += [error(400, "bad request")] * 2
    each(engine, PROMPT, PROMPT)
    plain, chat = "/v1/completions", "/v1/chat/completions"
    assert [post.path for post in server.posts] == [plain, plain, chat, plain]


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize(
    "said",
    [
        "System role not supported",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "Only user and assistant roles are supported!",
        "Developer instruction is not enabled for models/gemma-3-27b-it",
        "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
    ],
)
def test_a_system_message_is_merged_where_the_role_is_refused_as_the_local_renderer_does(server, said, status):
    server.refuse = lambda seen: error(status, said) if seen.body["messages"][0]["role"] == "system" else None
    bodies, ended = asked_twice(server, BY_SYSTEM)
    assert ended == ["stop", "stop"]
    assert [body["messages"] for body in bodies] == [BY_SYSTEM, MERGED, MERGED]


def test_developer_becomes_system_where_it_must_and_only_there(server):
    bodies, _ = asked_twice(server, BY_DEVELOPER)
    assert [body["messages"] for body in bodies] == [BY_DEVELOPER] * 2
    said = [{"loc": ["body", "messages", 0, "role"], "msg": "Input should be 'system', 'user' or 'assistant'"}]
    server.seen.clear()
    server.refuse = lambda seen: Reply(422, {"detail": said}) if "developer" in str(seen.body["messages"]) else None
    bodies, ended = asked_twice(server, BY_DEVELOPER)
    assert ended == ["stop", "stop"]
    assert [body["messages"] for body in bodies] == [BY_DEVELOPER, BY_SYSTEM, BY_SYSTEM]


def test_a_developer_message_is_merged_where_neither_role_is_taken(server):
    server.refuse = lambda seen: error(400, "bad role") if seen.body["messages"][0]["role"] != "user" else None
    bodies, ended = asked_twice(server, BY_DEVELOPER)
    assert ended == ["stop", "stop"]
    assert [body["messages"] for body in bodies] == [BY_DEVELOPER, BY_SYSTEM, MERGED, MERGED]


# --- what was not said ---


def test_what_was_not_said_is_not_sent_and_that_is_told_once(server, caplog):
    """``temperature: 1.0`` was always sent, over the 0.01 that the model's own settings say."""
    with caplog.at_level(logging.INFO, "bon"):
        bodies, _ = asked_twice(server)
    assert all(body.keys() == {"model", "messages", "max_tokens"} for body in bodies)
    assert len([r for r in caplog.records if "applies its own default" in r.getMessage()]) == 1


def test_what_was_said_is_sent_even_where_it_is_what_bon_would_do_anyway(server):
    said = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    generate(HTTPEngine(server.url), **said)
    assert said.items() <= server.posts[0].body.items()
    assert Sampling(**said).to_dict() == said
    assert Sampling.of(said).drawing == Sampling().drawing, "which is what an engine in this process does unasked"


def test_a_server_passes_on_what_its_client_said_and_no_more(server, http):
    with served(BestOfN(http, ScriptedEngine(), n=1), model_names=("m",)) as site:
        assert site.chat().status_code == 200
        assert site.chat(temperature=1.0).status_code == 200
    assert ["temperature" in post.body for post in server.posts] == [False, True]


# --- what they say apart ---


def chat(content, finish_reason="stop", **message):
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": finish_reason}]}


def test_a_refusal_is_said_and_reaches_the_client_as_one(server, http):
    server.refuse = lambda seen: chat(None, refusal="I cannot help with that.")
    result = BestOfN(http, ScriptedEngine(), n=2)("Write about a fox")
    assert {score.reason for score in result.scores} == {"the model refused: I cannot help with that."}
    with served(BestOfN(http, ScriptedEngine(), n=2), model_names=("m",)) as site:
        message = site.openai().chat.completions.create(model="m", messages=MERGED).choices[0].message
        assert message.refusal == "I cannot help with that."
        assert '"refusal":"I cannot help with that."' in site.chat(stream=True).text


def test_thinking_reaches_the_client_beside_the_answer(server, http):
    server.refuse = lambda seen: chat("A fox.", reasoning_content="Foxes are red.")
    with served(BestOfN(http, ScriptedEngine(), n=1), model_names=("m",)) as site:
        assert site.chat().json()["choices"][0]["message"]["reasoning_content"] == "Foxes are red."
        assert '"reasoning_content":"Foxes are red."' in site.chat(stream=True).text


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_an_answer_whose_tokens_all_went_into_thinking_says_what_to_raise(server, http, field):
    server.refuse = lambda seen: chat("", "length", **{field: "Let me see"})
    policy = BestOfN(http, ScriptedEngine(), n=2)("Write about a fox")
    scored = BestOfN(ScriptedEngine(["A fox."]), Flip(http), n=1)("Write about a fox")
    for score in (*policy.scores, *scored.scores):
        assert score.reason == "no text: all its tokens went into thinking; raise max_tokens"


def test_a_stream_keeps_thinking_and_refusal_apart_from_the_text(server):
    pieces = [{"reasoning_content": "Let me "}, {"reasoning_content": "see"}, {"content": "no"}, {"refusal": "never"}]
    events = [json.dumps({"choices": [{"delta": piece}]}).encode() for piece in pieces]
    server.faults += [Stream([*events, b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}', b"[DONE]"])]
    done = generate(HTTPEngine(server.url), keep=lambda partial: True)
    assert (done.text, done.reasoning, done.refusal) == ("no", "Let me see", "never")


# --- what a policy behind HTTP can honour ---


def test_template_variables_and_likely_tokens_are_honoured(server, http):
    likely = [{"token": "A", "logprob": -0.1, "bytes": [65]}, {"token": "B", "logprob": -2.5, "bytes": [66]}]
    known = {"content": [{"token": "A", "logprob": -0.1, "bytes": [65], "top_logprobs": likely}]}
    server.refuse = lambda seen: {
        "choices": [{"message": {"content": "A"}, "finish_reason": "stop", "logprobs": known}]
    }
    with served(BestOfN(http, ScriptedEngine(), n=1), model_names=("m",)) as site:
        answer = site.chat(logprobs=True, top_logprobs=2, chat_template_kwargs={"enable_thinking": False})
    body = server.posts[0].body
    assert (body["top_logprobs"], body["chat_template_kwargs"]) == (2, {"enable_thinking": False})
    assert answer.json()["choices"][0]["logprobs"] == {**known, "refusal": None}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
SEEN = [{"role": "user", "content": [{"type": "text", "text": "What is on this?"}, IMAGE]}]


def test_images_reach_a_policy_behind_http_and_the_scorer_reads_the_text_beside_them(server, http):
    with served(BestOfN(http, ScriptedEngine(), n=1), model_names=("m",)) as site:
        answer = site.openai().chat.completions.create(model="m", messages=SEEN)
    assert server.posts[0].body["messages"] == SEEN
    assert answer.best_of_n["instruction"] == "What is on this?"


def test_a_system_message_that_is_merged_stands_before_the_images(server):
    server.refuse = lambda seen: error(400, "no system role") if len(seen.body["messages"]) > 1 else None
    bodies, _ = asked_twice(server, [BY_SYSTEM[0], *SEEN])
    [merged] = bodies[-1]["messages"]
    assert merged["content"] == [{"type": "text", "text": "Be brief.\n\n"}, *SEEN[0]["content"]]


def test_an_engine_in_this_process_says_that_it_sees_no_images():
    with served(BestOfN(ScriptedEngine(), ScriptedEngine(), n=1), model_names=("m",)) as site:
        answer = site.http.post("/v1/chat/completions", json={"messages": SEEN})
    assert answer.status_code == 400
    assert "has images, and" in answer.json()["error"]["message"]


def test_template_variables_of_the_client_are_never_left_out(server):
    said = "Unrecognized request argument supplied: chat_template_kwargs"
    server.refuse = lambda seen: error(400, said) if "chat_template_kwargs" in seen.body else None
    done = generate(HTTPEngine(server.url), extra={"chat_template_kwargs": {"enable_thinking": False}})
    assert said in str(done.error)


def test_a_policy_without_log_probabilities_is_noticed_by_its_first_candidate(server, http):
    """Everything was sampled and scored, and then refused."""
    server.refuse = lambda seen: chat("A fox.") if seen is server.posts[0] else "hang"
    scorer = ScriptedEngine()
    with served(BestOfN(http, scorer, n=4), model_names=("m",)) as site:
        answer = site.chat(logprobs=True)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprobs")
        assert all(post.aborted.wait(10) for post in server.posts[1:])
    assert scorer.calls <= 1


# --- what they send ---

HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: %s\r\n\r\n"
PIECE = b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n'
FLOODS = {
    "a body": Raw(HEAD % b"application/json" + b'{"choices": [{"message": {"content": "', b"x" * 65536),
    "a body of many objects": Raw(HEAD % b"application/json" + b'{"choices": [', b"{}," * 20_000),
    "a line": Raw(HEAD % b"text/event-stream" + b"data: ", b"x" * 65536),
    "a stream": Raw(HEAD % b"text/event-stream", PIECE * 1000),
    "a stream that says nothing": Raw(HEAD % b"text/event-stream", b": alive\n\n" * 1000),
    "an error": Raw(b"HTTP/1.1 500 Oops\r\nConnection: close\r\n\r\n", b"x" * 65536),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("keep", [None, lambda partial: True], ids=["plain", "streamed"])
def test_an_answer_without_end_is_given_up_soon_after_what_was_asked_for(server, flood, keep):
    """An endless body took 3.3 GB, a line without end 0.7 GB."""
    server.refuse = lambda seen: flood
    done = generate(HTTPEngine(server.url, retries=0), keep=keep, max_tokens=100)
    assert "sent " in str(done.error)
    assert server.sent < 12 << 20, "of which the buffers between the two hold a part"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_what_is_compressed_is_refused_unread(server, encoding):
    """One megabyte unpacked to 4.9 GB."""
    bomb = gzip.compress(bytes(32 << 20))
    for status in (200, 500):
        server.faults += [Reply(status, bomb, {"Content-Encoding": encoding})]
        done = generate(HTTPEngine(server.url, retries=0))
        assert done.finish_reason == "error"
        assert len(str(done.error)) < 200


def test_a_list_of_models_without_end_is_given_up(server, monkeypatch):
    monkeypatch.setattr(FakeServer, "completion", lambda *_: {})
    server.models = [{"id": "x" * 1000}] * 20_000
    done = generate(HTTPEngine(server.url, retries=0))
    assert "more than 8388608 bytes" in str(done.error)


ODD = {
    "a reason that is no UTF-8": Raw(b"HTTP/1.1 400 \xff\xfe\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"),
    "no HTTP": Raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a head without end": Raw(b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 100_000),
    "a status of its own": Raw(b"HTTP/1.1 999 Oops\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"),
    "another protocol": Raw(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc"),
    "a teapot": error(418, "I am a teapot"),
    "somewhere else": Reply(302, b"", {"Location": "http://127.0.0.1:9/login"}),
    "moderation": error(403, "your input was flagged"),
    "a payment wall": error(402, "insufficient credits"),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_whatever_answers_one_sample_fails_that_one_only(server, http, odd):
    """A 403 of a moderation for one candidate ended the scoring of all candidates of all prompts."""
    server.refuse = lambda seen: odd if "bad" in str(seen.body) else None
    server.text = lambda seen, draw: "Write about a fox"
    policy = ScriptedEngine(["good", "bad", "fine"])
    result = BestOfN(policy, Flip(http), n=3, prune=False)("Write about a fox")
    assert [score.status for score in result.scores] == ["ok", "failed", "ok"]
    assert server.url in result.scores[1].reason


TOKEN = {"token": "A", "logprob": -0.5, "bytes": [65], "top_logprobs": [{"token": "A", "logprob": -0.5}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAID = {"role": "assistant", "content": "A", "tool_calls": [CALL], "refusal": None, "reasoning_content": "hm"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
CHOICE = {"index": 0, "finish_reason": "stop", "token_ids": [1], "logprobs": {"content": [TOKEN]}}
WEIRD = (None, True, -1, 1.5, 10**30, "", "\x00\u202e", [], {}, [None], [5], {"a": [{}]})


def spoilt(answer):
    """The answer with each of its parts replaced by everything that does not belong there."""
    yield from WEIRD
    inner = answer.items() if isinstance(answer, dict) else enumerate(answer) if isinstance(answer, list) else ()
    for place, part in inner:
        for odd in spoilt(part):
            copy = answer.copy()
            copy[place] = odd
            yield copy


def test_no_part_of_an_answer_can_be_such_that_more_than_its_candidate_fails(server):
    answers = [*spoilt({"choices": [{**CHOICE, "message": SAID}], "usage": USAGE})]
    server.faults += [json.dumps(answer).encode() for answer in answers]
    sampling = {"logprobs": True, "extra": {"top_logprobs": 1}}
    policy = HTTPEngine(server.url, retries=0, n_per_request=1)
    try:
        result = BestOfN(policy, "consensus", n=len(answers), sampling=sampling)("Write about a fox")
    finally:
        run(policy.aclose())
    assert len(answers) > 300
    assert len(result.candidates) == len(answers)
    assert {c.finish_reason for c in result.candidates} == {"stop", "error"}
    assert all(c.error for c in result.candidates if c.finish_reason == "error")
    assert orjson.dumps(result.to_dict())
    assert result.usage.total_tokens < 10 * len(answers)


def test_no_part_of_an_event_can_be_such_that_more_than_its_candidate_fails(server):
    ending = b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}'
    for event in spoilt({"choices": [{**CHOICE, "delta": {"content": "A", "reasoning": "hm"}}], "usage": USAGE}):
        server.faults.append(Stream([json.dumps(event).encode(), ending, b"[DONE]"]))
    count, engine = len(server.faults), HTTPEngine(server.url, retries=0)

    async def collect():
        try:
            return [one async for one in engine.generate([Request(PROMPT, n=count)], keep=lambda partial: True)]
        finally:
            await engine.aclose()

    done = asyncio.run(collect())
    assert len(done) == count > 200
    assert {one.finish_reason for one in done} == {"stop", "error"}


def test_half_a_surrogate_pair_in_each_of_two_events_costs_one_candidate(server):
    """Each half was accepted, and the two together could not be encoded: a 500, and a cut stream."""
    halves = [b'{"choices": [{"delta": {"content": "\\ud83d"}}]}', b'{"choices": [{"delta": {"content": "\\ude00"}}]}']
    server.faults += [Stream([*halves, b"[DONE]"])]
    done = generate(HTTPEngine(server.url, retries=0), keep=lambda partial: True)
    assert (done.finish_reason, done.text) == ("error", "")


def test_a_prompt_that_a_server_counts_as_too_long_is_said_to_be_so_whatever_status_that_has(server):
    said = "This model's maximum context length is 100 tokens. However, you requested 170 tokens (120 in the messages)."
    server.refuse = lambda seen: error(413, said)
    done = generate(HTTPEngine(server.url))
    assert isinstance(done.error, PromptTooLongError)


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_file_run_goes_on_after_whatever_answers_one_row(server, odd, tmp_path, capsys):
    server.refuse = lambda seen: odd if "number 1" in str(seen.body) else None
    source = write_rows(tmp_path / "in.jsonl", [{"id": i, "prompt": f"number {i}"} for i in range(4)])
    policy = ["--policy", f"{server.url},retries=0", "--scorer", "consensus", "-n", "2"]
    main(["run", str(source), *policy, "-o", str(tmp_path / "out.jsonl"), "--skip-bad"])
    assert sorted(row["id"] for row in rows_of(tmp_path / "out.jsonl")) == [0, 2, 3]
    assert f"in.jsonl:2: {server.url}" in capsys.readouterr().err
