"""The reward as a service: /v1/score and /v1/rerank, with the bodies that vLLM, Jina and Cohere document."""

import json
import logging
import shutil
import subprocess
import threading

import pytest
from serving import httpx, served, until
from test_serve import at, example
from test_serve_bad_requests import complains

from bon import BestOfN, Flip
from bon.engines.scripted import ScriptedEngine
from bon.scorers.base import Needs, Scorer
from bon.serve.logs import JsonFormatter
from bon.types import Score

QUERY = "Write about a quick red fox"
TEXTS = ["a fox", "a quick red fox", "nothing of it", ""]


class Trap(Scorer):
    """Raises for a prompt that says so, and notes how many candidates come in one call."""

    def __init__(self):
        self.calls = []

    async def score(self, pending):
        self.calls.append(len(pending))
        for position, each in enumerate(pending):
            if "trap" in each.task.instruction:
                raise ValueError("a secret of the server's")
            yield position, Score(float(len(each.candidate.text)))


class Compared(Scorer):
    """Compares with the reference."""

    needs = Needs(reference=True)

    async def score(self, pending):
        for position, each in enumerate(pending):
            yield position, Score(float(each.candidate.text == each.task.reference))


@pytest.fixture(scope="module")
def site():
    engine = ScriptedEngine()
    with served(BestOfN(engine, "flip", n=2), model_names=("bon-mini",), max_n=8, deadline_s=60) as it:
        yield it


def post(site, path, **body):
    return site.http.post(f"/v1/{path}", json=body)


def scores(site, **body):
    answer = post(site, "score", **body)
    assert answer.status_code == 200, answer.text
    return [item["score"] for item in answer.json()["data"]]


def test_rerank_answers_the_body_that_jina_and_cohere_document_best_first(site):
    body = {"model": "bon-mini", "query": QUERY, "documents": TEXTS, "top_n": 2, "return_documents": True}
    answer = post(site, "rerank", **body).json()
    assert answer["model"] == "bon-mini"
    assert [(r["index"], r["document"]) for r in answer["results"]] == [
        (1, {"text": "a quick red fox"}),
        (0, {"text": "a fox"}),
    ]
    rewards = [r["relevance_score"] for r in answer["results"]]
    assert rewards == sorted(rewards, reverse=True)
    assert answer["results"][0]["best_of_n"]["inferred"] == "a quick red fox"
    usage = answer["usage"]
    assert usage["total_tokens"] == sum(usage["scorer"].values()) > 0
    assert usage["policy"] == {"prompt_tokens": 0, "completion_tokens": 0}, "nothing was sampled"
    every = post(site, "rerank", query=QUERY, documents=[{"text": text} for text in TEXTS], return_documents=False)
    assert [r["index"] for r in every.json()["results"]][:2] == [1, 0]
    assert "document" not in every.json()["results"][0]
    assert len(post(site, "rerank", query=QUERY, documents=TEXTS, top_n=0).json()["results"]) == 4, "as in vLLM"


def test_a_text_without_a_reward_is_null_with_its_reason_and_comes_last(site):
    answer = post(site, "rerank", query=QUERY, documents=["", *TEXTS[:2]]).json()
    last = answer["results"][-1]
    assert (last["index"], last["relevance_score"]) == (0, None)
    assert (last["best_of_n"]["status"], last["best_of_n"]["reason"]) == ("empty", "no text")
    assert answer["best_of_n"]["statuses"]["empty"] == 1
    assert scores(site, text_1=QUERY, text_2=["", "a fox"])[0] is None


def test_score_takes_the_bodies_that_vllm_documents(site):
    one = post(site, "score", model="bon-mini", text_1=QUERY, text_2="a fox").json()
    assert (one["object"], one["data"][0]["object"], one["data"][0]["index"]) == ("list", "score", 0)
    [fox] = scores(site, queries=QUERY, documents=["a fox"])
    assert one["data"][0]["score"] == fox
    [whole] = scores(site, text_1=QUERY, text_2="a quick red fox")
    assert scores(site, text_1=QUERY, text_2=TEXTS[:2]) == [fox, whole], "one with many"
    assert scores(site, text_1=[QUERY], text_2=TEXTS[:2]) == [fox, whole]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUERY}]
    assert scores(site, text_1=turns, text_2=TEXTS[:2]) == [fox, whole], "a conversation"
    pairs = scores(site, text_1=[QUERY, "Name a tree", QUERY], text_2=["a quick red fox", "an oak tree", "a fox"])
    assert pairs == [whole, scores(site, text_1="Name a tree", text_2="an oak tree")[0], fox], "pairs, in their order"


