import asyncio
import json
import logging
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
from serving import openai, served

from bon import BackwardLikelihood, BestOfN, Fixed, Flip, RewardFunction, Sampling, StopAt
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError
from bon.serve import Settings
from bon.serve.answers import usage_body
from bon.serve.app import create_app
from bon.serve.failures import public
from bon.serve.logs import JsonFormatter
from bon.serve.plan import offered_scorers, public_name
from bon.serve.protocol import ChatRequest, CompletionRequest
from bon.spec import SCORERS, SELECTORS
from bon.types import Usage

PROMPT = "Write a short poem about the red fox"


def test_a_copy_with_other_settings_shares_the_engines():
    bon = BestOfN(ScriptedEngine(["a", "b"]), "flip", n=StopAt(1.0, most=8), sampling=Sampling(top_p=0.5))
    copy = bon.replace(n=2, prune=False)
    assert (copy.policy, copy.scorer) == (bon.policy, bon.scorer)
    assert (copy.budget, copy.prune, copy.sampling) == (Fixed(2), False, bon.sampling)
    assert (bon.budget, bon.prune) == (StopAt(1.0, most=8), True), "the original is as it was"
    assert bon.replace(min_reward=2.0)(PROMPT).best is None, "another minimum"
    by_length = RewardFunction(lambda prompt, texts: [len(t) for t in texts])
    assert bon.replace(scorer=by_length)("x").reward == 1
    with pytest.raises(InputError, match="n must be"):
        bon.replace(n=0)
    with pytest.raises(TypeError, match="tempo"):
        bon.replace(tempo=1)


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_deadline_returns_the_best_so_far_and_stops_the_rest(concurrent):
    answers = ["red fox", "fox", "a very long answer " * 100, "another long one " * 100]
    policy = ScriptedEngine(answers, step_seconds=0.01)
    flip = ScriptedEngine(step_seconds=0.0)
    flip.concurrent = policy.concurrent = concurrent
    bon = BestOfN(policy, flip, n=4)
    result = asyncio.run(bon.run(PROMPT, deadline=0.3))
    assert policy.decoded < 400, "of the 700 words of all answers"
    assert [s.status for s in result.scores[2:]] == ["late", "late"]
    assert "0.3 s passed before it was finished" in result.scores[3].reason
    assert policy.running == flip.running == 0, "nothing goes on after the deadline"
    if concurrent:
        assert (result.text, result.counts) == ("red fox", {"echo": 2, "late": 2})
    else:
        assert (result.text, result.counts) == (None, {"late": 4}), "it would have been scored after the last candidate"
        assert result.candidates[0].text == "red fox", "what was sampled is kept"


def test_a_deadline_that_does_not_pass_changes_nothing():
    bon = BestOfN(ScriptedEngine(["red fox", "red fox"]), "flip", n=2)
    result = asyncio.run(bon.run(PROMPT, deadline=60))
    assert result.counts == {"echo": 2}


# The API, through the front door: a real uvicorn and the official client.


def script(text, draw):
    """Answers carry the prompt's last word, so that a crossed answer would show; the first ones are worse."""
    _, inversion, response = text.rpartition("Response:\n")
    if inversion:
        return response
    words = text.split()
    return " ".join(words[-(draw + 1) :])


@pytest.fixture(scope="module")
def site():
    bon = BestOfN(ScriptedEngine(script), "flip", n=4, sampling=Sampling(max_tokens=50))
    with served(bon, model_names=("bon-mini", "alias")) as it:
        yield it


MESSAGES = [{"role": "user", "content": "Write about a quick red fox"}]


def test_the_official_client_gets_the_best_of_n(site):
    answer = site.openai().chat.completions.create(model="bon-mini", messages=MESSAGES)
    assert answer.choices[0].message.content == "a quick red fox"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "bon-mini"
    assert answer.best_of_n["n"] == 4
    assert answer.best_of_n["reward"] == pytest.approx(0.75)
    assert answer.best_of_n["choices"][0]["inferred"] == "a quick red fox"
    assert "candidates" not in answer.best_of_n, "only on request"


def test_the_official_client_works_asynchronously(site):
    async def ask():
        async with site.async_openai() as client:
            calls = [
                client.chat.completions.create(
                    model="bon-mini", messages=[{"role": "user", "content": f"Write about token{i}"}]
                )
                for i in range(20)
            ]
            return await asyncio.gather(*calls)

    answers = asyncio.run(ask())
    assert [a.choices[0].message.content.split()[-1] for a in answers] == [f"token{i}" for i in range(20)]


def test_the_official_client_streams(site):
    stream = site.openai().chat.completions.create(
        model="bon-mini", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "a quick red fox"
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) == 4, "in pieces"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens > 0
    assert chunks[-2].best_of_n["reward"] == pytest.approx(0.75)
    assert len({c.id for c in chunks}) == 1


