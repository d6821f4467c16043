"""Which sentences of the winner earn its reward: the winner again without each of them."""

import asyncio
import json
import signal
import time
from dataclasses import replace

import pytest
from command import in_process_of_its_own, process, write_rows
from scoring import Own

from bon import BestOfN, Flip, InputError, Score
from bon.credit import MOST, parts
from bon.engines.scripted import ScriptedEngine
from bon.errors import EngineError, UnavailableError

PROMPT = "Write a reminder for Anna to water the plants on Monday."
SUBJECT = "This is a reminder for Anna to water the plants on Monday."
LETTER = f"Hello there. {SUBJECT} Thank you very much!"


def shown(text):
    return [text[start:end] for start, end in parts(text)]


def credits_of(result):
    return {each.text: each.credit for each in result.credit}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ('"Stop." He left. Then (she too.) Yes.', ['"Stop." ', "He left. ", "Then (she too.) ", "Yes."]),
        ("At 3.14 Dr. Who met J. R. Tolkien, e.g. in Rome. and so on.", None),
        ("It was 1937. Then", ["It was 1937. ", "Then"]),
        ("Do:\n1. Buy milk.\n2. Go home\n\n- rest", ["Do:\n", "1. Buy milk.\n", "2. Go home\n\n", "- rest"]),
        ("See:\n```py\na = 1.\n\nb = 2\n```\nDone.", ["See:\n", "```py\na = 1.\n\nb = 2\n```\n", "Done."]),
        ("See:\n```py\na = 1\nb = 2", ["See:\n", "```py\na = 1\nb = 2"]),
        ("今日は晴れ。明日は雨！では。", ["今日は晴れ。", "明日は雨！", "では。"]),
        ("One.\n---\nTwo.\n***\n", ["One.\n", "---\nTwo.\n***\n"]),
        ("<think>Hm. Well.\n</think>\n\nOne. Two.", ["\n\nOne. ", "Two."]),
        ("one", None),
        ("...", None),
    ],
)
def test_a_text_is_divided_into_sentences_lines_and_blocks_of_code(text, expected):
    assert shown(text) == ([text] if expected is None else expected)


def test_neighbouring_sentences_of_a_long_text_go_together():
    text = " ".join(f"Sentence {number}." for number in range(100))
    found = shown(text)
    assert len(found) == MOST
    assert "".join(found) == text
    assert {part.count(".") for part in found} == {3, 4}


WEIGHTS = {"Alpha.": 0.5, "Beta!": 0.25, "Gamma?": -0.125, "- delta": 2.0}


def test_each_sentence_has_its_own_weight_where_the_reward_is_their_sum():
    scorer = Own(lambda each: sum(weight for part, weight in WEIGHTS.items() if part in each.candidate.text))
    text = "\U0001f331 Alpha. Beta!  Gamma?\n- delta\n"
    with BestOfN(ScriptedEngine(), scorer) as bon:
        before = bon.rerank("Write", [text, "Beta!"])
        result = bon.credit(before)
    assert [each.credit for each in result.credit] == [*WEIGHTS.values()]
    assert [text[each.start : each.end] for each in result.credit] == [each.text for each in result.credit]
    assert [each.text for each in result.credit] == ["\U0001f331 Alpha.", "Beta!", "Gamma?", "- delta"]
    assert len(scorer.calls) == 2, "one call for the candidates, and one for all sentences together"
    assert len(scorer.calls[1]) == 4
    assert replace(result, credit=None) == before


def test_the_sentence_that_names_the_subject_has_most_of_flips_reward_every_time():
    with BestOfN(n=2) as bon:
        before = bon.rerank(PROMPT, [LETTER, "Dear Tom, thank you."])
        one, two = bon.credit(before), bon.credit(before)
        found = credits_of(one)
        assert max(found, key=found.get) == SUBJECT
        assert found[SUBJECT] > 0.5 > abs(found["Thank you very much!"])
        assert one.credit == two.credit
        without = bon.rerank(PROMPT, ["Hello there. Thank you very much!"])
        assert found[SUBJECT] == before.reward - without.reward
        others = [bon.rerank(PROMPT, [LETTER.replace(part, "").strip()]) for part in (*found,)]
        read = sum(other.usage.scorer_prompt_tokens for other in others)
        assert read > 0
        assert one.usage.scorer_prompt_tokens == pytest.approx(before.usage.scorer_prompt_tokens + read, abs=3)


