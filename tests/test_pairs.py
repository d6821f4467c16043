"""Pairs for training a backward scorer: where they come from, which are kept, their negatives, what survives a kill."""

import asyncio
import json
import random
import signal
import time
from contextlib import closing

import pytest
from command import in_process_of_its_own, process, rows_of, write_rows
from tiny import save

from bon import BestOfN
from bon.cli import main
from bon.data.sink import Output
from bon.engines.scripted import ScriptedEngine
from bon.engines.torch.engine import TorchEngine
from bon.errors import InputError
from bon.pairs import alike
from bon.pairs.alike import NEAR, HeldOut, Seen, items, jaccard, neighbours, tokens
from bon.pairs.collect import Collection
from bon.pairs.constraints import altered
from bon.pairs.filters import Filters, language
from bon.pairs.making import BATCH, from_model
from bon.pairs.sources import Reading, users_turns
from bon.types import Sampling

TEA = "List three advantages of green tea over coffee for students."
CATS = "Write a short story about a cat that learns to swim in the sea."
PAIR = {"instruction": TEA, "response": "It has less caffeine, it is cheap, and it keeps you calm."}
OTHER = {"instruction": CATS, "response": "Mia fell into the water one day. She liked it, and stayed."}


@pytest.fixture
def pairs(capsys, monkeypatch, tmp_path):
    """bon pairs in this process: rows in, (exit code, pairs, standard error) out."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *options, licence="MIT"):
        source = [] if rows is None else [str(write_rows(tmp_path / "in.jsonl", rows))]
        given = ["--licence", licence] if licence else []
        output = [] if "-o" in options else ["-o", "out.jsonl"]
        code = main(["pairs", *source, *given, *output, *map(str, options)])
        out = tmp_path / "out.jsonl"
        return code, rows_of(out) if out.exists() else [], capsys.readouterr().err

    return run


# --- where they come from ---------------------------------------------------------------------------------------------


def labelled(prompt, **labels):
    return {"prompt": prompt, "candidates": ["It is a bad one.", "It is the best.", "It is a good one."], **labels}


@pytest.mark.parametrize(
    ("options", "labels", "kept"),
    [
        ((), [0.1, 0.9, 0.7], ["It is the best."]),
        (("--least", 0.6, "--per-prompt", 3), [0.1, 0.9, 0.7], ["It is the best.", "It is a good one."]),
        (("--least", 0.95), [0.1, 0.9, 0.7], []),
        ((), [0.5, 0.5, 0.5], []),
        ((), [0, 0, 0], []),
    ],
)
def test_only_good_candidates_become_pairs(pairs, options, labels, kept):
    _, made, _ = pairs([labelled(TEA, grade=labels), OTHER], *options)
    assert [pair["response"] for pair in made if pair["instruction"] == TEA] == kept


def test_the_next_good_candidate_is_taken_where_the_best_one_may_not_go_in(pairs):
    row = labelled(TEA, correct=[False, True, True])
    _, made, _ = pairs([row, OTHER], "--drop", "the best")
    assert made[0]["response"] == "It is a good one."


def test_with_rejected_each_good_answer_has_a_worse_one_of_its_row_and_only_then(pairs):
    row = labelled(TEA, grade=[0.1, 0.9, 0.7])
    preferred = {**OTHER, "rejected": "A dog."}
    _, made, _ = pairs([row, preferred], "--rejected", "--least", 0.6, "--per-prompt", 3)
    assert [(pair["response"], pair["rejected"]) for pair in made] == [
        ("It is the best.", "It is a bad one."),
        ("It is a good one.", "It is a bad one."),
        (OTHER["response"], "A dog."),
    ]
    _, made, _ = pairs([row, preferred], "--rejected", "--most-words", 15, "--strip", "^A dog.$", "--overwrite")
    assert [pair.get("rejected") for pair in made] == ["It is a bad one.", None]
    _, made, _ = pairs([row, preferred], "--overwrite")
    assert not any("rejected" in pair for pair in made)
    several = {**preferred, "rejected": ["A dog.", "A cow."]}
    assert pairs([row, several], "--overwrite")[0] == 0, "what is not asked for may be anything"
    code, _, err = pairs([row, several], "--rejected", "--overwrite")
    assert (code, "'rejected' must be text, not ['A dog.', 'A cow.']" in err) == (2, True), err
    _, made, _ = pairs([row, {**preferred, "rejected": None}], "--rejected", "--overwrite")
    assert [pair.get("rejected") for pair in made] == ["It is a bad one.", None]


def test_what_a_scorer_likes_least_is_rejected(pairs, tmp_path):
    prompts = [{"prompt": f"{verb} Anna to water the plants on Monday."} for verb in ("Remind", "Please tell")]
    asked = ("--policy", "mini", "--near", 1, "--scorer", "longest", "-n", "4", "--seed", "1", "--rejected")
    _, made, _ = pairs(prompts, *asked)
    rejected = [pair.get("rejected") for pair in made]
    assert any(rejected)
    assert all(len(worse or "") < len(pair["response"]) for worse, pair in zip(rejected, made, strict=True))
    write_rows(tmp_path / "prompts.jsonl", prompts)
    again = ("run", "prompts.jsonl", "--scorer", "longest", "-n", "4", "--seed", "1", "--all", "-o", "run.jsonl")
    assert main([*again]) == 0
    _, winners, _ = pairs(rows_of(tmp_path / "run.jsonl"), "--near", 1, "--rejected", "--overwrite")
    assert [pair.get("rejected") for pair in winners] == rejected


def test_a_pair_says_who_wrote_it_where_it_is_from_and_its_licence(pairs):
    row = labelled(TEA, correct=[False, True, False], generators=["a", "b", "c"], id="q7", license="CC0-1.0")
    _, made, _ = pairs([row, {**OTHER, "source": "a book"}])
    assert {k: made[0][k] for k in ("generator", "source", "at", "licence")} == {
        "generator": "b",
        "source": "in.jsonl",
        "at": "q7",
        "licence": "CC0-1.0",
    }
    assert (made[1]["source"], made[1]["at"], made[1]["licence"]) == ("a book", 2, "MIT")


def test_the_winners_of_a_run_become_pairs_and_those_below_the_least_reward_do_not(pairs, tmp_path):
    prompts = [{"prompt": f"{verb} Anna to water the plants on Monday."} for verb in ("Remind", "Please tell")]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    assert main(["run", "prompts.jsonl", "-n", "4", "--seed", "1", "--all", "-o", "run.jsonl"]) == 0
    run = rows_of(tmp_path / "run.jsonl")
    _, made, _ = pairs(run, "--near", 1)
    assert {pair["response"] for pair in made} == {row["text"] for row in run}
    assert {pair["reward"] for pair in made} == {row["reward"] for row in run}
    least = max(row["reward"] for row in run)
    _, made, _ = pairs(run, "--near", 1, "--least", least, "--overwrite")
    assert {pair["reward"] for pair in made} == {least}
    cut = [{**row, "candidates": [{**c, "finish_reason": "length"} for c in row["candidates"]]} for row in run]
    code, _, err = pairs(cut, "--near", 1, "--overwrite")
    assert (code, "2 refused: no answer is good enough" in err) == (2, True)


def test_the_prompt_of_a_run_is_found_where_the_winner_took_the_name_of_its_field(pairs):
    [first, _] = pairs(
        [
            {"text": "Tea is cheap and keeps you calm.", "reward": 1.0, "replaced": {"text": TEA}},
            {"text": "Mia fell into the water one day.", "reward": 1.0, "replaced": {"text": CATS}},
        ],
        "--prompt-field",
        "text",
    )[1]
    assert (first["instruction"], first["response"]) == (TEA, "Tea is cheap and keeps you calm.")


def test_prompts_are_answered_by_the_policy_and_the_best_by_the_named_scorer_is_kept(pairs, tmp_path):
    prompts = [{"prompt": f"{verb} Anna to water the plants on Monday."} for verb in ("Remind", "Please tell")]
    options = ("--scorer", "longest", "-n", "4", "--seed", "1")
    _, made, _ = pairs(prompts, "--policy", "mini", "--near", 1, *options)
    assert main(["run", "in.jsonl", "-o", "run.jsonl", *options]) == 0
    best = {row["prompt"]: (row["text"], row["reward"]) for row in rows_of(tmp_path / "run.jsonl")}
    assert {pair["instruction"]: (pair["response"], pair["reward"]) for pair in made} == best
    assert {pair["generator"] for pair in made} == {"mini"}


def asking(text, draw):
    """Ask what a user would, and answer it; some questions come again, some nearly."""
    if text:
        return f"The answer is {len(text)} {text.split()[-1]} {text.split()[0]}"
    return sentences(1, seed=draw % 120)[0] + " please" * (draw % 2)


def collected(path, count, *, resume=False):
    bon = BestOfN(ScriptedEngine(asking), "first", n=1, sampling={"seed": 3})
    collection = Collection(Filters(), HeldOut())
    output = Output.open(path, resume=resume, read=collection.known)
    reading = Reading("scripted, seed 3", "unknown")

    def fail(line, error):
        raise error

    with closing(output):
        for pair in from_model(bon, [0.8, 1.0], reading, collection, count, fail):
            collection.add(pair, output)
    return collection


def test_a_model_alone_writes_prompts_and_answers_until_there_are_enough_and_none_twice(tmp_path):
    collection = collected(tmp_path / "out.jsonl", 60)
    made = rows_of(tmp_path / "out.jsonl")
    assert 60 <= collection.count == len(made) < 60 + BATCH
    assert len({pair["instruction"] for pair in made}) == len(made)
    seen = Seen()
    for pair in made:
        assert seen.find(pair["instruction"]) is None
        seen.add(pair["instruction"])
    assert collection.refused["the instruction is there already, or nearly the same one"] > 0
    assert all(pair["source"] == "scripted, seed 3" for pair in made)
    assert max(pair["at"] for pair in made) >= BATCH, "more than one batch was needed"


def test_a_model_that_goes_on_after_a_kill_writes_what_it_would_have_written(tmp_path):
    whole = tmp_path / "whole.jsonl"
    collected(whole, 60)
    part = tmp_path / "part.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:40]) + lines[40][:25])
    collected(part, 60, resume=True)
    assert sorted(part.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())


def test_a_model_that_writes_the_same_again_and_again_is_given_up(tmp_path):
    bon = BestOfN(ScriptedEngine(["Write the same thing every time."]), "first", n=1, sampling={"seed": 3})
    made = from_model(bon, [1.0], Reading("x", "unknown"), Collection(Filters(), HeldOut()), 5, pytest.fail)
    with pytest.raises(InputError, match="none became a pair"):
        list(made)


def test_a_real_model_writes_users_turns_from_its_template_and_a_sample_has_one_text(tmp_path):
    engine = TorchEngine(save(tmp_path / "model"))
    some = asyncio.run(users_turns(engine, Sampling(seed=1), 0, 12))
    later = asyncio.run(users_turns(engine, Sampling(seed=1), 6, 6))
    asyncio.run(engine.aclose())
    assert later == [one for one in some if one[0] >= 6]


def test_a_model_without_a_chat_template_cannot_write_users_turns(pairs, tmp_path):
    code, made, err = pairs(None, "--policy", save(tmp_path / "model", kind="bare"), "--count", 2)
    assert (code, made) == (2, [])
    assert "has no chat template" in err


def test_rows_of_alpacas_form_have_their_input_behind_the_instruction(pairs):
    rows = [{**PAIR, "input": "Be brief."}, {**OTHER, "input": ""}]
    _, made, _ = pairs(rows, "--input-field", "input")
    assert [pair["instruction"] for pair in made] == [f"{TEA}\n\nBe brief.", CATS]


def test_tool_headers_are_stripped_and_answers_that_call_a_tool_are_dropped(pairs):
    header = "toolformer: enabled\ntoolformer access: wikipedia\nUseful for facts.\nwikipedia(query)\n"
    rows = [
        {**PAIR, "instruction": header + TEA},
        OTHER,
        {"instruction": "Who was Bach?", "response": "See wiki('B')."},
    ]
    strip = ("--strip", r"(?s)\Atoolformer: enabled.*?\)\n")
    _, made, err = pairs(rows, *strip, "--drop", r"\b[a-z]+\('")
    assert [pair["instruction"] for pair in made] == [TEA, CATS]
    assert "1 refused: --drop matches the response" in err


def test_a_file_of_pairs_is_input_again_and_keeps_what_it_says(pairs, tmp_path):
    rows = [{**PAIR, "source": "s", "licence": "CC0-1.0", "at": 9, "context": "User: Hi"}, OTHER]
    _, made, _ = pairs(rows)
    _, again, _ = pairs(made, "--overwrite", licence="MIT")
    assert again == made
    assert (made[0]["context"], made[0]["at"], made[0]["source"]) == ("User: Hi", 9, "s")


# --- which are kept ---------------------------------------------------------------------------------------------------


def test_pairs_that_stand_in_the_rows_they_will_be_judged_on_are_refused(pairs, tmp_path):
    long = "Explain in detail how the heart of a whale pumps blood through its body while it dives deep into the sea"
    wrapped = (
        f"You are a teacher of 30 children. {long}. Give examples, draw a picture, and sing a song about it that all"
    )
    wrapped += " of the class can learn by heart within a single lesson on a Monday before the bell rings again."
    assert Seen(texts=[long]).find(wrapped) is None
    write_rows(tmp_path / "judged.jsonl", [{"prompt": text} for text in (TEA, CATS, long)])
    rows = [
        PAIR,
        {"instruction": CATS.replace("short", "brief"), "response": "Nearly the same."},
        {"instruction": wrapped, "response": "It stands in it."},
        {"instruction": "Name the capital of Peru.", "response": "Lima."},
        {"instruction": "How many legs has an ant?", "response": "Six."},
    ]
    _, made, err = pairs(rows, "--held-out", "judged.jsonl")
    assert [pair["response"] for pair in made] == ["Lima.", "Six."]
    assert "3 refused: the instruction is held out" in err


def test_a_file_that_holds_what_is_held_out_is_not_added_to(pairs, tmp_path):
    write_rows(tmp_path / "judged.jsonl", [{"prompt": CATS}])
    pairs([PAIR, OTHER])
    code, made, err = pairs([PAIR], "--resume", "--held-out", "judged.jsonl")
    assert code == 2
    assert len(made) == 2
    assert "out.jsonl:2: cannot resume: the pair stands in the rows of --held-out" in err


def mangled(text, draw):
    words = text.split()
    for _ in range(draw.randint(0, 4)):
        words[draw.randrange(len(words))] = draw.choice(["cat", "blue", "", words[draw.randrange(len(words))]])
    return " ".join(words)


def sentences(count, vocabulary=60, seed=0):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(vocabulary):02}" for _ in range(draw.randint(2, 25))) for _ in range(count)]


def test_near_duplicates_are_found_exactly():
    texts, draw = sentences(300), random.Random(1)
    seen, sets = Seen(texts=texts), [items(tokens(text)) for text in texts]
    found = []
    for text in [mangled(text, draw) for text in texts]:
        own = items(tokens(text))
        found.append(any(jaccard(own, other) >= NEAR for other in sets))
        assert (seen.find(text) is not None) == found[-1]
    assert 50 < sum(found) < 250


def test_looking_for_near_duplicates_compares_few_texts_in_full(monkeypatch):
    compared = []
    monkeypatch.setattr(alike, "jaccard", lambda a, b: compared.append(1) or jaccard(a, b))
    seen = Seen()
    for text in sentences(2000, vocabulary=600):
        assert seen.find(text) is None
        seen.add(text)
    assert len(compared) < 2000


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Write a poem about the autumn", "en"),
        ("Schreibe ein Gedicht über den Herbst und die Blätter", "de"),
        ("Quelle est la capitale de la France ?", "fr"),
        ("¿Cuál es la capital de España y por qué?", "es"),
        ("クマの冬眠について説明してください", "ja"),
        ("请写一首关于秋天的诗", "zh"),
        ("Напиши стихотворение", "ru"),
        ("x = 3 + 4", None),
    ],
)
def test_the_language_of_a_text_is_told(text, code):
    assert language(text) == code


def test_what_is_too_long_repeats_itself_or_is_in_another_language_is_refused(pairs):
    rows = [
        PAIR,
        OTHER,
        {"instruction": "Name the capital of Peru.", "response": "word " * 401},
        {"instruction": "How many legs has an ant?", "response": "An ant has six legs and a head and so on. " * 12},
        {
            "instruction": "Wie viele Beine hat die Ameise und was frisst sie?",
            "response": "Sechs, und sie frisst alles.",
        },
        {"instruction": "Hi", "response": "Hello."},
    ]
    _, made, err = pairs(rows, "--language", "en")
    assert [pair["instruction"] for pair in made] == [TEA, CATS]
    for reason in (
        "response is too long",
        "repeats itself",
        "instruction is in another language",
        "instruction is too short",
    ):
        assert f"1 refused: the {reason}" in err or f"it {reason}" in err


# --- negatives --------------------------------------------------------------------------------------------------------


def test_a_neighbour_has_the_topic_and_is_no_near_duplicate():
    texts = [
        "Explain how volcanoes erupt.",
        "Write a song about volcanoes.",
        "Explain how volcanoes erupt!",
        "Write a song about the tax law of Peru.",
        "Explain how rivers freeze.",
    ]
    near = neighbours(texts, 2)
    assert near[0][0] == "Explain how rivers freeze." or near[0][0] == "Write a song about volcanoes."
    assert "Explain how volcanoes erupt!" not in near[0]
    assert all(text not in others for text, others in zip(texts, near, strict=True))


@pytest.mark.parametrize(
    ("instruction", "negative"),
    [
        ("Describe the moon in the style of Poe.", "Describe the moon."),
        ("Explain gravity to me. Do not use any numbers.", "Explain gravity to me."),
        ("Describe the sun in at most 50 words.", "Describe the sun."),
        ("Describe the sea without adjectives.", "Describe the sea."),
        ("Describe the wood as a table.", "Describe the wood."),
    ],
)
def test_a_constraint_is_dropped(instruction, negative):
    assert negative in altered(instruction, "It is big.", 3)


@pytest.mark.parametrize(
    ("instruction", "changed"),
    [
        ("Name the pros of tea.", "Name the cons of tea."),
        ("Do not sing to me.", "Do sing to me."),
        ("Increase the volume.", "Decrease the volume."),
    ],
)
def test_a_word_is_replaced_by_its_opposite(instruction, changed):
    assert altered(instruction, "It is big.", 1) == [changed]


def test_a_number_a_language_and_a_format_change():
    for instruction in (
        "Name 7 fish.",
        "Name seven fish.",
        "Say it in French.",
        "Make it a haiku.",
        "Write it in Java.",
    ):
        changed = altered(instruction, "It is big.", 1)[0]
        assert changed != instruction
        assert len(set(changed.split()) ^ set(instruction.split())) >= 2


def test_a_constraint_is_added_only_where_the_response_breaks_it():
    for response in ("One. Two. Three, four.", "short", '{"a": 1}', "- a list\n- of two", "Lang, " * 300):
        added = altered("Tell me about whales", response, 3)[-1].removeprefix("Tell me about whales ")
        kept = {
            "Answer in JSON.": "{" in response,
            "Answer as a bulleted list.": response.startswith("-"),
            "Do not use any commas.": "," not in response,
            "Use lower case only.": response == response.lower(),
            "Answer in one sentence.": response.count(".") <= 2,
        }
        assert not kept.get(added, False), (response, added)


def test_every_pair_has_both_kinds_of_negatives_and_none_is_its_own_instruction(pairs):
    rows = [PAIR, OTHER, {"instruction": "List three advantages of a cat for students.", "response": "It is warm."}]
    _, made, _ = pairs(rows, "--negatives", 1)
    assert all(len(pair["negatives"]) == 2 for pair in made)
    assert all(pair["instruction"] not in pair["negatives"] for pair in made)
    assert made[0]["negatives"][0] == rows[2]["instruction"]
    _, made, _ = pairs(rows, "--negatives", 0, "--overwrite")
    assert all("negatives" not in pair for pair in made)


# --- bad input, and what survives -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([], (), "no pairs"),
        ([PAIR], (), "one pair only"),
        ([{"response": "x"}], (), "in.jsonl:1: the row has no field 'instruction'"),
        ([{"instruction": " ", "response": "x"}], (), "the prompt is empty"),
        ([{"prompt": "Say hi to all"}], (), "Give --response-field NAME, or --policy MODEL"),
        ([{"prompt": "Say hi", "response": 3}], (), "'response' must be text, not 3"),
        ([{"prompt": "Say hi", "candidates": ["a", "b"]}], (), "the row has no labels"),
        ([{"prompt": "Say hi", "text": "Hi", "reward": "high"}], (), "must be text and a number, not 'Hi' and 'high'"),
        ([PAIR, OTHER], ("--strip", "("), "'(' is no regular expression"),
        ([PAIR, OTHER], ("--language", "xx"), "unknown language 'xx'"),
        ([PAIR, OTHER], ("--held-out", "none.jsonl"), "cannot read none.jsonl"),
        ([PAIR, OTHER], ("-o", "in.jsonl"), "both the input and the output"),
        (None, (), "nothing to make pairs of"),
        ([PAIR, OTHER], ("--scorer", "longest"), "--scorer says how answers are chosen that --policy gives"),
        ([PAIR, OTHER], ("--least", "nan"), "--least must be a number"),
        ([PAIR, OTHER], ("--licence", " "), "the row has no licence"),
        ([PAIR, OTHER], ("-n", "4"), "-n says how answers are chosen that --policy gives"),
        ([PAIR, OTHER], ("--policy", "mini", "--turn-temperature", "1"), "in.jsonl does: leave one of them out"),
    ],
)
def test_bad_input_gets_one_sentence(pairs, rows, options, says):
    code, _, err = pairs(rows, *options)
    assert code == 2
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("rows", [[PAIR, OTHER], None])
def test_a_licence_has_to_be_said(pairs, rows):
    code, made, err = pairs(rows, *(("--policy", "scripted") if rows is None else ()), licence=None)
    assert (code, made) == (2, [])
    assert "--licence unknown" in err


def test_a_bad_row_keeps_the_pairs_before_it_and_with_skip_bad_those_behind_it(pairs):
    rows = [PAIR, OTHER, {"response": "x"}, {"instruction": "Name the capital of Peru.", "response": "Lima."}]
    code, made, _ = pairs(rows)
    assert (code, len(made)) == (2, 2)
    assert all(pair["negatives"] for pair in made)
    code, made, err = pairs(rows, "--skip-bad", "--resume")
    assert (code, len(made)) == (0, 3)
    assert "skipped in.jsonl:3" in err


def test_another_source_is_added_to_what_is_there(pairs):
    pairs([PAIR, OTHER])
    code, made, err = pairs([OTHER, {"instruction": "Name the capital of Peru.", "response": "Lima."}], "--resume")
    assert code == 0
    assert [pair["response"] for pair in made] == [PAIR["response"], OTHER["response"], "Lima."]
    assert "1 new pairs, 3 in out.jsonl" in err


def test_what_is_to_be_overwritten_stays_where_the_first_row_is_bad(pairs):
    pairs([PAIR, OTHER])
    code, made, err = pairs([{"response": "x"}], "--overwrite")
    assert (code, len(made)) == (2, 2)
    assert "0 new pairs" not in err


def test_a_held_out_file_without_rows_is_refused(pairs, tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    code, made, err = pairs([PAIR, OTHER], "--held-out", "test.jsonl")
    assert (code, made) == (2, [])
    assert "test.jsonl holds no rows" in err


def test_a_winner_whose_field_candidates_is_something_else_is_a_pair(pairs):
    row = {"prompt": TEA, "text": "It is cheap.", "reward": 1.0, "candidates": 5}
    assert [pair["response"] for pair in pairs([row, OTHER])[1]] == ["It is cheap.", OTHER["response"]]


def test_pairs_of_another_tool_whose_source_is_no_text_are_added_to(pairs, tmp_path):
    write_rows(tmp_path / "out.jsonl", [{**PAIR, "source": ["a book", 3], "at": 7}])
    code, made, err = pairs([OTHER], "--resume")
    assert (code, len(made)) == (0, 2), err


def test_ctrl_c_while_negatives_are_made_says_that_the_pairs_are_there(pairs, tmp_path, monkeypatch):
    def interrupted(texts, count):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bon.pairs.collect.neighbours", interrupted)
        code, made, err = pairs([PAIR, OTHER])
    assert (code, len(made)) == (130, 2)
    assert "2 pairs are in out.jsonl, without negatives. The same command with --resume goes on" in err
    code, made, _ = pairs([PAIR, OTHER], "--resume")
    assert (code, all(pair["negatives"] for pair in made)) == (0, True)


def test_half_a_file_with_negatives_is_removed(pairs, tmp_path, monkeypatch):
    """On a full disk it took the room that the pairs need."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bon.pairs.collect.altered", full)
    code, made, err = pairs([PAIR, OTHER])
    assert (code, len(made)) == (1, 2)
    assert "No space left on device" in err
    assert not (tmp_path / "out.jsonl.part").exists()