def test_answers_to_the_same_prompt_are_scored_beside_each_other_and_refer_to_places_of_the_request(site):
    answer = post(site, "score", text_1=["x y", QUERY, QUERY], text_2=["x", "a fox", "a fox"]).json()
    assert [about["n"] for about in answer["best_of_n"]] == [1, 2]
    assert [about["best"] for about in answer["best_of_n"]] == [0, 1]
    assert [item["best_of_n"]["same_as"] for item in answer["data"]] == [None, None, 1]
    assert [item["best_of_n"]["index"] for item in answer["data"]] == [0, 1, 2]


def test_many_groups_are_scored_in_one_call_and_one_that_fails_leaves_the_others(caplog):
    trap = Trap()
    groups = [
        {"prompt": "How long?", "candidates": ["a", "bbb", {"text": "cc"}]},
        {"messages": [{"role": "user", "content": "a trap"}], "candidates": ["x", "y"]},
        {"prompt": "And this?", "candidates": ["four"]},
    ]
    with served(BestOfN(ScriptedEngine(), trap, n=1)) as site:
        answer = post(site, "score", groups=groups)
        assert answer.status_code == 200, answer.text
        first, failed, last = answer.json()["data"]
        assert trap.calls[0] == 6, "all of them in one call"
        assert (first["scores"], last["scores"]) == ([1.0, 3.0, 2.0], [4.0])
        assert (first["error"], last["error"]) == (None, None)
        assert failed["scores"] == [None, None]
        assert failed["error"]["code"] == "internal_error"
        assert {item["status"] for item in failed["best_of_n"]} == {"failed"}
        assert "secret" not in answer.text
        assert [about and about["best"] for about in answer.json()["best_of_n"]] == [1, None, 0]
        assert "run failed" in caplog.text
        assert site.metric("bon_runs_total", outcome="ok") == 2
        assert site.metric("bon_runs_total", outcome="internal_error") == 1
        assert site.http.get("/ready").status_code == 200
        pairs = post(site, "score", text_1=["fine", "a trap"], text_2=["ab", "x"]).json()["data"]
        assert [item["score"] for item in pairs] == [2.0, None]
        assert pairs[1]["best_of_n"]["reason"]
        assert post(site, "score", groups=groups[1:2]).status_code == 500, "where none succeeds, it is the answer's own"


def test_scores_are_those_of_python(site):
    ours = BestOfN(ScriptedEngine(), "flip", n=2, prune=False).rerank(QUERY, TEXTS)
    assert scores(site, text_1=QUERY, text_2=TEXTS) == [score.reward for score in ours.scores]


def test_a_request_chooses_its_scorer_and_instruction(site):
    about = {"instruction": "a quick red fox", "scorer": "likelihood"}
    answer = post(site, "rerank", query=QUERY, documents=TEXTS[:2], best_of_n=about).json()
    assert answer["best_of_n"]["scorer"] == "likelihood"
    assert answer["best_of_n"]["instruction"] == "a quick red fox"
    assert all(r["relevance_score"] < 0 for r in answer["results"]), "log-probabilities"


def test_a_reference_reaches_the_scorer_that_compares_with_one():
    with served(BestOfN(ScriptedEngine(), Compared(), n=1)) as site:
        body = {"text_1": "2 + 2?", "text_2": ["4", "5"]}
        assert scores(site, **body, best_of_n={"reference": "4"}) == [1.0, 0.0]
        assert "reference" in complains(post(site, "score", **body), None)["message"]
        groups = [
            {"prompt": "2 + 3?", "candidates": ["4", "5"], "reference": "5"},
            {"prompt": "x", "candidates": ["y"]},
        ]
        right, without = post(site, "score", groups=groups).json()["data"]
        assert (right["scores"], without["scores"]) == ([0.0, 1.0], [None])
        assert "reference" in without["error"]["message"]