def test_a_scorer_that_compares_candidates_sees_the_others_as_they_are():
    texts = ["A cat sat. It slept.", "A cat sat on a mat.", "A cat slept."]
    with BestOfN(ScriptedEngine(), "consensus") as bon:
        result = bon.credit(bon.rerank("Write", texts))
        best = result.best
        for each in result.credit:
            short = [t.replace(each.text, "").strip() if i == best else t for i, t in enumerate(texts)]
            assert each.credit == pytest.approx(result.reward - bon.rerank("Write", short).scores[best].reward)
        assert len(result.credit) == 2


def test_a_scorer_that_goes_by_the_policys_own_probabilities_is_refused():
    with BestOfN(ScriptedEngine(), "logprob") as bon, pytest.raises(InputError, match="was not sampled"):
        bon.credit(bon("Write"))


def test_what_cannot_be_rated_has_a_reason_and_the_others_their_credit():
    def reward(each):
        if "One" not in each.candidate.text:
            return Score(None, "failed", "too odd")
        return float(len(each.candidate.text))

    with BestOfN(ScriptedEngine(), Own(reward)) as bon:
        one, two = bon.credit(bon.rerank("Write", ["One. Two."])).credit
    assert (one.credit, one.reason) == (None, "too odd")
    assert (two.credit, two.reason) == (5.0, None)


@pytest.mark.parametrize("error", [UnavailableError("it is away"), EngineError("it broke"), ValueError("a bug")])
def test_a_scorer_that_fails_takes_no_result_with_it(error):
    def reward(each):
        if "Two" not in each.candidate.text:
            raise error
        return 1.0

    with BestOfN(ScriptedEngine(), Own(reward)) as bon:
        before = bon.rerank("Write", ["One. Two. Three."])
        result = bon.credit(before)
    assert (result.text, result.reward, result.scores) == (before.text, 1.0, before.scores)
    without_two = result.credit[1]
    assert without_two.credit is None
    assert str(error) in without_two.reason


def test_a_deadline_leaves_the_result_and_says_why_there_is_no_credit():
    class Slow(Own):
        async def score(self, pending):
            async for position, score in super().score(pending):
                await asyncio.sleep(0.0 if pending[position].candidate.text == "One. Two." else 60)
                yield position, score

    async def run():
        async with BestOfN(ScriptedEngine(), Slow(lambda each: 1.0)) as bon:
            before = await bon.run_rerank("Write", ["One. Two."])
            return await bon.run_credit(before, deadline=0.05)

    result = asyncio.run(run())
    assert result.text == "One. Two."
    assert [(each.credit, each.reason) for each in result.credit] == [(None, "the deadline passed first")] * 2


@pytest.mark.parametrize(
    ("texts", "why"), [(["Just one sentence."], "one sentence"), (["One. Two.", ""], None), ([""], "no winner")]
)
def test_a_winner_that_has_nothing_to_leave_out_says_so(texts, why):
    with BestOfN(ScriptedEngine(), Own(lambda each: 1.0)) as bon:
        result = bon.credit(bon.rerank("Write", texts))
    assert [w for w in result.warnings if w.startswith("no credit")] == [w for w in result.warnings if why and why in w]
    assert (result.credit == ()) == (why is not None)
    assert "credit" in result.to_dict()


# --- on the command line ----------------------------------------------------------------------------------------------

OWN = """
import asyncio
def weigh(prompt, responses):
    return [0.5 * ("Alpha" in r) + 0.25 * ("Beta" in r) for r in responses]
async def wait(prompt, responses):
    if "Beta" not in responses[0]:
        open("waiting", "w").close()
        await asyncio.sleep(60)
    return weigh(prompt, responses)
def write(prompt, n):
    return ["Alpha is here. Beta too. So is Gamma."] * n
"""
RUN = ("run", "Write", "--policy", "own:write", "--credit", "-n", 2, "--scorer")


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_one_prompt_shows_what_each_sentence_earns_in_plain_text(own):
    code, out, err = in_process_of_its_own(*RUN, "own:weigh", cwd=own)
    assert code == 0, err
    table = [line.split() for line in out.splitlines() if line.startswith(("+", "-"))]
    assert table == [
        ["+0.500", "most", "Alpha", "is", "here."],
        ["+0.250", "Beta", "too."],
        ["+0.000", "least", "So", "is", "Gamma."],
    ]
    assert "\nAlpha is here. Beta too. So is Gamma.\n" in out
    assert "\x1b" not in out


