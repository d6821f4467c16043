"""From raw reconstructions to instructions: every outcome has a status, and what is settled stays settled."""

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bon.errors import UnknownNameError
from bon.scorers.parsing import Parser, response_piece, strip_think
from bon.similarity import WordF1, characters, words
from bon.types import Candidate, Tokens

DIRECT, JSON = Parser("robust", "text"), Parser("robust", "json")
REFERENCE = Parser("reference", "json")
X = "Write a short haiku about rain in autumn."


def outcome(parsed):
    return parsed.status, parsed.instruction


# --- thinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("plain", "plain"),
        ("<think>a\nb</think>\n\nanswer", "\n\nanswer"),
        ("x <think>a</think> y <think>b</think> z", "x  y  z"),
        ("answer <think>never closed", "answer "),
        ("<think>only thinking</think>", ""),
        ("opened by the template</think>answer", "answer"),
    ],
)
def test_thinking_is_removed_from_candidates_unclosed_and_unopened_too(text, left):
    assert strip_think(text) == left


def test_a_candidate_without_thinking_keeps_its_token_ids():
    tokens = Tokens("Rain. ", (1, 2), "vocabulary")
    assert response_piece(Candidate(0, "Rain. ", tokens=tokens)) is tokens
    assert response_piece(Candidate(0, "Rain. ")) == "Rain. "


def test_a_candidate_with_thinking_loses_its_token_ids():
    text = "<think>hm</think>\n\nRain."
    assert response_piece(Candidate(0, text, tokens=Tokens(text, (1,), "v"))) == "Rain."


def test_nothing_but_thinking_leaves_nothing_to_score():
    assert response_piece(Candidate(0, "<think>hm")) is None
    assert response_piece(Candidate(0, " \n")) is None


def test_thinking_in_a_reconstruction_is_removed():
    assert outcome(DIRECT.parse(f"<think>maybe a limerick?</think>\n\n{X}")) == ("ok", X)
    assert outcome(JSON.parse('<think>{"instruction": "no"}</think>{"instruction": "yes"}')) == ("ok", "yes")
    assert DIRECT.parse("<think>no end").status == "failed"


def test_a_think_end_that_nothing_opened_fails_and_names_the_remedy():
    parsed = DIRECT.parse(f"it rhymes, so</think>{X}")
    assert outcome(parsed) == ("failed", None)
    assert "thinking=True" in parsed.reason


def test_a_thinking_model_may_start_inside_its_block():
    parser = Parser("robust", "text", thinking=True)
    assert outcome(parser.parse(f"it rhymes, so</think>{X}")) == ("ok", X)
    assert outcome(parser.parse(f"<think>it rhymes, so</think>{X}")) == ("ok", X)
    assert parser.parse("it rhymes").status == "failed"
    assert parser.settled("it rhymes and then") is None
    assert parser.settled("it rhymes</think>Write one ").strip() == "Write one"


# --- the bare instruction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        f"Instruction: {X}",
        f"**Instruction:** {X}",
        f"The inferred instruction is: {X}",
        f"The original prompt was:\n{X}",
        f"## Instruction\n: {X}",
        f'"{X}"',
        f"“{X}”",
        f"`{X}`",
        f'Instruction: "{X}"',
        f'"Instruction: {X}"',
    ],
)
def test_labels_and_quotation_marks_around_the_whole_are_removed(raw):
    parsed = DIRECT.parse(raw)
    assert outcome(parsed) == ("repaired", X)
    assert parsed.reason


@pytest.mark.parametrize(
    "raw", [X, 'Say "hi" and "bye"', '"Hi" and "bye"', "Prompt engineering: explain it", "Task: sum up"]
)
def test_text_that_is_no_label_stays(raw):
    assert outcome(DIRECT.parse(raw)) == ("ok", raw)


@pytest.mark.parametrize("raw", ["", "  \n", "Instruction:", '""', "**"])
def test_an_empty_answer_failed(raw):
    parsed = DIRECT.parse(raw)
    assert outcome(parsed) == ("failed", None)
    assert parsed.reason


def test_a_truncated_answer_is_used_and_says_so():
    parsed = DIRECT.parse(X, "length")
    assert outcome(parsed) == ("repaired", X)
    assert "cut off" in parsed.reason


# --- JSON -------------------------------------------------------------------------------------------------------------


def blob(**options):
    return json.dumps({"reasoning": 'It has {"three"} lines.\nSo', "instruction": X}, **options)


@pytest.mark.parametrize("raw", [blob(), blob(indent=2), f"\n{blob()} \n"])
def test_valid_json_is_ok_also_when_pretty_printed(raw):
    assert outcome(JSON.parse(raw)) == ("ok", X)


