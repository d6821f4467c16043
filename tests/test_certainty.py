"""Self-certainty and DeepConf: the numbers of plain transformers, what servers tell, and what has no reward."""

import asyncio
import json
import math

import pytest
import tiny
import torch
from fake_openai import FakeServer, Stream, error
from scoring import scores_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from bon import BestOfN, portal
from bon.cli import main
from bon.engines.base import Prompt, Weighs
from bon.engines.http.engine import HTTPEngine
from bon.engines.torch.engine import TorchEngine
from bon.mini import WEIGHTS
from bon.scorers.certainty import TOP, DeepConf, SelfCertainty
from bon.spec import SCORERS
from bon.task import Task

TASK = Task.of("Write a haiku about the autumn rain, please.")
TEXTS = ["Dear Anna,\n\nthank you for the lovely evening.", "It is 42.", "Ja, natürlich: schön! " * 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"), head_dim=8)


def plain(folder, text, task=TASK):
    """Log-probabilities of plain transformers at each token of a response, shape (tokens, vocabulary)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [message.to_dict() for message in task.messages]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    said = tokenizer.encode(text, add_special_tokens=False)
    with torch.inference_mode():
        return model(torch.tensor([[*asked, *said]])).logits[0, len(asked) - 1 : -1].double().log_softmax(-1)


def self_certainty(logprobs):
    return -(logprobs + math.log(logprobs.shape[1])).sum().item() / logprobs.numel()


def deepconf(logprobs, top=TOP):
    return -logprobs.topk(top).values.mean().item()


def rewards(scorer, *texts):
    return [score.reward for score in scores_of(scorer, TASK, *texts)]


@pytest.mark.parametrize("options", [{}, {"share_prefix": False}, {"max_batch_tokens": 40}])
def test_rewards_are_those_of_the_formula_on_the_logits_of_plain_transformers(folder, options):
    engine = TorchEngine(folder, **options)
    assert rewards(SelfCertainty(engine), *TEXTS) == pytest.approx(
        [self_certainty(plain(folder, text)) for text in TEXTS], abs=1e-4
    )
    assert rewards(DeepConf(engine), *TEXTS) == pytest.approx(
        [deepconf(plain(folder, text)) for text in TEXTS], abs=1e-4
    )
    asyncio.run(engine.aclose())


def test_a_top_beyond_the_vocabulary_is_the_whole_of_it(folder):
    engine = TorchEngine(folder)
    [read] = asyncio.run(engine.confidence([Prompt.of(TASK.asked)], [TEXTS[1]], top=10**6))
    logprobs = plain(folder, TEXTS[1])
    assert read.mean == pytest.approx(logprobs.mean().item(), abs=1e-4)
    assert read.tokens == len(logprobs)
    asyncio.run(engine.aclose())


@pytest.mark.parametrize("kind", [SelfCertainty, DeepConf])
def test_a_model_whose_logits_are_no_numbers_gives_no_reward(folder, kind):
    engine = TorchEngine(folder)
    with torch.no_grad():
        engine._model.model.norm.weight.fill_(math.nan)
    [score] = scores_of(kind(engine), TASK, TEXTS[0])
    assert (score.reward, score.status, score.reason) == (None, "failed", "the reward is nan, not a finite number")
    asyncio.run(engine.aclose())


def test_thinking_counts_and_nothing_but_thinking_has_no_reward(folder):
    """The policy sampled its thoughts as well."""
    engine = TorchEngine(folder)
    thought = "<think>Rain.</think>It is 42."
    found = scores_of(SelfCertainty(engine), TASK, thought, "It is 42.", "<think>Rain.</think>")
    assert found[0].usage.scorer_prompt_tokens > found[1].usage.scorer_prompt_tokens
    assert found[2].status == "empty"
    asyncio.run(engine.aclose())


def test_the_command_line_scores_with_the_policy_and_with_a_named_model(folder, tmp_path, capsys):
    asked = "Write a reminder for Anna to water the plants."
    for spec, formula in (("self-certainty", self_certainty), ("deepconf", deepconf)):
        assert main(["run", asked, "--scorer", spec, "-n", "3", "--max-tokens", "24", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        expected = [formula(plain(WEIGHTS, c["text"], Task.of(asked))) for c in result["candidates"]]
        assert [score["reward"] for score in result["scores"]] == pytest.approx(expected, abs=1e-3)
        (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": TASK.instruction, "candidates": TEXTS}))
        arguments = ["rerank", str(tmp_path / "in.jsonl"), "--scorer", f"{spec}:{folder}", "-o"]
        assert main([*arguments, str(tmp_path / f"{spec}.jsonl")]) == 0
        row = json.loads((tmp_path / f"{spec}.jsonl").read_text())
        assert row["rewards"] == pytest.approx([formula(plain(folder, text)) for text in TEXTS], abs=1e-4)


def test_a_spec_comes_back_from_the_scorer():
    for spec in ("self-certainty", "deepconf", "self-certainty:some/name,dtype=float32", "deepconf:mini"):
        assert SCORERS.spec_of(SCORERS.make(spec)) == spec


# --- servers ----------------------------------------------------------------------------------------------------------


def place(*values):
    return {"token": "x", "logprob": values[0], "top_logprobs": [{"token": f"t{v}", "logprob": v} for v in values]}


CHAT = {"content": [place(-0.1, -2.5), place(-1.0, -2.0)]}
PLAIN = {"token_logprobs": [-0.1, -1.0], "top_logprobs": [{"a": -0.1, "b": -2.5}, {"a": -1.0, "b": -2.0}]}


def answer(logprobs, text="a red fox"):
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": "stop", "logprobs": logprobs}], "usage": {}}


def test_over_http_self_certainty_is_refused_and_the_sentence_names_deepconf(capsys):
    with FakeServer() as server:
        assert main(["run", "Hi", "--policy", server.url, "--scorer", "self-certainty", "-n", "2"]) == 2
    assert "at each token (engine=torch or vllm; over HTTP take deepconf), and" in capsys.readouterr().err
    assert main(["run", "Hi", "--policy", "scripted", "--scorer", "deepconf", "-n", "2"]) == 2
    assert not isinstance(HTTPEngine("http://127.0.0.1:1"), Weighs)


def sampled(policy, spec, n=1, **options):
    """The scores of candidates that are sampled."""
    with BestOfN(policy, spec, n=n) as bon:
        return portal.run(bon.run("Write about a fox", **options)).scores


def test_over_http_deepconf_is_the_mean_of_what_the_server_tells():
    with FakeServer() as server:
        server.faults += [answer(CHAT), answer({"content": [place(-0.2, -0.4)]}, "foxes")]
        found = sampled(server.url, "deepconf", n=2)
        assert sorted(score.reward for score in found) == pytest.approx([0.3, 1.4])
        assert {(seen.body["logprobs"], seen.body["top_logprobs"]) for seen in server.posts} == {(True, TOP)}
        sampled(server.url, "logprob")
        assert "top_logprobs" not in server.posts[-1].body


def test_over_http_token_ids_are_answered_in_the_old_format(folder):
    with FakeServer() as server:
        text = {"text": "a red fox", "finish_reason": "stop", "logprobs": PLAIN}
        server.faults.append({"choices": [text], "usage": {}})
        [score] = sampled(f"{server.url},tokenizer={folder}", "deepconf")
        assert server.posts[-1].body["logprobs"] == TOP
    assert score.reward == pytest.approx(1.4)


def test_a_stream_that_is_followed_tells_as_much():
    chunks = [
        {"choices": [{"delta": {"content": text}, "finish_reason": end, "logprobs": {"content": [one]}}]}
        for text, end, one in zip(("a red", " fox"), (None, "stop"), CHAT["content"], strict=True)
    ]
    seen = []
    with FakeServer() as server:
        server.faults.append(Stream([json.dumps(chunk).encode() for chunk in chunks] + [b"[DONE]"]))
        [score] = sampled(server.url, "deepconf", follow=seen.append)
    assert seen, "it was a stream"
    assert score.reward == pytest.approx(1.4)


def test_a_server_that_tells_nothing_gives_no_reward_and_says_why():
    with FakeServer() as server:
        server.refuse = lambda seen: error(400, "top_logprobs is not allowed") if "top_logprobs" in seen.body else None
        [score] = sampled(server.url, "deepconf")
    assert score.status == "failed"
    assert "told no top_logprobs of this candidate, and cannot read it" in score.reason


@pytest.mark.vllm
def test_vllm_gives_the_numbers_of_plain_transformers():
    from bon.engines.vllm.engine import VLLMEngine

    engine = VLLMEngine(WEIGHTS, threads=1)
    for scorer, formula in ((SelfCertainty(engine), self_certainty), (DeepConf(engine), deepconf)):
        for _ in range(2):  # the second time the prompt is in vLLM's cache
            assert rewards(scorer, *TEXTS) == pytest.approx([formula(plain(WEIGHTS, text)) for text in TEXTS], abs=1e-3)
    [score] = scores_of(SelfCertainty(engine), TASK, "word " * 9000)
    assert score.status == "failed"
    asyncio.run(engine.aclose())