def test_the_official_clients_stream_helper_accumulates_the_answer(site):
    with site.openai().chat.completions.stream(model="bon-mini", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "a quick red fox"


def test_text_completions_work_and_stream(site):
    client = site.openai()
    answer = client.completions.create(model="alias", prompt="Write about a quick red fox")
    assert (answer.choices[0].text, answer.object, answer.model) == ("a quick red fox", "text_completion", "alias")
    chunks = list(client.completions.create(model="alias", prompt=["Write about a quick red fox"], stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "a quick red fox"
    assert client.completions.create(model="alias", prompt="one two three", best_of=2).best_of_n["n"] == 2


def test_n_returns_the_n_best_ranked(site):
    answer = site.openai().chat.completions.create(model="bon-mini", messages=MESSAGES, n=3)
    assert [c.message.content for c in answer.choices] == ["a quick red fox", "quick red fox", "red fox"]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    rewards = [c["reward"] for c in answer.best_of_n["choices"]]
    assert rewards == sorted(rewards, reverse=True)
    assert answer.best_of_n["statuses"] == {"echo": 4}, "the k best need every reward, so nothing is pruned"
    more = site.openai().chat.completions.create(model="bon-mini", messages=MESSAGES, n=6)
    assert len(more.choices) == 6, "more than the default number of candidates"
    stream = list(site.openai().chat.completions.create(model="bon-mini", messages=MESSAGES, n=2, stream=True))
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["a quick red fox", "quick red fox"]


def test_sampling_fields_keep_their_meaning(site):
    create = site.openai().chat.completions.create
    cut = create(model="bon-mini", messages=MESSAGES, max_tokens=1)
    assert {c["finish_reason"] for c in cut.best_of_n["choices"]} == {"length"}
    assert cut.choices[0].finish_reason == "length"
    cut = create(model="bon-mini", messages=MESSAGES, max_completion_tokens=2, n=4)
    assert max(len(c.message.content.split()) for c in cut.choices) == 2
    stopped = create(model="bon-mini", messages=MESSAGES, stop="fox")
    assert "fox" not in stopped.choices[0].message.content
    assert create(model="bon-mini", messages=MESSAGES, temperature=0).choices[0].message.content == "fox"
    seeded = [create(model="bon-mini", messages=MESSAGES, seed=7, n=4).choices for _ in range(2)]
    assert [c.message.content for c in seeded[0]] == [c.message.content for c in seeded[1]]
    ignored = create(model="bon-mini", messages=MESSAGES, user="someone", metadata={"a": "b"}, frequency_penalty=0)
    assert ignored.choices[0].message.content == "a quick red fox"
    neutral = {"repetition_penalty": 1.0, "ignore_eos": False}  # vLLM's clients send them
    assert create(model="bon-mini", messages=MESSAGES, extra_body=neutral).choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_answers_tokens(site):
    client = site.openai()
    create = client.chat.completions.create
    assert create(model="bon-mini", messages=MESSAGES).choices[0].logprobs is None
    tokens = create(model="bon-mini", messages=MESSAGES, logprobs=True).choices[0].logprobs.content
    assert [t.token for t in tokens] == ["a", " quick", " red", " fox"]
    assert all(t.logprob < 0 and bytes(t.bytes).decode() == t.token for t in tokens)
    cut = create(model="bon-mini", messages=MESSAGES, logprobs=True, stop=" red").choices[0]
    assert "".join(t.token for t in cut.logprobs.content) == cut.message.content, "none of what the stop string cut"
    chunks = list(create(model="bon-mini", messages=MESSAGES, logprobs=True, stream=True))
    streamed = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == tokens
    old = client.completions.create(model="bon-mini", prompt="Write about a quick red fox", logprobs=0).choices[0]
    assert old.logprobs.tokens == [t.token for t in tokens]
    assert old.logprobs.token_logprobs == [t.logprob for t in tokens]
    assert [old.text[at:] for at in old.logprobs.text_offset][1] == " quick red fox"


def test_the_embedded_models_logprobs_make_up_its_text():
    with served(BestOfN(n=2)) as site:
        choice = site.chat("Write a slogan for a bakery.", logprobs=True, seed=1).json()["choices"][0]
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert "".join(tokens) == choice["message"]["content"]
        assert len(tokens) > 3


def test_the_extension_reaches_the_run(site):
    def ask(**options):
        return site.chat("Write about a quick red fox", best_of_n=options).json()

    assert ask(n=2)["choices"][0]["message"]["content"] == "red fox"
    assert [c["text"] for c in ask(n=2, return_candidates=True)["best_of_n"]["candidates"]] == ["fox", "red fox"]
    assert ask(stop_at=0.1)["best_of_n"]["statuses"].get("pruned", 0) > 0
    assert ask(scorer="likelihood")["best_of_n"]["reward"] < 0
    assert ask(instruction="a quick red fox")["best_of_n"]["reward"] == 1.0


def test_the_number_of_candidates_may_be_the_spec_of_a_budget(site):
    def ask(budget, **fields):
        answer = site.chat("Write about a quick red fox", best_of_n={"n": budget}, **fields)
        return answer.json()["best_of_n"] if answer.status_code == 200 else answer.json()["error"]

    assert (ask("3")["n"], ask("fixed:3")["n"], ask("3", n=2)["n"]) == (3, 3, 3)
    stopped = ask("stop-at:0.1,most=6")
    assert (stopped["n"], stopped["statuses"]["pruned"] > 0) == (6, True)
    assert ask("stop-at:0.9,most=65")["message"] == "best_of_n.n: is 65, and this server samples 64 candidates at most."
    assert "Did you mean 'stop-at'" in ask("stopat:0.9")["message"]
    assert "unknown budget" in ask("os:getcwd")["message"], "nothing is imported for a request"
    assert "the 2 best (n=2) need every reward" in ask("stop-at:0.9", n=2)["message"]


def test_a_candidate_that_is_stopped_because_another_is_good_enough_says_so():
    policy = ScriptedEngine(["red fox", "long " * 500], step_seconds=0.005)
    with served(BestOfN(policy, ScriptedEngine(), n=2)) as site:
        answer = site.chat("the red fox", best_of_n={"stop_at": 0.9, "return_candidates": True}).json()
        assert [c["finish_reason"] for c in answer["best_of_n"]["candidates"]] == ["stop", "abort"]
        assert answer["best_of_n"]["candidates"][1]["status"] == "pruned"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert site.metric("bon_candidates_total", finish_reason="abort") == 1


def test_a_request_that_does_not_say_gets_the_servers_budget():
    with served(BestOfN(ScriptedEngine(script), "flip", n=StopAt(0.1, most=6)), max_n=4) as site:
        planner = site.server.planner

        def budget(kind=ChatRequest, **fields):
            about = {"prompt": "x"} if kind is CompletionRequest else {"messages": MESSAGES}
            return planner.plan(kind(**about, **fields)).bon.budget

        assert budget() == StopAt(0.1, most=6)
        assert budget(best_of_n={"n": 3}) == StopAt(0.1, most=3)
        assert budget(CompletionRequest, best_of=3) == StopAt(0.1, most=3)
        assert budget(best_of_n={"stop_at": 0.5}) == StopAt(0.5, most=6)
        assert budget(best_of_n={"n": "fixed:3"}) == Fixed(3), "a spec says it all"
        assert budget(n=2) == Fixed(6), "the two best are known when all have a reward"
        assert site.http.get("/v1/models").json()["data"][0]["best_of_n"]["max_n"] == 6, "what it does by itself"


def test_an_answer_below_the_minimum_reward_is_refused_in_openais_shape(site):
    answer = site.openai().chat.completions.create(
        model="bon-mini", messages=MESSAGES, extra_body={"best_of_n": {"min_reward": 0.9}}
    )
    assert answer.choices[0].message.content is None
    assert "below the minimum of 0.9" in answer.choices[0].message.refusal
    assert answer.best_of_n["best"] is None
    chunks = site.events("Write about a quick red fox", best_of_n={"min_reward": 0.9})
    assert [c["choices"][0]["delta"] for c in chunks if "refusal" in c["choices"][0]["delta"]] == [
        {"refusal": answer.choices[0].message.refusal}
    ]


def test_usage_is_true_separately_and_in_sum(site):
    answer = site.chat("Write about a quick red fox", n=4).json()
    usage, result = (
        answer["usage"],
        BestOfN(ScriptedEngine(script), "flip", n=4, prune=False)("Write about a quick red fox"),
    )
    assert usage["policy"] == {"prompt_tokens": 6, "completion_tokens": 2 + 3 + 4 + 5}
    assert usage["scorer"]["prompt_tokens"] == result.usage.scorer_prompt_tokens
    assert usage["scorer"]["completion_tokens"] == result.usage.scorer_completion_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == result.usage.total_tokens


def test_cached_tokens_are_part_of_the_prompt_tokens():
    body = usage_body(Usage(10, 20, 30, 40, cached_tokens=25))
    assert (body["prompt_tokens"], body["completion_tokens"], body["total_tokens"]) == (40, 60, 100)
    assert body["prompt_tokens_details"] == {"cached_tokens": 25}


def test_a_server_that_ends_closes_what_its_best_of_n_loaded_and_nothing_of_the_callers(monkeypatch):
    """It closed the engines that were passed in, which others may still use, and never the scorer's own model."""
    closed = []

    async def aclose(engine):
        closed.append(engine)

    monkeypatch.setattr(ScriptedEngine, "aclose", aclose)
    with served(BestOfN(ScriptedEngine(), Flip(ScriptedEngine()), n=1)) as site:
        assert site.chat().status_code == 200
    assert closed == []
    bon = BestOfN("scripted,max_model_len=500", "flip:scripted", n=1)
    with served(bon) as site:
        assert site.chat().status_code == 200
        assert closed == []
    assert closed == [bon.policy, bon.scorer.engine]


def test_clients_never_see_where_a_model_lies(tmp_path):
    assert public_name(str(tmp_path / "my-model")) == "my-model"
    assert public_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert public_name("./models/mine") == "mine"
    assert public("cannot read /srv/models/mine/config.json of 10.0.0.1:80, 1/2 and/or https://a/b") == (
        "cannot read config.json of the model's server, 1/2 and/or the model's server"
    )
    with served(BestOfN(n=1)) as site:
        assert site.http.get("/v1/models").json()["data"][0]["id"] == "bon-mini"


def test_several_prompts_get_their_choices_in_one_answer(site):
    prompts = ["Write about a quick red fox", "Write about token7"]
    answer = site.openai().completions.create(model="bon-mini", prompt=prompts, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == "a quick red fox"
    assert answer.choices[2].text.endswith("token7")
    assert [evidence["instruction"] for evidence in answer.best_of_n] == prompts
    one = site.openai().completions.create(model="bon-mini", prompt=prompts[:1], n=2)
    assert one.best_of_n["instruction"] == prompts[0]
    assert answer.usage.completion_tokens > one.usage.completion_tokens > 0


def test_minus_one_is_what_it_is_elsewhere(site):
    for length in ("max_tokens", "max_completion_tokens"):
        answer = site.chat("Write about a quick red fox", seed=-1, top_k=-1, **{length: -1})
        assert answer.json()["choices"][0]["message"]["content"] == "a quick red fox", answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_has_begun_is_continued_and_scored_as_a_whole(stream):
    """The client gets what comes behind what it sent, as from vLLM; the scorer sees the whole answer."""
    seen = []

    def reward(prompt, responses):
        seen.append((prompt, *responses))
        return [1.0] * len(responses)

    engine = ScriptedEngine(lambda text, draw: f"upon a time {draw}")
    messages = [*MESSAGES, {"role": "assistant", "content": "Once "}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    with served(BestOfN(engine, reward, n=1)) as site:
        create = site.openai().chat.completions.create
        answer = create(model="scripted", messages=messages, stream=stream, extra_body=options)
        chunks = [c.choices[0].delta.content or "" for c in answer if c.choices] if stream else ()
        text = "".join(chunks) if stream else answer.choices[0].message.content
    assert text == "upon a time 0"
    assert seen == [(MESSAGES[0]["content"], "Once upon a time 0")]


def test_content_parts_of_text_are_joined(site):
    parts = [{"type": "text", "text": "Write about "}, {"type": "text", "text": "a quick red fox"}]
    assert site.chat(parts).json()["best_of_n"]["instruction"] == "Write about a quick red fox"


def test_a_message_that_the_client_dumped_can_be_sent_back(site):
    client = site.openai()
    first = client.chat.completions.create(model="bon-mini", messages=MESSAGES).choices[0].message.model_dump()
    again = [*MESSAGES, first, {"role": "user", "content": "Shorter"}]
    assert client.chat.completions.create(model="bon-mini", messages=again).choices[0].message.content == "Shorter"


def test_models_are_listed_with_what_they_can_do(site):
    models = site.openai().models.list().data
    assert [m.id for m in models] == ["bon-mini", "alias"]
    assert models[0].best_of_n == {
        "n": 4,
        "max_n": 64,
        "scorers": ["flip", "likelihood", "judge", "slot", "forward"],
        "scorer": "flip",
    }


def test_requests_may_name_what_else_is_registered_and_can_run_on_the_loaded_models():
    class Samples:
        """An engine that gives no log-probabilities."""

        name, max_model_len, concurrent = "samples", None, True

        def __init__(self):
            self.generate = ScriptedEngine().generate

        async def aclose(self):
            pass

    def scorers(*models):
        return list(offered_scorers(BestOfN(*models)))

    others = ["judge", "slot", "forward"]
    assert scorers(ScriptedEngine()) == ["default", "flip", "likelihood", *others]
    assert scorers(ScriptedEngine(), "flip") == ["flip", "likelihood", *others]
    assert scorers(ScriptedEngine(), Flip(ScriptedEngine(), style="json")) == ["flip", "likelihood", *others]
    assert scorers(ScriptedEngine(), BackwardLikelihood(ScriptedEngine())) == ["likelihood", "flip", *others]
    assert scorers(Samples(), "flip") == ["flip", "judge"], "this model cannot rate"
    assert scorers(lambda prompt: "x") == ["default"]
    assert scorers(ScriptedEngine(), Flip(Samples())) == ["flip", "likelihood", *others], "the policy's can"
    assert scorers(lambda prompt: "x", lambda prompt, texts: texts) == ["<lambda>"], "a function scores nothing"


def test_a_request_names_further_scorers_that_the_server_was_given():
    """Ensembles, consensus and heads could be a server's own scorer and nothing else."""
    further = ("consensus:chrf", "both=ensemble:flip + likelihood,weights=[2, 1]", "shortest")
    with served(BestOfN(ScriptedEngine(), "flip", n=3), scorers=further) as it:
        for name in ("consensus", "both", "shortest", "flip"):
            answer = it.chat("Write about a quick red fox", best_of_n={"scorer": name}).json()
            assert answer["best_of_n"]["scorer"] == name
        prompt = {
            "query": "Write about a quick red fox",
            "documents": ["a fox", "a"],
            "best_of_n": {"scorer": "shortest"},
        }
        ranked = it.http.post("/v1/rerank", json=prompt).json()["results"]
        assert [each["index"] for each in ranked] == [1, 0]


@pytest.mark.parametrize("further", [("flip:samples=2",), ("shortest", "shortest=longest")])
def test_two_scorers_of_one_name_are_refused_at_start(further):
    with pytest.raises(InputError, match="two scorers of the server are called"):
        create_app(BestOfN(ScriptedEngine(), "flip"), Settings(scorers=further))


def test_a_request_names_a_scorer_that_is_listed_and_never_a_spec(site):
    """A spec could load any model, or import any module, on the server's machine."""
    for spec in ("flip:samples=4", "flip:Qwen/Qwen3-0.6B", "likelihood:mini", "statistics:mean", "theirs"):
        refused = site.chat(best_of_n={"scorer": spec})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of_n.scorer")
        assert "there is flip, likelihood" in refused.json()["error"]["message"]


THEIRS = """
from bon.engines.base import Generates
from bon.scorers.base import ModelScorer, Scorer
from bon.types import Score, Selection

class Length(Scorer):
    concurrent = True

    async def score(self, pending):
        for position, each in enumerate(pending):
            yield position, Score(float(len(each.candidate.text)), explanation="it is that long")

class Judge(ModelScorer):
    ability = Generates

    def __init__(self, model=None, **options):
        super().__init__(model, options)

    async def score(self, pending):
        for position, each in enumerate(pending):
            yield position, Score(-float(len(each.candidate.text)))

class Needy(Judge):
    def __init__(self, model, rubric):
        super().__init__(model)

def last(rewards, order, texts):
    return Selection(len(texts) - 1, tuple(order.tolist()))

def pick_last():
    return last
"""


@pytest.fixture
def another_package(tmp_path, monkeypatch):
    """One that is installed and brings scorers and a selector of its own."""
    (tmp_path / "their_package.py").write_text(THEIRS)
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[bon.scorers]\nlength = their_package:Length\ncritic = their_package:Judge\nneedy = their_package:Needy\n"
        "broken = their_package:Nothing\n[bon.selectors]\nlast = their_package:pick_last\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (SCORERS, SELECTORS):
        vars(registry).pop("_others", None)
    yield
    for registry in (SCORERS, SELECTORS):
        vars(registry).pop("_others", None)


def test_scorers_and_selectors_of_another_package_work_in_the_server(another_package, caplog):
    with served(BestOfN(ScriptedEngine(script), "length", n=4)) as site:
        answer = site.chat("Write about a quick red fox").json()
        assert answer["choices"][0]["message"]["content"] == "a quick red fox"
        assert (answer["best_of_n"]["scorer"], answer["best_of_n"]["reward"]) == ("length", 15)
        assert answer["best_of_n"]["choices"][0]["explanation"] == "it is that long"
        assert site.http.get("/v1/models").json()["data"][0]["best_of_n"]["scorers"] == [
            "length",
            "critic",
            "flip",
            "likelihood",
            "judge",
            "slot",
            "forward",
        ]
        answer = site.chat("Write about a quick red fox", best_of_n={"scorer": "critic"}).json()
        assert answer["choices"][0]["message"]["content"] == "fox"
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [name in text for name, text in zip(("needy", "broken"), said, strict=True)] == [True, True], (
        "what cannot be offered is said, and keeps nobody from the rest"
    )
    with served(BestOfN(ScriptedEngine(script), "flip", n=4, selector="last")) as site:
        assert site.chat("Write about a quick red fox").json()["best_of_n"]["best"] == 3


def test_one_model_can_be_looked_up(site):
    client = site.openai()
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="this server has 'bon-mini', 'alias'"):
        client.models.retrieve("Qwen/Qwen3-4B")


def test_errors_reach_the_official_client_as_its_own_types(site):
    client = site.openai()
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="bon-mini", messages=MESSAGES, temperature=-1)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError, match="this server has 'bon-mini', 'alias'"):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="bon-mini", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )


def test_a_stream_tells_of_its_progress_without_disturbing_anyone():
    bon = BestOfN(ScriptedEngine(step_seconds=0.03), "flip", n=4)
    with served(bon, heartbeat_s=0.02, status_s=0.05) as site:
        chunks = site.events("one two three four five six")
        told = [c["best_of_n"] for c in chunks if c.get("best_of_n", {}).get("event")]
        assert told[-1]["sampled"] == 4
        assert all(c["choices"][0]["delta"] == {} for c in chunks if c.get("best_of_n", {}).get("event"))
        body = {"messages": [{"role": "user", "content": "one two three four"}], "stream": True}
        assert b": still here\n\n" in site.http.post("/v1/chat/completions", json=body).content
        assert len(list(site.openai().chat.completions.create(model="scripted", **body))) > 3, "comments are skipped"


def test_a_stream_with_candidates_tells_each_as_it_comes_and_what_matched(site):
    chunks = site.events("Write about a quick red fox", best_of_n={"return_candidates": True})
    told = [c["best_of_n"] for c in chunks if c.get("best_of_n", {}).get("event")]
    assert sorted(t["index"] for t in told if t["event"] == "candidate") == [0, 1, 2, 3]
    scores = {t["index"]: t for t in told if t["event"] == "score"}
    assert scores[1]["inferred"] == "red fox"
    assert scores[1]["matched"] == [[0, 3], [4, 7]]
    assert len(chunks[-1]["best_of_n"]["candidates"]) == 4


def test_a_stream_with_candidates_brings_their_texts_while_they_are_written():
    texts = ["the quick red fox jumps over", "\u00e9t\u00e9 \U0001f98a the lazy dog sleeps"]
    with served(BestOfN(ScriptedEngine(texts, step_seconds=0.05), "flip", n=2), status_s=0) as site:
        told = [c["best_of_n"] for c in site.events("x", best_of_n={"return_candidates": True}) if "best_of_n" in c]
        for index, whole in enumerate(texts):
            about = [t for t in told if t.get("index") == index]
            ended = [t.get("event") for t in about].index("candidate")
            pieces = [t["more"] for t in about if t.get("event") == "text"]
            assert len(pieces) > 1
            assert whole.startswith("".join(pieces))
            assert all(t.get("event") != "text" for t in about[ended:])
        events = {c["best_of_n"].get("event") for c in site.events("x") if "best_of_n" in c}
        assert "text" not in events, "only where they are asked for"


def test_copies_and_empty_candidates_count_in_the_progress():
    """They were never reported, so a stream ended at '2 of 4 sampled'."""
    with served(
        BestOfN(ScriptedEngine(["red fox", "red fox", "", "fox"], step_seconds=0.02), "flip", n=4), status_s=0
    ) as site:
        told = [c["best_of_n"] for c in site.events("the red fox") if c.get("best_of_n", {}).get("event")]
        assert (told[-1]["sampled"], told[-1]["scored"], told[-1]["n"]) == (4, 4, 4)
        chunks = site.events("the red fox", best_of_n={"return_candidates": True})
        told = [c["best_of_n"] for c in chunks if c.get("best_of_n", {}).get("event")]
        for kind in ("candidate", "score"):
            assert sorted(t["index"] for t in told if t["event"] == kind) == [0, 1, 2, 3]
        assert [t["same_as"] for t in told if t["event"] == "score" and t["index"] == 1] == [0]


def test_a_deadline_returns_the_best_so_far_and_says_so():
    answers = ["red fox", "fox", "a very long answer " * 100]
    with served(BestOfN(ScriptedEngine(answers, step_seconds=0.01), ScriptedEngine(), n=3)) as site:
        answer = site.chat("the red fox", best_of_n={"deadline_s": 0.4}).json()
        assert answer["choices"][0]["message"]["content"] == "red fox"
        assert answer["best_of_n"]["deadline_passed"] is True
        assert answer["best_of_n"]["statuses"] == {"late": 1, "echo": 2}
        assert "deadline of 0.4 s passed" in answer["best_of_n"]["reason"]
        nothing = site.chat("the red fox", best_of_n={"deadline_s": 0.001})
        assert (nothing.status_code, nothing.json()["error"]["code"]) == (408, "deadline_exceeded")
        assert site.metric("bon_runs_total", outcome="deadline") == 2


def test_a_candidate_that_nobody_scored_is_better_than_none_at_a_deadline():
    policy, flip = ScriptedEngine(["fine", "long " * 500], step_seconds=0.01), ScriptedEngine(concurrent=False)
    with served(BestOfN(policy, flip, n=2, prune=False)) as site:
        policy.concurrent = False
        answer = site.chat("the red fox", best_of_n={"deadline_s": 0.3}).json()
        assert answer["choices"][0]["message"]["content"] == "fine"
        assert (answer["best_of_n"]["best"], answer["best_of_n"]["reward"]) == (None, None)
        assert "late" in answer["best_of_n"]["reason"]


def test_half_a_character_reaches_the_client_and_the_log():
    """A policy's text that UTF-8 cannot hold was a 500, and in a stream a cut."""
    half = "half \ud83d"
    with served(BestOfN(lambda prompt: half, lambda prompt, responses: [1.0] * len(responses), n=1)) as site:
        assert site.chat().json()["choices"][0]["message"]["content"] == half
        chunks = site.events()
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == half
    record = logging.makeLogRecord({"msg": half, "fields": {5: half}})
    assert json.loads(JsonFormatter().format(record))["message"] == half


def test_keys_are_needed_when_there_are_any():
    with served(BestOfN(ScriptedEngine(), "flip", n=1), api_keys=("secret-1", "secret-2")) as site:
        for key in ("secret-1", "secret-2"):
            assert site.openai(api_key=key).models.list().data
        with pytest.raises(openai.AuthenticationError) as refused:
            site.openai(api_key="wrong").chat.completions.create(model="scripted", messages=MESSAGES)
        assert refused.value.code == "invalid_api_key"
        assert site.http.get("/v1/models").status_code == 401
        assert site.http.get("/v1/models", headers={"authorization": "Basic secret-1"}).status_code == 401
        assert site.http.get("/v1/models", headers={"authorization": b"Bearer \xff"}).status_code == 401
        assert site.http.get("/health").status_code == site.http.get("/ready").status_code == 200


def test_every_response_carries_security_headers_and_a_request_id(site):
    for path in ("/", "/health", "/v1/models", "/nowhere", "/metrics"):
        response = site.http.get(path)
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-request-id"].startswith("req-")
        assert "server" not in response.headers
        assert "access-control-allow-origin" not in response.headers, "CORS is off"
    assert site.http.get("/health", headers={"x-request-id": "mine.1"}).headers["x-request-id"] == "mine.1"
    assert site.http.get("/health", headers={"x-request-id": "a<b>"}).headers["x-request-id"] != "a<b>"


def test_cors_is_for_the_origins_that_were_named():
    with served(BestOfN(ScriptedEngine(), "flip", n=1), cors_origins=("https://ours.example",)) as site:
        ours = site.http.get("/v1/models", headers={"origin": "https://ours.example"})
        assert ours.headers["access-control-allow-origin"] == "https://ours.example"
        theirs = site.http.get("/v1/models", headers={"origin": "https://theirs.example"})
        assert "access-control-allow-origin" not in theirs.headers


def test_a_page_may_call_a_server_that_wants_a_key():
    """A browser asks first, without the key, and was refused."""
    origin = {"origin": "https://ours.example"}
    with served(
        BestOfN(ScriptedEngine(), "flip", n=1), cors_origins=("https://ours.example",), api_keys=("k",)
    ) as site:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        told = site.http.options("/v1/chat/completions", headers=origin | asks)
        assert told.status_code == 200
        assert told.headers["access-control-allow-origin"] == origin["origin"]
        assert "authorization" in told.headers["access-control-allow-headers"]
        refused = site.http.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin["origin"], "the page may read why"
        assert site.http.get("/v1/models", headers=origin | {"authorization": "Bearer k"}).status_code == 200


def test_on_loopback_foreign_host_names_are_not_answered(site):
    """A page whose name was rebound to 127.0.0.1 sends its own name in the Host header."""
    refused = site.http.get("/v1/models", headers={"host": "evil.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")
    assert site.http.get("/v1/models", headers={"host": "localhost:1234"}).status_code == 200
    assert Settings(host="0.0.0.0").hosts is None


def test_the_playground_is_served_on_loopback_or_when_asked_for():
    assert Settings().shows_playground
    assert not Settings(host="0.0.0.0").shows_playground
    assert Settings(host="0.0.0.0", playground=True).shows_playground
    with served(BestOfN(ScriptedEngine(), "flip", n=1), playground=False) as site:
        assert site.http.get("/").status_code == 404


def test_the_log_has_one_line_for_each_request_and_no_prompt_text(caplog):
    caplog.set_level("INFO", "bon.serve")
    for log_prompts in (False, True):
        caplog.clear()
        with served(BestOfN(ScriptedEngine(), "flip", n=2), log_prompts=log_prompts, api_keys=("secret-key",)) as site:
            headers = {"authorization": "Bearer secret-key"}
            body = {"messages": [{"role": "user", "content": "confidential words"}]}
            assert site.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
            site.http.post("/v1/chat/completions", json=body | {"confidential": 1}, headers=headers)
        lines = [JsonFormatter().format(record) for record in caplog.records if record.name == "bon.serve"]
        requests = [json.loads(line) for line in lines if json.loads(line).get("event") == "request"]
        assert [r["status"] for r in requests] == [200, 400]
        assert requests[0]["n"] == 2
        assert requests[1]["code"] == "unknown_parameter"
        assert requests[0]["policy_tokens"] > 0
        assert ("confidential words" in "".join(lines)) is log_prompts
        assert "secret-key" not in "".join(lines)


def test_metrics_say_what_was_done():
    with served(BestOfN(ScriptedEngine(script), "flip", n=4)) as site:
        site.chat("Write about a quick red fox")
        site.chat("Write about a quick red fox", best_of_n={"stop_at": 0.1})
        site.chat(temperature=-1)
        text = site.http.get("/metrics").text
        value = site.metric
        assert value("bon_http_requests_total", path="/v1/chat/completions", status="200") == 2
        assert value("bon_http_requests_total", path="/v1/chat/completions", status="400") == 1
        assert value("bon_runs_total", outcome="ok") == 2
        candidates = [value("bon_candidates_total", finish_reason=r) for r in ("stop", "length", "abort")]
        assert sum(candidates) == 8
        assert value("bon_stopped_early_runs_total") == 1
        for stage in ("queue", "sample", "score", "select", "total"):
            assert value("bon_stage_seconds_count", stage=stage) == 2
        assert value("bon_tokens_total", model="policy", kind="completion") > 0
        assert value("bon_winner_reward_sum") > value("bon_mean_reward_sum") - 1e-9
        assert value("bon_time_to_first_byte_seconds_count") == 3
        for name in ("bon_running_requests", "bon_waiting_requests", "bon_ready"):
            assert f"\n{name} " in text
        site.http.get("/nowhere/at/all")
        assert "/nowhere" not in site.http.get("/metrics").text, "labels stay few"


def test_the_dashboard_asks_only_for_metrics_that_exist(site):
    dashboard = json.loads(files("bon.serve").joinpath("dashboard.json").read_text())
    wanted = set(re.findall(r"bon_\w+", json.dumps([p.get("targets", []) for p in dashboard["panels"]])))
    site.chat()
    exposed = set(re.findall(r"^(bon_\w+)", site.http.get("/metrics").text, re.M))
    exposed |= set(re.findall(r"# TYPE (bon_\w+)", site.http.get("/metrics").text))
    assert len(wanted) > 10
    assert wanted <= exposed


# The README's clients, executed.

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def example(language, start):
    """A block of the README that talks to a server."""
    [block] = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if b.startswith(start)]
    assert "http://127.0.0.1:8000" in block
    return block


def at(site, block):
    return block.replace("http://127.0.0.1:8000", site.url)


def test_the_readmes_openai_client_runs(site, capsys):
    exec(at(site, example("python", "from openai")) + "\nclient.close()", {})
    assert "Monday." in capsys.readouterr().out


def test_the_readmes_langchain_client_runs(site, capsys):
    pytest.importorskip("langchain_openai")
    exec(at(site, example("python", "from langchain_openai")), {})
    assert "bakery." in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_readmes_curl_command_runs(site):
    command = at(site, example("sh", "curl http://127.0.0.1:8000/v1/chat")).strip() + " -s"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=30, check=True)
    assert len(json.loads(done.stdout)["choices"]) == 3


def test_langchain_streams_and_batches(site):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model="bon-mini", base_url=f"{site.url}/v1", api_key="none", stream_usage=True)
    chunks = list(model.stream("Write about a quick red fox"))
    assert "".join(c.content for c in chunks) == "a quick red fox"
    assert sum((c.usage_metadata or {}).get("total_tokens", 0) for c in chunks) > 0
    answers = model.batch([f"Write about token{i}" for i in range(5)])
    assert [a.content.split()[-1] for a in answers] == [f"token{i}" for i in range(5)]