def test_pairs_are_kept_where_the_negatives_cannot_be_written(pairs, tmp_path):
    (tmp_path / "out.jsonl.part").mkdir()
    code, made, err = pairs([PAIR, OTHER])
    assert (code, len(made)) == (1, 2)
    assert "out.jsonl.part" in err


SLOW = """
from bon.engines.scripted import ScriptedEngine

model = ScriptedEngine(lambda text, draw: f"{text.split()[-1]} is an answer, number {draw}", step_seconds=0.03)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_at_any_moment_loses_no_pair_and_resume_completes_the_file(tmp_path, how):
    (tmp_path / "slow.py").write_text(SLOW)
    asked = [{"prompt": f"Please describe item{i} of list{i % 7} and name{i * i}"} for i in range(200)]
    write_rows(tmp_path / "in.jsonl", asked)
    arguments = ("pairs", "in.jsonl", "-o", "out.jsonl", "--licence", "MIT", "-n", 2, "--near", 1)
    arguments += ("--scorer", "first", "--policy")
    running = process(*arguments, "slow:model", cwd=tmp_path)
    out = tmp_path / "out.jsonl"
    end = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size):
        assert time.monotonic() < end
        time.sleep(0.01)
    running.send_signal(how)
    _, err = running.communicate(timeout=30)
    before = out.read_bytes()
    there = [json.loads(line)["instruction"] for line in before.splitlines()]
    assert there
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert f"{len(there)} pairs are in out.jsonl, without negatives" in err.decode()
    code, _, err = in_process_of_its_own(*arguments, "slow:model", "--resume", cwd=tmp_path)
    assert code == 0, err
    made = rows_of(out)
    assert [pair["instruction"] for pair in made][: len(there)] == there
    assert sorted(pair["instruction"] for pair in made) == sorted(row["prompt"] for row in asked)
    assert all(pair["negatives"] for pair in made)
