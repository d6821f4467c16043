"""The metric is the paper's, bit for bit; its variants; the bound never lies below what a text can still reach."""

import json
import re
import string
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bon.errors import InputError, UnknownNameError
from bon.similarity import (
    SIMILARITIES,
    ChrF,
    EmbeddingSimilarity,
    F1Bound,
    Match,
    RougeL,
    WordF1,
    among,
    as_similarity,
    characters,
    matched_words,
    mean_bound,
    missed_words,
    unicode_words,
    upper_bound,
    words,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BOUNDED = ["word_f1", "word_f1_unicode", "rouge_l"]

some_words = st.sampled_from(
    ["a", "the", "The", "write", "Write,", "foo-bar", "foobar", "an", "-", "’a’", "don’t", "ΟΔΟΣ"]
)
phrases = st.lists(some_words, max_size=12).map(" ".join)
spaceless = st.sampled_from([*"写一首关于秋雨的诗人々カがーｶﾞไทยทํากារမ", "か\u3099", "葛\U000e0100", "𠀀"])
bits = st.one_of(
    some_words,
    spaceless,
    st.sampled_from([*" \n。、“”？！·—😀Σ", "👩‍👩‍👧", "é", "e\u0301", "´", "ﬁ", "Ａ", "한국어", "\u200b", "a the "]),
)
mixed = st.lists(bits, max_size=20).map("".join)
texts = st.one_of(phrases, mixed, st.text(max_size=40))
spaced_texts = texts.filter(lambda text: WordF1()("", text).compared == "words")


def literal_f1(prediction, truth):
    """The metric as the paper's code states it, written down step by step and sharing nothing with bon."""

    def tokens(text):
        text = text.lower()
        text = "".join(c for c in text if c not in string.punctuation)
        text = re.sub(r"\b(a|an|the)\b", " ", text)
        return text.split()

    predicted, true = tokens(prediction), tokens(truth)
    same = sum(min(predicted.count(word), true.count(word)) for word in set(true))
    if same == 0:
        return 0, 0, 0
    precision = 1.0 * same / len(predicted)
    recall = 1.0 * same / len(true)
    return (2 * precision * recall) / (precision + recall), precision, recall


def rows(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not in ../shared/data")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@given(texts, spaced_texts)
@example("", "")
@example("the", "a")
@example("A haiku", "a the haiku, haiku")
def test_word_f1_is_the_papers_metric_bit_for_bit(inferred, instruction):
    match = WordF1()(inferred, instruction)
    assert (match.f1, match.precision, match.recall) == literal_f1(inferred, instruction)


def test_word_f1_is_the_papers_metric_on_every_alpacaeval_response_against_its_prompt():
    compared = 0
    for row in rows("alpacaeval_dev.jsonl"):
        prompt = row["messages"][-1]["content"]
        if WordF1()("", prompt).compared == "characters":
            continue  # one prompt of the set asks how a Chinese character sounds
        for response in row["candidates"]:
            match = WordF1()(response, prompt)
            assert (match.f1, match.precision, match.recall) == literal_f1(response, prompt)
            compared += 1
    assert compared > 6000


def test_nothing_in_common_scores_0_even_when_both_are_empty():
    assert WordF1()("", "").f1 == 0.0
    assert WordF1()("the", "a").f1 == 0.0


@given(texts)
@pytest.mark.parametrize("tokenize", [words, unicode_words, characters, lambda text: characters(text, unicode_words)])
def test_words_end_at_white_space_only(tokenize, text):
    assert tokenize(text) == [word for part in text.split() for word in tokenize(part)]


def test_punctuation_glues_words_together():
    assert words("foo-bar the e.g., a.n") == ["foobar", "eg"]


@given(texts, texts, st.lists(st.integers(0, 60), max_size=8), st.sampled_from(BOUNDED))
@settings(max_examples=200)
def test_the_bound_never_lies_below_what_the_whole_text_reaches(whole, instruction, cuts, name):
    metric = as_similarity(name)
    bound, reached = metric.bound(instruction), metric(whole, instruction).f1
    for cut in sorted(cuts):
        assert bound.update(whole[:cut]) >= reached
    assert bound.update(whole) >= reached


def test_a_function_of_the_callers_has_no_bound():
    """A tokenizer that looks past white space takes back what was counted: the bound was 0.667, the final F1 1.0."""
    metric = WordF1("pairs", lambda text: [text.replace(" ", "").lower()])
    assert metric("write haiku", "writehaiku").f1 == 1.0
    assert metric.bound("writehaiku") is None
    assert metric("诗", "诗人").compared == "words"


@given(texts, texts)
def test_the_bound_depends_on_the_text_only_and_not_on_how_often_it_was_updated(whole, instruction):
    step_by_step = F1Bound(instruction)
    for end in range(len(whole) + 1):
        last = step_by_step.update(whole[:end])
    assert last == F1Bound(instruction).update(whole)


def test_the_bound_is_2r_over_2r_plus_u():
    bound = F1Bound("write one haiku")  # R = 3
    assert bound.update("write one ") == 1.0
    assert bound.update("write one poem") == 1.0  # may yet become "poem-like" or the like
    assert bound.update("write one poem ") == pytest.approx(6 / 7)
    assert bound.update("write one poem the write ") == pytest.approx(6 / 8)


def test_the_last_word_counts_only_when_it_is_finished():
    bound = F1Bound("write foo-bar")
    assert bound.update("write foo") == 1.0
    assert bound.update("write foo-bar\n") == 1.0
    assert bound.unmatched == 0


def test_the_bound_can_be_reached_exactly():
    assert upper_bound(4, 1) >= WordF1()("w x y z extra", "w x y z").f1 == pytest.approx(upper_bound(4, 1))


@given(st.lists(st.floats(0, 1), max_size=4), st.lists(st.floats(0, 1), max_size=4), st.data())
def test_the_bound_on_a_mean_holds_whichever_samples_drop_out(finished, bounds, data):
    reached = [data.draw(st.floats(0, b)) for b in bounds if data.draw(st.booleans())]
    values = finished + reached
    if values:
        assert mean_bound(finished, bounds) >= sum(values) / len(values) - 1e-15


def test_metrics_without_a_bound_say_so():
    assert {name for name in SIMILARITIES if as_similarity(name).bound("x")} == set(BOUNDED)


def test_unicode_punctuation_and_full_width_letters_count_in_the_unicode_variant_only():
    inferred, instruction = "“Ｗrite” a poem…", "write a poem"
    assert as_similarity("word_f1")(inferred, instruction).f1 < 1
    assert as_similarity("word_f1_unicode")(inferred, instruction).f1 == 1.0


def test_character_ngrams_compare_scripts_without_spaces():
    near, far = "写一首关于秋雨的俳句。", "请解释量子力学"
    instruction = "写一首关于秋雨的诗"
    metric = as_similarity("char_ngram_f1")
    assert metric(near, instruction).f1 > 0.6 > metric(far, instruction).f1


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize(
    ("inferred", "instruction", "least"),
    [
        ("写一首关于秋雨的俳句。", "写一首关于秋雨的诗", 0.8),
        ("秋の雨についての俳句を書いてください", "秋の雨について俳句を書いて", 0.8),
        ("เขียนบทกวีเกี่ยวกับฝน", "เขียนกวีเกี่ยวกับฝน", 0.8),
        ("ຂຽນບົດກະວີ", "ຂຽນກະວີ", 0.7),
        ("សរសេរកំណាព្យ", "សរសេរកំណាព្យ។", 1.0),
        ("ကဗျာရေးပါ", "ကဗျာရေးပါ။", 1.0),
        ("把“Hello, world!”翻译成中文。", "请把 Hello world 翻译成中文", 0.9),
    ],
)
def test_near_sentences_of_a_script_without_spaces_are_near(name, inferred, instruction, least):
    """Each was one giant word, so two sentences that differ in a character got 0.0 with status ok."""
    match = as_similarity(name)(inferred, instruction)
    assert match.f1 >= least
    assert match.compared == "characters"


def test_what_is_compared_is_decided_by_the_instruction_alone():
    assert as_similarity("word_f1")("写一首诗", "Write a poem").compared == "words"
    assert as_similarity("word_f1")("Write a poem", "写一首诗").compared == "characters"
    assert as_similarity("word_f1")("시를 써 주세요", "시를 써 줘").compared == "words", "Korean has spaces"
    assert as_similarity("char_ngram_f1")("x", "x").compared == "characters"


def test_characters_count_as_they_come_and_the_words_between_them_once_they_end():
    bound = F1Bound("写诗 haiku")  # R = 3
    assert bound.update("雨") == pytest.approx(upper_bound(3, 1))
    assert bound.update("雨 poem") == pytest.approx(upper_bound(3, 1))
    assert bound.update("雨 poem诗") == pytest.approx(upper_bound(3, 2))


class Counted(str):
    """A text that counts how often it was looked at."""

    looks = 0

    def __getitem__(self, key):
        Counted.looks += 1
        return super().__getitem__(key)


@pytest.mark.parametrize("instruction", ["write a haiku", "写一首诗"])
def test_a_bound_looks_at_each_character_of_a_growing_word_once(instruction):
    """Each update went through the whole unfinished word: quadratic for a model that repeats "########" for ever."""

    def looks(size):
        Counted.looks, bound = 0, F1Bound(instruction)
        for end in range(8, size + 1, 8):
            assert bound.update(Counted("#" * end)) == 1.0
        return Counted.looks

    assert looks(2048) <= 2 * looks(1024) + 1


def test_marking_what_matched_takes_linear_time():
    """Every part looked at all words of the instruction: 3 s for 4,000 words, in a server's event loop."""

    def steps(size):
        text, counted = " ".join(f"word{i}" for i in range(size)), [0]
        sys.setprofile(lambda *_: counted.__setitem__(0, counted[0] + 1))
        try:
            spans = matched_words(text, text)
        finally:
            sys.setprofile(None)
        assert len(spans) == size
        return counted[0]

    assert steps(400) <= 2.1 * steps(200)


def test_rouge_l_keeps_nothing_of_words_that_were_not_inferred():
    """Each word of a long prompt had an integer of as many bits as the prompt has words: a gigabyte for 100,000."""
    instruction = " ".join(f"word{i}" for i in range(20_000))
    tracemalloc.start()
    match = RougeL()("word3 word19999", instruction)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert match.recall == 2 / 20_000
    assert peak < 20_000 * 1_000  # 50 MB before, of which 2 MB are the words themselves


def plain_lcs(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b):
            previous, row[j + 1] = row[j + 1], previous + 1 if x == y else max(row[j], row[j + 1])
    return row[-1]


@given(st.lists(st.sampled_from("wxyz"), max_size=12), st.lists(st.sampled_from("wxyz"), max_size=12))
def test_rouge_l_is_f1_over_the_longest_common_subsequence(a, b):
    match = as_similarity("rouge_l")(" ".join(a), " ".join(b))
    common = plain_lcs(a, b)
    assert match.f1 == pytest.approx(2 * common / (len(a) + len(b)) if common else 0)


def test_rouge_l_sees_word_order():
    assert as_similarity("rouge_l")("haiku one write", "write one haiku").f1 == pytest.approx(1 / 3)


def test_embedding_similarity_takes_any_encoder():
    vectors = {"x": [1.0, 0.0], "y": [1.0, 1.0], "z": [-1.0, 0.0], "": [0.0, 0.0]}
    metric = EmbeddingSimilarity(lambda texts: np.array([vectors[t] for t in texts]))
    assert metric("x", "y").f1 == pytest.approx(0.5**0.5)
    assert metric("x", "z").f1 == metric("", "x").f1 == 0.0
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        EmbeddingSimilarity(lambda texts: [1, 2, 3])("x", "y")


def test_an_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'word_f1'"):
        as_similarity("word-f1")
    with pytest.raises(InputError, match="needs an encoder"):
        as_similarity("embedding")
    with pytest.raises(InputError, match="a name or a Similarity"):
        as_similarity(3)


def test_matched_words_are_spans_of_the_inferred_text_counted_as_a_multiset():
    inferred = "Write, write a  Haiku (about) rain"
    spans = matched_words(inferred, "Write the haiku about fog")
    assert [inferred[start:end] for start, end in spans] == ["Write,", "Haiku", "(about)"]


def test_matched_characters_are_spans_too_and_those_that_touch_are_one():
    inferred = "请写一首诗，Hello 写 World"
    spans = matched_words(inferred, "写一首诗 hello")
    assert [inferred[start:end] for start, end in spans] == ["写一首诗", "Hello"]


def test_missed_words_are_spans_of_the_instruction_and_no_article_is_among_them():
    instruction = "Write the haiku about fog, fog and rain"
    spans = missed_words("Write a Haiku (about) fog", instruction)
    assert [instruction[start:end] for start, end in spans] == ["fog", "and", "rain"]
    instruction = "写一首诗 hello"
    assert [instruction[start:end] for start, end in missed_words("写诗 Hello", instruction)] == ["一首"]


@given(texts, texts)
def test_as_many_words_are_highlighted_as_the_metric_counts(inferred, instruction):
    match = WordF1()(inferred, instruction)
    split = characters if match.compared == "characters" else words
    counted = match.precision * max(1, len(split(inferred)))
    shown = sum(len(split(inferred[a:b])) for a, b in matched_words(inferred, instruction))
    assert shown <= round(counted)
    if match.compared == "words" and all(len(words(part)) <= 1 for part in inferred.split()):
        assert shown == round(counted)


# --- chrF ------------------------------------------------------------------------------------------------------------

PAIRS = [
    ("The cat sat on the mat.", "the  cat sat on a mat"),
    ("a", "ab"),
    ("abcdefg", "xyz"),
    ("Erzähl mir\nvon Köln!", "Erzähl etwas über Köln"),
    ("春风又绿江南岸", "春风绿了江南"),
    ("aaaa aaaa", "aa"),
]


@pytest.mark.parametrize(("inferred", "instruction"), PAIRS)
def test_chrf_is_sacrebleus(inferred, instruction):
    metrics = pytest.importorskip("sacrebleu.metrics")
    theirs = metrics.CHRF(lowercase=True, whitespace=True)
    one, other = (" ".join(text.split()) for text in (inferred, instruction))
    assert ChrF()(inferred, instruction).f1 == pytest.approx(theirs.sentence_score(one, [other]).score / 100)


def test_chrf_of_the_same_text_is_1_and_of_no_text_0():
    assert ChrF()("Hello there", "hello  there") == Match(1.0, 1.0, 1.0, "characters")
    assert ChrF()("", "hello").f1 == ChrF()("", "").f1 == 0


@pytest.mark.parametrize("similarity", [WordF1(), ChrF(), RougeL()], ids=lambda each: each.name)
def test_texts_compared_all_at_once_are_compared_as_each_two_are(similarity):
    texts = [text for pair in PAIRS[:4] for text in pair] + ["", "the cat the cat " * 400]
    expected = [[similarity(one, other).f1 for other in texts] for one in texts]
    assert among(similarity, texts) == pytest.approx(np.array(expected))


def test_texts_with_and_without_spaces_are_compared_by_characters():
    assert among(WordF1(), ["春风又绿江南岸", "春风绿了江南", "no"])[0, 1] == pytest.approx(10 / 13)
