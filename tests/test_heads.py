"""Reward heads: what they learn, what they are sure of, their files, and the selector that goes by their spread."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command import ROOT
from planted import labelled_rows, learnt, planted, trained
from scoring import Own, scored, scores_of
from scoring import group_of as plain_group_of
from tiny import save

from bon import BestOfN
from bon.cli import main
from bon.engines.base import Prompt, Reading, Reads
from bon.engines.scripted import ScriptedEngine
from bon.errors import EngineError, InputError
from bon.evals.store import Store, stored
from bon.heads import bnrm
from bon.heads.data import States
from bon.heads.file import TrainedHead, kind_of
from bon.heads.training import fit
from bon.models import ModelPool
from bon.scorers.flip import Flip
from bon.scorers.head import Head
from bon.selectors import as_selector
from bon.task import Message
from bon.types import Score

KINDS = ("probe", "bnrm")


class Reader(ScriptedEngine):
    """Holds of each response what ``states`` says."""

    fingerprint, layers = "reader", 2

    def __init__(self, states):
        super().__init__(["x"])
        self.states = states

    async def hidden_states(self, prompts, responses, *, layers):
        return [
            one if isinstance(one := self.states(text), Reading) else Reading(np.tile(one, (len(layers), 1)), one, 9)
            for text in responses
        ]


# --- what a head learns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_learns_what_is_planted_in_the_states_from_noisy_labels(kind):
    head = learnt(planted(noise=0.2)[0], kind)
    unseen, quality, length = planted(seed=1)
    mean = head.rewards(unseen.states).mean
    assert np.corrcoef(mean, quality)[0, 1] > 0.6
    assert abs(np.corrcoef(mean, length)[0, 1]) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_where_labels_favour_length_a_head_does_and_the_report_shows_what_length_alone_has(kind):
    data, _, _ = planted(rows=20, confounded=0.5)
    unseen, quality, length = planted(seed=1)
    mean = learnt(data, kind).rewards(unseen.states).mean
    assert np.corrcoef(mean, quality)[0, 1] > 0.3
    assert np.corrcoef(mean, length)[0, 1] > 0.2
    report = fit(data, "probe").header.report
    assert report["longest"]["pairs_in_order"]["low"] > 0.5
    assert report["beyond_longest"]["mean"] < report["head"]["pairs_in_order"]["mean"] - 0.5


def test_labels_that_mean_nothing_do_not_look_learnable():
    """However many numbers a state has: what is reported is of rows that were left out."""
    data, _, _ = planted(rows=20, width=200)
    labels = np.random.default_rng(6).permuted(data.labels.reshape(20, -1), axis=1).ravel()
    report = fit(replace(data, labels=labels), "probe").header.report
    assert report["head"]["pairs_in_order"]["low"] < 0.5


def test_the_learning_curve_rises_with_the_rows():
    report = fit(planted(rows=40, width=100, noise=0.4)[0], "probe").header.report
    curve = list(report["curve"].values())
    assert curve[-1] > curve[0] + 0.05
    assert [*report["curve"]] == ["8", "16", "24", "32"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_makes_the_same_head(kind):
    data, _, _ = planted(rows=12)
    settings = kind_of(kind).choose(data, 0)
    first, second = (kind_of(kind).fit(data, settings, 0) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_probe_is_the_ridge_regression_on_all_differences_within_rows():
    data, _, _ = planted(rows=12, width=5)
    settings = {"layers": [2], "loss": "ridge", "strength": 1e-2}
    arrays = kind_of("probe").fit(data, settings, 0)
    values = (data.states.last - arrays["mean"]) / arrays["scale"]
    pairs = [(i, j) for i in range(72) for j in range(72) if data.rows[i] == data.rows[j]]
    x = np.array([values[i] - values[j] for i, j in pairs])
    y = np.array([data.labels[i] - data.labels[j] for i, j in pairs])
    penalty = 1e-2 * np.trace(x.T @ x)  # pairs count each candidate twice six times, on both sides
    expected = np.linalg.solve(x.T @ x + penalty * np.eye(5), x.T @ y)
    assert arrays["weights"] == pytest.approx(expected, rel=1e-6)


def test_the_logistic_probe_minimises_bradley_terrys_loss_and_counts_each_row_once():
    data, _, _ = planted(rows=12, width=5)
    arrays = kind_of("probe").fit(data, {"layers": [2], "loss": "logistic", "strength": 1e-2}, 0)
    values = (data.states.last - arrays["mean"]) / arrays["scale"]
    rows = [values[data.rows == row] for row in range(12)]
    gradient = 1e-2 * sum(((row - row.mean(0)) ** 2).sum() for row in rows) * arrays["weights"]
    for row, values_of_row in enumerate(rows):
        good = data.labels[data.rows == row] > 0
        pairs = [b - w for b in values_of_row[good] for w in values_of_row[~good]]
        gradient -= np.mean([pair / (1 + np.exp(pair @ arrays["weights"])) for pair in pairs], axis=0)
    assert gradient == pytest.approx(np.zeros(5), abs=1e-4)


def test_the_probe_takes_the_loss_that_does_better_on_rows_that_were_left_out():
    """A few huge labels are all that squares see; which of two candidates is better stays as clear as it was."""
    data, quality, _ = planted(rows=30)
    wild = replace(data, labels=np.exp(5 * quality))
    unseen, quality, _ = planted(seed=1)
    unseen, probe = replace(unseen, labels=quality), kind_of("probe")
    assert probe.choose(wild, 0)["loss"] == "logistic"
    each = [{"layers": [2], "loss": loss, "strength": 1e-2} for loss in ("logistic", "ridge")]
    made = [probe.rewards(probe.fit(wild, settings, 0), settings, unseen.states).mean for settings in each]
    logistic, ridge = (unseen.in_order(mean).mean() for mean in made)
    assert logistic > ridge + 0.05


# --- what it is sure of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "scale"), [(1.0, 1.0), (1.7, 0.3), (3.0, 2.0)])
def test_the_divergence_from_the_prior_is_that_of_samples(shape, scale):
    torch.manual_seed(0)
    shapes, scales = torch.full((400_000,), shape).double(), torch.full((400_000,), scale).double()
    drawn = bnrm.draw(shapes, scales)
    weibull = torch.distributions.Weibull(scales, shapes).log_prob(drawn)
    gamma = torch.distributions.Gamma(1.0, 1.0).log_prob(drawn)
    mean = scales[:1] * torch.exp(torch.lgamma(1 + 1 / shapes[:1]))
    assert float(bnrm.kl(mean, shapes[:1], scales[:1])) == pytest.approx(float((weibull - gamma).mean()), abs=0.02)


def test_mean_and_spread_of_a_reward_are_those_of_samples():
    torch.manual_seed(0)
    mean, shape, weight, weight_shape = (torch.rand(12).double() + low for low in (0.1, 1.0, 0.1, 1.0))
    many = [each.expand(200_000, 12) for each in (mean, shape, weight, weight_shape)]
    drawn = [bnrm.draw(s, bnrm.scale_of(m, s)) for m, s in (many[:2], many[2:])]
    rewards = (drawn[0] * drawn[1]).sum(1)
    assert float(rewards.mean()) == pytest.approx(float((mean * weight).sum()), rel=0.01)
    assert float(rewards.std()) == pytest.approx(float(bnrm.spread(mean, shape, weight, weight_shape)), rel=0.02)


def test_rewards_and_factors_are_not_negative_and_the_factors_are_part_of_the_reward():
    found = learnt(planted(rows=12)[0], "bnrm").rewards(planted(seed=2)[0].states)
    for mean, factors in zip(found.mean, found.factors, strict=True):
        shares = [share for _, share in factors]
        assert min(shares) >= 0
        assert sum(shares) <= mean + 1e-4
        assert shares == sorted(shares, reverse=True)


def test_a_probe_is_less_sure_with_fewer_rows():
    unseen, probe = planted(seed=1)[0].states, kind_of("probe")
    settings = {"layers": [2], "loss": "ridge", "strength": 1e-2}
    made = [probe.fit(planted(rows=rows)[0], settings, 0) for rows in (12, 120)]
    few, many = (probe.rewards(arrays, settings, unseen).spread.mean() for arrays in made)
    assert many < few / 2


# --- hidden states of a model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    pool = ModelPool()
    yield pool
    asyncio.run(pool.aclose())


def read(engine, *texts, layers=(1, 4)):
    prompts = [Prompt.of([Message("user", "Write a slogan.")])] * len(texts)
    return asyncio.run(engine.hidden_states(prompts, texts, layers=layers))


@pytest.mark.parametrize("family", ["mini", "Qwen3", "Gemma3"])
def test_padding_does_not_change_what_a_model_holds(pool, tmp_path, family):
    engine = pool.engine("mini" if family == "mini" else f"{save(tmp_path, family, num_hidden_layers=4)},engine=torch")
    texts = ["Good bread.", "word " * 60, "Sunrise: warm bread for every morning.", "Go"]
    for together, text in zip(read(engine, *texts), texts, strict=True):
        [alone] = read(engine, text)
        assert together.tokens == alone.tokens
        assert together.pools == pytest.approx(alone.pools, abs=2e-5, rel=1e-5)
        assert together.last == pytest.approx(alone.last, abs=2e-5)


def test_hidden_states_are_those_of_transformers_whatever_ran_before(pool):
    from transformers import AutoModelForCausalLM

    from bon.mini import WEIGHTS

    engine = pool.engine("mini")
    asyncio.run(engine.loglikelihood([Prompt.of([Message("user", "Write.")])] * 2, ["a", "b"]))  # shares prefixes
    assert isinstance(engine, Reads)
    [found] = read(engine, "Good bread.")
    context = engine.renderer.render(Prompt.of([Message("user", "Write a slogan.")]))
    answer = engine.renderer.encode("Good bread.")
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype="float32").eval()
    with torch.no_grad():
        states = model(torch.tensor([[*context, *answer]]), output_hidden_states=True).hidden_states
    for pool_, layer in zip(found.pools, (1, 4), strict=True):
        assert pool_ == pytest.approx(states[layer][0, len(context) :].mean(0).numpy(), abs=2e-5)
    assert found.last == pytest.approx(states[-1][0, -1].numpy(), abs=2e-5)


def test_what_cannot_be_read_leaves_the_others(pool):
    engine = pool.engine("mini")
    empty, fine, long = read(engine, "", "Good bread.", "word " * 9000)
    assert "no tokens" in str(empty.error)
    assert fine.error is None
    assert "do not fit" in str(long.error) or "more than" in str(long.error)
    with pytest.raises(InputError, match="no layer 9"):
        read(engine, "a", layers=[9])


def test_models_differ_in_their_fingerprint_and_dtypes_do_not(tmp_path):
    with_seed = {seed: save(tmp_path / str(seed), seed=seed) for seed in (0, 1)}
    with_pool = ModelPool()
    prints = [
        with_pool.engine(with_seed[seed], dtype=dtype, engine="torch").fingerprint
        for seed, dtype in ((0, "float32"), (0, "bfloat16"), (1, "float32"))
    ]
    asyncio.run(with_pool.aclose())
    assert prints[0] == prints[1] != prints[2]


# --- the scorer and its file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_was_saved_rates_as_before(tmp_path, kind):
    data, _, _ = planted(rows=12)
    head = learnt(data, kind)
    head.save(tmp_path / "head")
    again = TrainedHead.load(tmp_path / "head")
    assert again.header == head.header
    for first, second in zip(head.rewards(data.states)[:2], again.rewards(data.states)[:2], strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scorer_gives_mean_spread_and_factors(tmp_path, kind):
    data, _, _ = planted(rows=12)
    path = trained(tmp_path, kind, fingerprint="reader")
    found = scores_of(Head(path, Reader(lambda text: data.states.last[len(text)])), "Say something.", "a", "bb")
    expected = TrainedHead.load(path).rewards(States((2,), data.states.pools[1:3], data.states.last[1:3]))
    assert [score.reward for score in found] == pytest.approx(expected.mean.tolist())
    assert [score.spread for score in found] == pytest.approx(expected.spread.tolist())
    assert all(score.usage.scorer_prompt_tokens == 9 for score in found)
    assert ("factors" in found[0].to_dict()) == (kind == "bnrm")


def test_a_candidate_whose_states_are_no_numbers_has_no_reward(tmp_path):
    def states(text):
        return Reading.failed(EngineError("they are not finite.")) if text == "bad" else np.ones(24)

    path = trained(tmp_path, "probe", fingerprint="reader")
    good, bad = scores_of(Head(path, Reader(states)), "Say something.", "good", "bad")
    assert good.reward is not None
    assert (bad.reward, bad.status) == (None, "failed")


def test_a_head_of_another_model_is_refused(tmp_path, pool):
    path = trained(tmp_path, "probe", model="another")
    with pytest.raises(InputError, match="trained on hidden states of 'another', and 'mini' is another model"):
        pool.scorer(f"head:{path},model=mini")
    with pytest.raises(InputError, match="show its hidden states"):
        Head(path, ScriptedEngine(["x"]))


def test_files_that_hold_no_head_are_refused(tmp_path):
    path = trained(tmp_path, "probe")
    with np.load(path) as file:
        arrays = dict(file)
    for name, change in {
        "shape": {"mean": np.zeros(3, np.float32)},
        "nan": {"scale": np.full(24, np.nan, np.float32)},
        "header": {"header": np.array("[]")},
        "kind": {"header": np.array(str(arrays["header"]).replace("probe", "prob"))},
        "pickle": {"mean": np.array([{}], object)},
    }.items():
        np.savez(tmp_path / name, **{**arrays, **change})
    (tmp_path / "text.npz").write_text("no head")
    for name in ("shape", "nan", "header", "kind", "pickle", "text", "missing"):
        with pytest.raises(InputError, match=r"holds no head|there is no file|unknown kind of head"):
            TrainedHead.load(tmp_path / f"{name}.npz")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_trained_and_used_from_the_command_line(tmp_path, capsys, kind):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(labelled_rows()))
    head, states = tmp_path / "head.npz", tmp_path / "states.npz"
    arguments = [
        "train",
        "head",
        str(rows),
        "--model",
        "mini",
        "--kind",
        kind,
        "-o",
        str(head),
        "--states",
        str(states),
    ]
    assert main([*arguments, "--json"]) == 0
    header = json.loads(capsys.readouterr().out)
    assert header["kind"] == kind
    assert header["report"]["head"]["pairs_in_order"]["mean"] > 0.9
    assert main(arguments) == 0, "the states are there already"
    out = capsys.readouterr().out
    assert "It pays" in out
    assert "Twice the rows" in out
    with BestOfN(scorer=f"head:{head}", selector="lcb:0.5") as bon:
        result = bon.rerank("Say something about 99.", ["No 99.", "It is a long and very good answer number 99."])
    assert result.text.startswith("It is")


def test_hidden_states_that_are_kept_are_not_read_again(tmp_path, pool, monkeypatch):
    from bon.evals.dataset import as_dataset
    from bon.heads.training import train

    rows, engine, kept = tmp_path / "rows.jsonl", pool.engine("mini"), tmp_path / "states"
    rows.write_text("\n".join(labelled_rows()))
    first = train(as_dataset(str(rows)), engine, "mini", kept=kept)
    counted = []
    rows.write_text("\n".join(labelled_rows(13)))
    train(as_dataset(str(rows)), engine, "mini", kept=kept, progress=lambda done, of: counted.append((done, of)))
    assert counted == [(2, 2)], "the thirteenth row alone"
    assert first.header.report["rows"] == 12
    monkeypatch.setattr(engine, "fingerprint", "other")
    with pytest.raises(InputError, match="of another model"):
        train(as_dataset(str(rows)), engine, "mini", kept=kept)


def test_scores_that_are_kept_are_those_of_the_head_that_is_in_the_file(tmp_path, pool):
    store, reader = Store(tmp_path / "scores"), pool.engine("mini")
    sizes = {"fingerprint": reader.fingerprint, "width": 128}
    spreads = []
    for kind in ("probe", "bnrm", "bnrm"):
        path = trained(tmp_path, kind, **sizes).replace(tmp_path / "head")
        scorer = pool.scorer(stored(Head(path, reader), store, f"head:{path}"))
        spreads += [score.spread for score in scores_of(scorer, "Say something.", "It is so.")]
    store.close()
    assert spreads[0] != spreads[1] == spreads[2]
    assert None not in spreads


@pytest.mark.slow
def test_the_benchmark_of_heads_runs_to_its_last_line(capsys):
    from runpy import run_path

    run_path(str(ROOT / "benchmarks" / "heads.py"))["main"](["--train", "16", "--test", "3"])
    assert set(json.loads(capsys.readouterr().out)) >= {"flip", "longest", "probe", "bnrm"}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [json.dumps({"prompt": "a", "candidates": ["b", "c"], "correct": [1, 1]})] * 20,
            [],
            "0 rows whose candidates",
        ),
        (labelled_rows(4), [], "4 rows whose candidates differ in label"),
        ([json.dumps({"prompt": "a", "candidates": ["b", "c"]})], [], "has no labels"),
        (labelled_rows(), ["--kind", "prob"], "Did you mean 'probe'"),
        (labelled_rows(), ["-o", "nowhere/head.npz"], "there is no folder 'nowhere'"),
        (labelled_rows(), ["--model", "scripted"], "shows no hidden states"),
        ([row.replace('"No ', '" ') for row in labelled_rows()], ["--states", "rows.jsonl"], "holds no hidden states"),
    ],
)
def test_rows_and_options_that_are_none_are_refused_in_one_sentence(
    tmp_path, monkeypatch, capsys, rows, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert main(["train", "head", "rows.jsonl", "-o", "head.npz", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "head.npz").exists()


# --- the selector -----------------------------------------------------------------------------------------------------


def picked(selector, *scores, least=None):
    given = iter(scores)
    group = plain_group_of("Say something.", [f"text {i}" for i in range(len(scores))])
    scored(Own(lambda each: next(given)), group)
    return group.result(as_selector(selector, least))


def test_lcb_prefers_what_is_surer():
    bold, sure = Score(1.0, spread=0.5), Score(0.8, spread=0.1)
    assert picked("best", bold, sure).best == 0
    assert picked("lcb:1", bold, sure).best == 1
    assert picked("lcb", bold, sure).selection.ranking == (1, 0)
    assert picked("lcb:0", bold, sure).best == 0
    assert picked("lcb:1", bold, sure).reward == 0.8, "the reward stays what it is"


def test_lcb_never_picks_what_it_does_not_know_the_spread_of():
    assert picked("lcb", Score(9.0), Score(0.1, spread=0.2), Score(None, "failed", "no")).best == 1


def test_a_minimum_is_compared_with_the_lower_bound():
    result = picked("lcb:2", Score(1.0, spread=0.5), Score(0.5, spread=0.2), least=0.2)
    assert result.best is None
    assert "the best reward, 0.1, is below" in result.selection.reason


def test_lcb_without_spreads_says_which_scorers_know_them():
    with pytest.raises(InputError, match="head:FILE does"):
        picked("lcb", Score(1.0), Score(2.0))
    assert picked("lcb", Score(None, "failed", "no")).best is None


@pytest.mark.parametrize("spec", ["lcb:-1", 'lcb:"a"', "lcb:true"])
def test_lcb_takes_a_number_that_is_not_negative(spec):
    with pytest.raises(InputError, match="number"):
        as_selector(spec)


def test_several_reconstructions_know_the_standard_error_of_their_mean():
    texts = iter(["write a haiku", "write a song", "write a haiku", "nothing"])
    [score] = scores_of(Flip(ScriptedEngine(lambda prompt, draw: next(texts)), samples=4), "Write a haiku.", "rain")
    assert score.spread == pytest.approx(np.std(score.details.samples, ddof=1) / 2)
    [single] = scores_of(Flip(ScriptedEngine(["write"])), "Write a haiku.", "rain")
    assert single.spread is None