@pytest.mark.parametrize(
    "raw",
    [
        f"```json\n{blob(indent=2)}\n```",
        f"Here it is:\n{blob()}\nHope that helps.",
        f"{{'reasoning': 'It's short', 'instruction': '{X}'}}",
        f'{{"reasoning": "short", "instruction": "{X}",}}',
        f'{{"reasoning": "line\nbreak", "instruction": "{X}"}}',
        f'{{"reasoning": "says "hi", then stops", "instruction": "{X}"}}',
        f'{{"reasoning": "short"\n "INFERRED INSTRUCTION": "{X}"}}',
        f'{{"reasoning": "short", "instruction": "{X}"',
        f'{{"reasoning": "short", "instruction": "{X}',
        f'```\n{{"instruction": "{X}"\n```',
        f"{{“reasoning”: “short”, “instruction”: “{X}”}}",
        f'{{"reasoning": "short", "instruction": ["{X}"]}}',
    ],
)
def test_json_that_is_wrapped_broken_or_cut_short_is_repaired(raw):
    parsed = JSON.parse(raw)
    assert outcome(parsed) == ("repaired", X)
    assert parsed.reason


def test_unescaped_quotation_marks_belong_to_the_instruction():
    raw = '{"reasoning": "r", "instruction": "Say "hi, there", and "bye" to \\alpha"}'
    assert outcome(JSON.parse(raw)) == ("repaired", 'Say "hi, there", and "bye" to \\alpha')


def test_keys_inside_the_reasoning_are_not_the_instruction():
    raw = json.dumps(
        {"reasoning": 'maybe {"instruction": "no"}', "nested": {"instruction": "no"}, "instruction": "yes"}
    )
    assert outcome(JSON.parse(raw)) == ("ok", "yes")


def test_plain_text_where_json_was_asked_for_is_a_fallback():
    parsed = JSON.parse(f"Instruction: {X}")
    assert outcome(parsed) == ("fallback", X)
    assert parsed.reason == "the answer is not JSON"


@pytest.mark.parametrize(
    "raw",
    [
        "",
        '{"reasoning": "only this"}',
        '{"reasoning": "cut sho',
        '{"instruction": ""}',
        '{"instruction": null}',
        "{}",
        "```\n```",
    ],
)
def test_json_without_an_instruction_failed_and_its_other_fields_are_not_scored(raw):
    parsed = JSON.parse(raw)
    assert outcome(parsed) == ("failed", None)
    assert parsed.reason


def test_half_a_surrogate_pair_becomes_text_that_can_be_written_out():
    assert JSON.parse('{"instruction": "a \\ud83d b"}').instruction == "a \ufffd b"
    assert JSON.parse('{"instruction": "a \\ud83d\\ude00 b"}').instruction == "a 😀 b"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.text(max_size=6).filter(lambda k: "instruct" not in k.lower()), json_values, max_size=3),
    st.text(min_size=1, max_size=30).filter(lambda t: t.strip()),
    st.booleans(),
    st.sampled_from([None, 2]),
)
@settings(max_examples=200)
def test_valid_json_is_read_as_a_json_parser_reads_it(before, instruction, ascii_only, indent):
    raw = json.dumps({**before, "instruction": instruction, "after": "x"}, ensure_ascii=ascii_only, indent=indent)
    assume("think>" not in raw)
    assert outcome(JSON.parse(raw)) == ("ok", instruction.strip())


# --- what is settled --------------------------------------------------------------------------------------------------

PIECES = (
    r"""write |the |haiku| |Instruction:|inferred |The |"|'|“|”|**|:|,|{|}|{"|"instruction": "|"reasoning": "|", "|"""
    r"""{'instruction': '|\|\n|\u00|e9|\ud83d|\ude00|<think>|</think>|<thi|```|```json|[|]|12|null|x": |"""
    r"""写|诗|。|\u8bd7|\ud840|\udc00|inſtruction """
)
pieces = st.sampled_from([*PIECES.split("|"), "\n"])
raws = st.lists(pieces, max_size=25).map("".join)
starts = st.sampled_from(
    ["", '{"reasoning": "r", "instruction": "', "{'instruction': '", '```json\n{"instruction": "', "Write "]
)


def test_a_thinking_tag_under_way_settles_nothing_that_it_would_take_back():
    # '"' then '<' reads as a quotation mark inside the string; once '<' has become a block, the string may end there.
    parser, answer = Parser("robust", "json", False), '{"reasoning": "r", "instruction": "{"\n<think>'
    settled = [parser.settled(answer[:end]) for end in range(answer.index("<"), len(answer) + 1)]
    assert set(settled) == {"{"}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("output", ["text", "json"])