BAD = {
    "no query": ("rerank", {"documents": ["a"]}, "query"),
    "an empty query": ("rerank", {"query": "", "documents": ["a"]}, "query"),
    "a blank query": ("rerank", {"query": " ", "documents": ["a"]}, "query"),
    "a query that is a number": ("rerank", {"query": 5, "documents": ["a"]}, "query"),
    "no documents": ("rerank", {"query": "a"}, "documents"),
    "empty documents": ("rerank", {"query": "a", "documents": []}, "documents"),
    "documents that are one text": ("rerank", {"query": "a", "documents": "b"}, "documents"),
    "a document that is no text": ("rerank", {"query": "a", "documents": ["b", 5]}, "documents[1]"),
    "a document without a text": ("rerank", {"query": "a", "documents": [{}]}, "documents[0].text"),
    "a document with a title": (
        "rerank",
        {"query": "a", "documents": [{"text": "b", "title": "c"}]},
        "documents[0].title",
    ),
    "too many documents": ("rerank", {"query": "a", "documents": ["b"] * 9}, "documents"),
    "negative top_n": ("rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
    "a limit that cannot be honoured": (
        "rerank",
        {"query": "a", "documents": ["b"], "max_tokens_per_doc": 5},
        "max_tokens_per_doc",
    ),
    "an unknown scorer": (
        "rerank",
        {"query": "a", "documents": ["b"], "best_of_n": {"scorer": "magic"}},
        "best_of_n.scorer",
    ),
    "an unknown option": ("rerank", {"query": "a", "documents": ["b"], "best_of_n": {"n": 2}}, "best_of_n.n"),
    "a foreign instruction": (
        "rerank",
        {"query": "a", "documents": ["b"], "best_of_n": {"instruction": "z"}},
        "best_of_n.instruction",
    ),
    "a deadline above the server's": (
        "score",
        {"text_1": "a", "text_2": "b", "best_of_n": {"deadline_s": 61}},
        "best_of_n.deadline_s",
    ),
    "an unknown model": ("score", {"text_1": "a", "text_2": "b", "model": "gpt-5"}, "model"),
    "nothing": ("score", {}, "text_1"),
    "no answers": ("score", {"text_1": "a"}, "text_2"),
    "two names": ("score", {"text_1": "a", "queries": "a", "text_2": "b"}, "text_1"),
    "no texts": ("score", {"text_1": "a", "text_2": []}, "text_2"),
    "numbers for texts": ("score", {"text_1": "a", "text_2": [1, 2]}, "text_2[0]"),
    "pairs that do not match": ("score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
    "a number among prompts": ("score", {"text_1": ["a", 5], "text_2": ["c", "d"]}, "text_1[1]"),
    "a blank prompt among others": ("score", {"text_1": ["a", " "], "text_2": ["c", "d"]}, "text_1[1]"),
    "messages of nobody": (
        "score",
        {"queries": [{"role": "wizard", "content": "x"}], "documents": "b"},
        "queries[0].role",
    ),
    "too many texts": ("score", {"queries": "a", "documents": ["b"] * 9}, "documents"),
    "groups and texts": ("score", {"groups": [{"prompt": "a", "candidates": ["b"]}], "text_1": "a"}, "text_1"),
    "no groups": ("score", {"groups": []}, "groups"),
    "a group without a prompt": ("score", {"groups": [{"candidates": ["b"]}]}, "groups[0].prompt"),
    "a group with two prompts": (
        "score",
        {"groups": [{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "candidates": ["b"]}]},
        "groups[0].prompt",
    ),
    "a group without candidates": ("score", {"groups": [{"prompt": "a", "candidates": []}]}, "groups[0].candidates"),
    "a group with too many": (
        "score",
        {"groups": [{"prompt": "a", "candidates": ["b"]}, {"prompt": "a", "candidates": ["b"] * 9}]},
        "groups[1].candidates",
    ),
    "messages of a group": (
        "score",
        {"groups": [{"messages": [{"role": "user", "content": 5}], "candidates": ["b"]}]},
        "groups[0].messages[0].content",
    ),
    "an instruction of a group": (
        "score",
        {"groups": [{"prompt": "a", "candidates": ["b"], "instruction": "z"}]},
        "groups[0].instruction",
    ),
    "an instruction of all groups": (
        "score",
        {"groups": [{"prompt": "a", "candidates": ["b"]}], "best_of_n": {"instruction": "a"}},
        "best_of_n.instruction",
    ),
    "more candidates than a request may have": (
        "score",
        {"groups": [{"prompt": "a", "candidates": ["b"] * 8}] * 257},
        "groups",
    ),
}


@pytest.mark.parametrize(("path", "body", "param"), BAD.values(), ids=BAD)
def test_a_bad_field_is_named(site, path, body, param):
    complains(post(site, path, **body), param, 404 if param == "model" else 400)
    assert site.server.admission.running == site.server.admission.waiting == 0


def test_a_misspelt_field_of_a_group_is_told_its_name(site):
    error = complains(post(site, "score", groups=[{"prompt": "a", "candidate": ["b"]}]), "groups[0].candidate")
    assert "Did you mean 'candidates'?" in error["message"]


def test_a_prompt_beyond_the_context_costs_its_candidates_their_rewards_and_no_others():
    scorer = Flip(ScriptedEngine(max_model_len=200))
    with served(BestOfN(ScriptedEngine(), scorer, n=1)) as site:
        body = post(site, "score", text_1=QUERY, text_2=["a fox", "word " * 300]).json()
        assert body["data"][0]["score"] > 0
        assert body["data"][1]["score"] is None
        assert "tokens" in body["data"][1]["best_of_n"]["reason"]


def test_a_client_that_leaves_stops_the_scorer():
    scorer = ScriptedEngine(["word " * 10_000], step_seconds=0.01)
    with served(BestOfN(ScriptedEngine(), Flip(scorer), n=1)) as site:
        with pytest.raises(httpx.ReadTimeout):
            site.http.post("/v1/rerank", json={"query": QUERY, "documents": TEXTS}, timeout=0.5)
        until(lambda: scorer.calls and scorer.running == 0)
        until(lambda: site.metric("bon_runs_total", outcome="client_gone") == 1)
        assert site.server.admission.running == 0


def test_a_deadline_leaves_what_was_scored_or_is_a_408():
    def script(text, draw):
        return "red fox" if text.rstrip().endswith("fox") else "word " * 10_000

    with served(BestOfN(ScriptedEngine(), Flip(ScriptedEngine(script, step_seconds=0.01)), n=1)) as site:
        body = {"text_1": QUERY, "best_of_n": {"deadline_s": 0.5}}
        some = post(site, "score", text_2=["a fox", "another"], **body).json()
        assert some["data"][0]["score"] > 0
        assert (some["data"][1]["score"], some["data"][1]["best_of_n"]["status"]) == (None, "late")
        assert some["best_of_n"][0]["deadline_passed"] is True
        late = post(site, "score", text_2=["another"], **body)
        assert (late.status_code, late.json()["error"]["param"]) == (408, "best_of_n.deadline_s")


def test_beyond_the_queue_a_client_is_told_when_to_come_back():
    scorer = ScriptedEngine(["word " * 100], step_seconds=0.01)
    with served(BestOfN(ScriptedEngine(), Flip(scorer), n=1), max_running=1, max_waiting=0) as site:
        running = threading.Thread(target=post, args=(site, "score"), kwargs={"text_1": "x y", "text_2": "x"})
        running.start()
        until(lambda: site.server.admission.running == 1)
        refused = post(site, "rerank", query="x", documents=["y"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        running.join(10)


def test_a_model_that_fails_is_a_503():
    with served(BestOfN(ScriptedEngine(), Flip(ScriptedEngine(fail_after=0)), n=1)) as site:
        answer = post(site, "rerank", query=QUERY, documents=["a fox"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_error")
        until(lambda: site.http.get("/ready").status_code == 503)


def test_keys_log_lines_and_metrics_are_those_of_the_other_endpoints(caplog):
    caplog.set_level("INFO", "bon.serve")
    with served(BestOfN(ScriptedEngine(), "flip", n=1), api_keys=("secret",)) as site:
        for path in ("score", "rerank"):
            assert post(site, path).json()["error"]["code"] == "invalid_api_key"
        answer = site.http.post(
            "/v1/rerank", json={"query": QUERY, "documents": TEXTS}, headers={"authorization": "Bearer secret"}
        )
        assert answer.status_code == 200
        until(lambda: site.metric("bon_http_requests_total", path="/v1/rerank", status="200") == 1)
        assert site.metric("bon_candidates_total", finish_reason="stop") == 0, "none was sampled"
        assert site.metric("bon_scores_total", status="empty") == 1
    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records if r.levelno == logging.INFO]
    [line] = [line for line in lines if line.get("status") == 200 and line["path"] == "/v1/rerank"]
    assert (line["n"], line["scorer"]) == (4, "flip")
    assert line["scorer_tokens"] > 0
    assert QUERY not in json.dumps(lines)


def test_the_openapi_document_describes_them(site):
    document = site.http.get("/openapi.json").json()
    for path, takes in (("/v1/score", "ScoreRequest"), ("/v1/rerank", "RerankRequest")):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith(takes)
        assert takes in document["components"]["schemas"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_readmes_curl_command_runs(site):
    command = at(site, example("sh", "curl http://127.0.0.1:8000/v1/rerank")).strip() + " -s"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=30, check=True)
    assert len(json.loads(done.stdout)["results"]) == 2