def test_json_has_the_credit_with_places_and_without_the_option_nothing_of_it(own):
    code, out, _ = in_process_of_its_own(*RUN, "own:weigh", "--json", cwd=own)
    said = json.loads(out)
    assert code == 0
    assert said["credit"][1] == {"start": 15, "end": 24, "text": "Beta too.", "credit": 0.25, "reason": None}
    plain = [argument for argument in RUN if argument != "--credit"]
    assert "credit" not in json.loads(in_process_of_its_own(*plain, "own:weigh", "--json", cwd=own)[1])


def test_rows_have_the_credit_of_their_winners(own):
    rows = [
        {"prompt": "Write", "candidates": ["Gamma.", "Alpha one. Beta two."]},
        {"prompt": "Go", "candidates": ["A"]},
    ]
    write_rows(own / "in.jsonl", rows)
    code, out, err = in_process_of_its_own("rerank", "in.jsonl", "--credit", "--scorer", "own:weigh", cwd=own)
    assert code == 0, err
    first, second = (json.loads(line)["credit"] for line in out.splitlines())
    assert [(each["text"], each["credit"]) for each in first] == [("Alpha one.", 0.5), ("Beta two.", 0.25)]
    assert second == []


def test_a_scorer_without_credits_is_refused_before_anything_is_sampled(own):
    code, out, err = in_process_of_its_own(*RUN, "logprob", cwd=own)
    assert (code, out) == (2, "")
    assert "logprob-mean" in err
    assert "Traceback" not in err


def test_ctrl_c_meanwhile_leaves_the_result(own):
    running = process(*RUN, "own:wait", "--json", cwd=own)
    give_up = time.monotonic() + 60
    while not (own / "waiting").exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert json.loads(out)["text"] == "Alpha is here. Beta too. So is Gamma."
    assert b"interrupted" in err


# --- as a server ------------------------------------------------------------------------------------------------------


def backward(text, draw):
    """The policy writes the letter; what is inferred from a text is the text."""
    _, inversion, response = text.rpartition("Response:\n")
    return response if inversion else LETTER


@pytest.fixture(scope="module")
def site():
    serving = pytest.importorskip("serving")
    with serving.served(BestOfN(ScriptedEngine(backward), Flip(), n=2)) as it:
        yield it


def test_the_server_gives_the_credit_on_request_and_counts_what_it_reads(site):
    plain, asked = (site.chat(PROMPT, best_of_n={"credit": wanted}).json() for wanted in (False, True))
    assert "credit" not in plain["best_of_n"]
    found = {each["text"]: each["credit"] for each in asked["best_of_n"]["credit"]}
    assert max(found, key=found.get) == SUBJECT
    assert LETTER[asked["best_of_n"]["credit"][1]["start"] :].startswith(SUBJECT)
    assert asked["choices"][0]["message"]["content"] == LETTER
    assert asked["usage"]["scorer"]["prompt_tokens"] > plain["usage"]["scorer"]["prompt_tokens"]
    *_, last = [chunk for chunk in site.events(PROMPT, best_of_n={"credit": True}) if "best_of_n" in chunk]
    assert last["best_of_n"]["credit"] == asked["best_of_n"]["credit"]


def test_the_server_names_the_field_where_the_scorer_has_no_credits():
    serving = pytest.importorskip("serving")
    with serving.served(BestOfN(ScriptedEngine(), "logprob", n=1)) as site:
        answer = site.chat(PROMPT, best_of_n={"credit": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "best_of_n.credit"


def test_a_deadline_that_passes_meanwhile_still_gives_the_answer():
    serving = pytest.importorskip("serving")
    slow = ScriptedEngine(lambda text, draw: "word " * (1 if SUBJECT in text else 1000), step_seconds=0.02)
    with serving.served(BestOfN(ScriptedEngine([LETTER]), Flip(slow), n=1)) as site:
        answer = site.chat(PROMPT, best_of_n={"credit": True, "deadline_s": 2}).json()
    assert answer["choices"][0]["message"]["content"] == LETTER
    credits = {each["text"]: each["reason"] for each in answer["best_of_n"]["credit"]}
    assert credits[SUBJECT] == "the deadline passed first"