@given(start=starts, rest=raws, finish=st.sampled_from(["stop", "length"]))
@settings(max_examples=200)
def test_no_continuation_takes_back_a_settled_word(output, thinking, start, rest, finish):
    parser, raw = Parser("robust", output, thinking), start + rest
    final = parser.parse(raw, finish)
    finished = ""
    for end in range(len(raw) + 1):
        settled = parser.settled(raw[:end])
        if settled is not None:
            assert settled.startswith(finished)
            finished = settled[: len(settled) - len(re.search(r"\S*\Z", settled).group())]
            if final.instruction is not None:
                assert words(final.instruction)[: len(words(finished))] == words(finished)
                # A character of a script without spaces counts at once, and so does what stands before it.
                counted = characters(re.search(r"(?s).*[\s写诗\U00020000]|", settled).group())
                assert characters(final.instruction)[: len(counted)] == counted


@pytest.mark.parametrize(
    ("raw", "settled"),
    [
        ('{"reasoning": "write a poem now', None),
        ('{"reasoning": "r", "instruction": "write a', "write a"),
        ('{"reasoning": "r", "instruction": "write", "note": "and more', "write"),
        ("plain text, which a fallback would score", None),
        ('{"instruction": "caf\\u00', "caf"),
    ],
)
def test_only_the_instruction_field_is_settled(raw, settled):
    assert JSON.settled(raw) == settled


@pytest.mark.parametrize(
    "raw", ["The inferred instruc", "The instruction is", "** Instruction", "“Write a poem", "<think>Write a"]
)
def test_what_may_yet_be_removed_is_not_settled(raw):
    assert not DIRECT.settled(raw)


def test_a_text_without_spaces_is_settled_as_it_comes():
    """It had no finished word before its end, so nothing was ever settled: all of it might have become a label."""
    assert DIRECT.settled("写一首") == "写一首"
    assert DIRECT.settled("Haiku3") == "Haiku3"
    assert DIRECT.settled("Haiku") is None


REPEATED = [
    "#",
    "a",
    "{",
    '{"a" ',
    '{"a": 1, ',
    "{“",
    '"“',
    "'\"",
    "\\",
    '\\"',
    "```",
    "\n",
    " ",
    "<think>",
    "<think> ",
    "写",
]


@pytest.mark.parametrize("start", ["", '{"instruction": "', "<think>"])
@pytest.mark.parametrize("unit", REPEATED)
def test_reading_takes_linear_time(unit, start):
    """A model that repeats itself took 1.4 s for each token; what is quadratic takes minutes here."""
    raw = start + unit * (100_000 // len(unit)) + "x"
    for parser in (DIRECT, JSON, REFERENCE):
        parser.settled(raw)
        parser.parse(raw)


def test_the_reference_parser_settles_nothing():
    assert REFERENCE.settled('{"INFERRED INSTRUCTION": "write a poem ') is None


# --- the released code ------------------------------------------------------------------------------------------------

REASONING = (
    "The response has three short lines, seventeen syllables, and images of wet leaves, "
    "so it is most likely a haiku on weather."
)


def test_the_released_code_scores_1_on_one_line_and_0_316_pretty_printed():
    """Its line breaks become a literal \\n before parsing, outside strings too: the raw blob is scored instead."""
    answer = {"REASONING": REASONING, "INFERRED INSTRUCTION": X}
    one_line, pretty = (REFERENCE.parse(json.dumps(answer, indent=indent)) for indent in (None, 2))
    assert (one_line.status, WordF1()(one_line.instruction, X).f1) == ("ok", 1.0)
    assert (pretty.status, round(WordF1()(pretty.instruction, X).f1, 3)) == ("fallback", 0.316)
    assert pretty.instruction.startswith('{\\n  "REASONING"')
    assert JSON.parse(json.dumps(answer, indent=2)).instruction == X


@pytest.mark.parametrize(
    ("raw", "status", "instruction"),
    [
        ('```json{"INFERRED INSTRUCTION": "x"}```', "ok", "x"),
        ('```json\n{"INFERRED INSTRUCTION": "x"}\n```', "fallback", '\\n{"INFERRED INSTRUCTION": "x"}\\n'),
        ('{"INFERRED INSTRUCTION": "x\ny"}', "ok", "x\ny"),
        ('{"INFERRED INSTRUCTION": "\\alpha"}', "ok", "\\alpha"),
        ('{"Inferred Instructcion": "x"}', "ok", "x"),
        ('{"INFERRED INSTRUCTION": "", "inferred instruction": "x"}', "ok", "x"),
        ('{"Inferred_Instruction": ""}', "ok", ""),
        ('{"instruction": "x"}', "fallback", '{"instruction": "x"}'),
        ("<think>a</think> <answer>an assistant</answer> x<|text|>", "fallback", "an  x"),
        ("<think>unclosed x", "fallback", "unclosed x"),
        ("", "fallback", ""),
        ("[1]", "failed", None),
        ('{"INFERRED INSTRUCTION": ["x"]}', "failed", None),
    ],
)
def test_the_reference_parser_has_the_released_codes_quirks(raw, status, instruction):
    assert outcome(REFERENCE.parse(raw)) == (status, instruction)


def test_an_unknown_parser_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'reference'"):
        Parser("referense", "json")
