"""Consensus by embeddings: vectors are those of plain transformers, and what cannot be embedded has no reward."""

import asyncio
import json
import math
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from fake_openai import FakeServer, Reply, error
from transformers import AutoModel, AutoTokenizer

import bon
from bon.cli import main
from bon.engines.base import Embeds
from bon.engines.http.engine import HTTPEngine
from bon.engines.torch.embedder import TorchEmbedder
from bon.errors import InputError, UnknownNameError
from bon.models import ModelPool
from bon.scorers.embedding import EmbeddingConsensus
from bon.spec import SCORERS

TEXTS = [
    "Dear Anna,\n\nthank you for the lovely evening.",
    "Ja, natürlich: schön!",
    "It is 42. " * 9,
    "  Write a haiku about the rain.  ",
]
MODULES = "sentence_transformers.models."


def save(folder, family="Bert", kind="wordpiece", **changes):
    return tiny.save_classifier(folder, family, tiny.tokenizer(kind), "MaskedLM", **changes)


def with_modules(folder, config, *more):
    """Says how to pool, in the layout of sentence-transformers."""
    names = ["Transformer", "Pooling", *more]
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": MODULES + name}
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"include_prompt": True, **config}))
    return folder


def causal(folder):
    return tiny.save(folder, "Qwen3", "llama3")


CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
MODELS = {
    "BERT, nothing said: mean": (save, None, "mean"),
    "BERT, mean": (save, {"pooling_mode_mean_tokens": True}, "mean"),
    "BERT, cls": (save, CLS, "cls"),
    "RoBERTa, whose positions count from the padding": (partial(save, family="Roberta", kind="chatml"), None, "mean"),
    "Qwen3, last token": (causal, {"pooling_mode": "lasttoken"}, "lasttoken"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    make, config, pooling = MODELS[request.param]
    folder = make(tmp_path_factory.mktemp("model"))
    return folder if config is None else with_modules(folder, config, "Normalize"), pooling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"))


def plain(folder, texts, pooling="mean"):
    """Vectors of plain transformers, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in texts:
        with torch.inference_mode():
            states = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        found.append({"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[pooling])
    return torch.stack(found).numpy()


def mean_cosines(vectors):
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (units @ units.T).mean(1)


def embedded(engine, texts=TEXTS):
    async def embed():
        found = await engine.embed(texts)
        await engine.aclose()
        return found

    return asyncio.run(embed())


def scored(scorer, *rows):
    return asyncio.run(bon.score(scorer, [("Write.", row) for row in rows]))


def test_vectors_and_rewards_are_those_of_plain_transformers(model):
    folder, pooling = model
    expected = plain(folder, TEXTS, pooling)
    found = embedded(TorchEmbedder(folder))
    assert np.stack([one.vector for one in found]) == pytest.approx(expected, abs=1e-5)
    assert all(one.prompt_tokens > 0 for one in found)
    [group] = scored(f"consensus:embedding:{folder}", TEXTS)
    assert group.rewards == pytest.approx(mean_cosines(expected), abs=1e-5)
    assert len({*group.rewards}) == len(TEXTS)


def test_batches_of_any_size_give_the_same_vectors(folder):
    wide, narrow = (
        np.stack([one.vector for one in embedded(TorchEmbedder(folder, max_batch_tokens=most))]) for most in (4096, 1)
    )
    assert wide == pytest.approx(narrow, abs=1e-5)


def test_copies_are_votes_and_shuffling_changes_no_reward(folder):
    pool = ModelPool()
    scorer = pool.scorer(f"consensus:embedding:{folder}")
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2]]
    [whole] = scored(scorer, texts)
    assert whole.rewards == pytest.approx(mean_cosines(plain(folder, texts)), abs=1e-5)
    assert whole.rewards[0] == whole.rewards[2]
    [turned] = scored(scorer, texts[::-1])
    assert turned.rewards == whole.rewards[::-1]
    read = [score.usage.scorer_prompt_tokens for score in whole.scores]
    assert min(read[0], read[2]) == 0 < max(read[0], read[2]), "a text is read once"
    [pair] = scored(scorer, TEXTS[:2])
    assert pair.rewards[0] == pair.rewards[1], "of two neither is preferred"
    asyncio.run(pool.aclose())


def test_text_never_becomes_a_control_token(folder):
    injected, harmless = embedded(TorchEmbedder(folder), ["It is [SEP] [CLS] 42", "It is 42"])
    own = AutoTokenizer.from_pretrained(folder)
    assert injected.prompt_tokens > harmless.prompt_tokens + 2
    assert injected.prompt_tokens > len(own("It is [SEP] [CLS] 42")["input_ids"])


def test_what_is_too_long_has_no_reward_and_no_say(folder):
    [group] = scored(f"consensus:embedding:{folder}", [TEXTS[0], "word " * 300, TEXTS[1], "<think>hm"])
    assert [score.status for score in group.scores] == ["ok", "failed", "ok", "empty"]
    assert "more than the 128 that fit" in group.scores[1].reason
    assert group.rewards[::2] == pytest.approx(mean_cosines(plain(folder, TEXTS[:2])), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_an_embedding_without_a_direction_is_no_reward(folder, bad):
    engine = TorchEmbedder(folder)
    with torch.no_grad():
        norm = engine._model.encoder.layer[-1].output.LayerNorm
        norm.weight.fill_(0.0)
        norm.bias.fill_(bad)
    [group] = scored(EmbeddingConsensus(engine), TEXTS[:2])
    assert group.rewards == (None, None)
    assert {score.reason for score in group.scores} == {f"the model gives an embedding whose length is {bad}"}
    assert {score.status for score in group.scores} == {"failed"}
    asyncio.run(engine.aclose())


def test_a_chat_model_is_refused_in_one_sentence_that_says_what_to_type(tmp_path, capsys):
    for name in ("mini", str(causal(tmp_path))):
        assert main(["run", "Hi", "--policy", "scripted", "--scorer", f"consensus:embedding:{name}", "-n", "2"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "a language model and no embedding model (it has no modules.json). Name one" in captured.err
        assert "consensus:chrf" in captured.err
    assert embedded(TorchEmbedder(tmp_path, pooling="lasttoken"))[0].error is None, "who says how knows it"


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        ({"pooling_mode_max_tokens": True}, (), "a module that is not run here, pooling by max;"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, (), "pooling by max and mean;"),
        ({"pooling_mode_mean_tokens": True}, ("Dense",), "a module that is not run here, Dense; serve the model"),
    ],
)
def test_what_sentence_transformers_does_and_bon_does_not_is_refused(tmp_path, config, more, said):
    with pytest.raises(InputError, match=said):
        TorchEmbedder(with_modules(save(tmp_path), config, *more))


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"layer\.2\..* is missing"):
        TorchEmbedder(tmp_path)


def test_options_that_are_none_are_refused(folder):
    with pytest.raises(UnknownNameError, match="pooling 'max'"):
        TorchEmbedder(folder, pooling="max")
    with pytest.raises(InputError, match="max_batch_tokens"):
        TorchEmbedder(folder, max_batch_tokens=0)
    with pytest.raises(InputError, match="It is written consensus:embedding:MODEL"):
        SCORERS.make("consensus:embedding")
    with pytest.raises(InputError, match="nothing stands behind the colon"):
        SCORERS.make("consensus:embedding:")


def test_a_spec_comes_back_from_the_scorer_and_names_the_engine_that_runs_it():
    scorer = SCORERS.make("consensus:embedding:some/name,device=cpu")
    assert SCORERS.spec_of(scorer) == "consensus:embedding:some/name,device=cpu"
    assert scorer.model.runs_on == "embedder"
    assert SCORERS.make("consensus:embedding:http://host/v1#m").model.runs_on == "http"
    assert SCORERS.spec_of(SCORERS.make("consensus:chrf")) == "consensus:chrf"


def test_engines_that_embed_say_so(folder):
    engine = TorchEmbedder(folder)
    assert isinstance(engine, Embeds)
    assert isinstance(HTTPEngine("http://127.0.0.1:1"), Embeds)
    asyncio.run(engine.aclose())
    pool = ModelPool()
    with pytest.raises(InputError, match="EmbeddingConsensus needs a model that can embed a text"):
        EmbeddingConsensus(pool.engine("mini"))
    asyncio.run(pool.aclose())


def test_every_command_takes_it(folder, tmp_path, capsys):
    spec = f"consensus:embedding:{folder}"
    asked = "Write a reminder for Anna to water the plants."
    assert main(["run", asked, "--scorer", spec, "-n", "3", "--max-tokens", "24", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = mean_cosines(plain(folder, [c["text"] for c in result["candidates"]]))
    assert [score["reward"] for score in result["scores"]] == pytest.approx(expected, abs=1e-5)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": asked, "candidates": TEXTS}))
    assert main(["rerank", str(tmp_path / "in.jsonl"), "--scorer", spec, "-o", str(tmp_path / "out.jsonl")]) == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["rewards"] == pytest.approx(mean_cosines(plain(folder, TEXTS)), abs=1e-5)
    assert main(["eval", "mini", "--scorer", spec, "--limit", "2", "-n", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scorers"][spec]["failed"] == 0


def test_the_server_rates_with_it(folder):
    from serving import served

    with served(bon.BestOfN("scripted", f"consensus:embedding:{folder}", n=2)) as site:
        body = {"query": "Write.", "documents": TEXTS}
        results = site.http.post("/v1/rerank", json=body).json()["results"]
    found = {one["index"]: one["relevance_score"] for one in results}
    assert [found[i] for i in range(4)] == pytest.approx(mean_cosines(plain(folder, TEXTS)), abs=1e-5)


# --- servers ----------------------------------------------------------------------------------------------------------


def vector_of(text):
    return [float(len(text)), float(text.count("a")), 1.0]


def embeddings(vectors=vector_of):
    """A server of an embedding model: ``/v1/embeddings`` alone, its items in another order than the texts."""
    server = FakeServer()

    def reply(seen):
        if seen.method == "GET":
            return None
        if seen.path != "/v1/embeddings":
            return error(404, "Not Found")
        if any(len(text) > 200 for text in seen.body["input"]):
            return error(400, "This model's maximum context length is 40 tokens. However, you requested 60 tokens.")
        items = [{"index": i, "embedding": vectors(text)} for i, text in enumerate(seen.body["input"])]
        return Reply(200, {"data": items[::-1], "usage": {"prompt_tokens": 9, "total_tokens": 9}})

    server.refuse = reply
    return server


def test_a_server_embeds_all_texts_with_one_request():
    with embeddings() as server:
        [group] = scored(f"consensus:embedding:{server.url}", TEXTS)
        [post] = server.posts
    assert group.rewards == pytest.approx(mean_cosines(np.array([vector_of(text) for text in TEXTS])))
    assert post.body == {"model": "fake-model", "input": sorted(TEXTS), "encoding_format": "float"}
    assert group.usage.scorer_prompt_tokens == 9


def test_of_texts_that_a_server_refuses_together_each_is_asked_for_by_itself():
    with embeddings() as server:
        [group] = scored(f"consensus:embedding:{server.url}", [TEXTS[0], "word " * 50, TEXTS[1]])
    assert [score.status for score in group.scores] == ["ok", "failed", "ok"]


def test_a_server_that_is_gone_gives_no_reward_and_says_why():
    with FakeServer() as server:
        url = server.url
    [group] = scored(f"consensus:embedding:{url}#m,retries=0", TEXTS)
    assert group.rewards == (None,) * 4
    assert "cannot reach" in group.scores[0].reason


@pytest.mark.parametrize("sent", [[None, 1.0], [], "AAAA", 1.0])
def test_what_is_no_embedding_is_no_reward(sent):
    with embeddings(lambda text: sent) as server:
        [group] = scored(f"consensus:embedding:{server.url},retries=0", TEXTS)
    assert group.rewards == (None,) * 4
    assert all(score.reason for score in group.scores)


def test_a_server_of_a_chat_model_is_refused_with_what_to_type():
    with FakeServer() as server:
        for said in (error(404, "Not Found"), error(400, "The model does not support Embeddings API")):
            server.refuse = lambda seen, said=said: None if seen.method == "GET" else said
            [group] = scored(f"consensus:embedding:{server.url}", TEXTS)
            assert "has no embedding model" in str(group.error)
            assert "--runner pooling" in str(group.error)


@pytest.mark.vllm
def test_vllm_in_this_process_gives_the_vectors_of_plain_transformers(tmp_path):
    wide = {"hidden_size": 128, "intermediate_size": 256}  # vLLM's attention takes no smaller heads
    encoder = save(tmp_path / "bert", **wide)
    AutoModel.from_pretrained(encoder).save_pretrained(encoder)  # vLLM reads no masked language model as its base
    decoder = tiny.save(tmp_path / "qwen", "Qwen3", "llama3", head_dim=32)
    with pytest.raises(InputError, match="a language model and no embedding model"):
        scored(f"consensus:embedding:{decoder},engine=vllm", TEXTS)
    with_modules(decoder, {"pooling_mode": "lasttoken"})
    for folder, pooling in ((encoder, "mean"), (decoder, "lasttoken")):
        [group] = scored(f"consensus:embedding:{folder},engine=vllm,threads=1", [*TEXTS, "word " * 900])
        assert group.rewards[:-1] == pytest.approx(mean_cosines(plain(folder, TEXTS, pooling)), abs=1e-4)
        assert "that fit" in group.scores[-1].reason
