"""Prompt styles: what a scorer's model is shown, in which pieces, and which template files are refused."""

import json

import pytest

from bon.errors import InputError, UnknownNameError
from bon.prompts import from_files, load_style
from bon.task import Message, Task
from bon.types import Tokens

TASK = Task.of("Write a haiku.")
FOLLOW_UP = Task.of([Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Write a haiku.")])


def write(tmp_path, user, system=None):
    (tmp_path / "user.prompt").write_text(user, encoding="utf-8")
    if system is not None:
        (tmp_path / "system.prompt").write_text(system, encoding="utf-8")
    return from_files(None if system is None else tmp_path / "system.prompt", tmp_path / "user.prompt")


def test_direct_without_context_is_exactly_the_text_the_embedded_model_was_trained_on():
    system, user = load_style("direct").prompt(TASK, "Rain falls.").turns
    assert system.role == "system"
    assert system.text == (
        "Infer the instruction that produced the response you are given. Reply with the instruction only."
    )
    assert user.pieces == ("Response:\n", "Rain falls.")


def test_context_comes_before_the_response_as_a_piece_of_its_own():
    user = load_style("direct").prompt(FOLLOW_UP, "Rain falls.").turns[-1]
    assert user.pieces == (
        "Conversation before the response:\nUser: Hi\nAssistant: Hello!\n\n",
        "Response:\n",
        "Rain falls.",
    )


def test_json_asks_for_reasoning_first_and_then_the_instruction():
    style = load_style("json")
    system, user = style.prompt(TASK, "Rain falls.").turns
    assert style.output == "json"
    assert system.text.index('"reasoning"') < system.text.index('"instruction"')
    assert '{"reasoning": ' in system.text
    assert "{{" not in system.text + user.text
    assert user.pieces[:2] == ("Response:\n", "Rain falls.")
    assert user.text.endswith('"instruction": "<the instruction>"}')


@pytest.mark.parametrize("name", ["direct", "json"])
def test_the_instruction_itself_is_never_shown(name):
    task = Task.of("zebra crossing " * 3)
    assert "zebra" not in "".join(turn.text for turn in load_style(name).prompt(task, "text").turns)


def test_token_ids_of_the_response_are_passed_on():
    tokens = Tokens("Rain", (1, 2), "vocabulary")
    assert load_style("direct").prompt(TASK, tokens).turns[-1].pieces[-1] is tokens


def test_braces_in_a_response_are_plain_text():
    assert load_style("direct").prompt(TASK, "{context} {{x}} {0}").turns[-1].text == "Response:\n{context} {{x}} {0}"


def test_template_variables_travel_with_the_prompt():
    prompt = load_style("direct").prompt(TASK, "text", {"enable_thinking": False})
    assert prompt.template == {"enable_thinking": False}


def test_files_in_the_papers_format_are_read_with_str_format_semantics(tmp_path):
    style = write(tmp_path, '[Response]\n{response}\n\nJSON: {{"X": "<y>"}}\n', 'Reply as {{"X": "<y>"}}\n')
    system, user = style.prompt(FOLLOW_UP, "Rain").turns
    assert system.text == 'Reply as {"X": "<y>"}'
    assert user.pieces == ("[Response]\n", "Rain", '\n\nJSON: {"X": "<y>"}')
    assert style.output == "json"
    assert not style.shows_context


def test_a_user_template_gets_the_bare_context(tmp_path):
    style = write(tmp_path, "[History]\n{context}\n[Answer]\n{response}")
    assert style.prompt(FOLLOW_UP, "Rain").turns[0].text == "[History]\nUser: Hi\nAssistant: Hello!\n[Answer]\nRain"
    assert style.prompt(TASK, "Rain").turns[0].text == "[History]\n\n[Answer]\nRain"
    assert style.output == "text"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("No field", r"has no \{response\}"),
        ("{response} {reponse}", r"unknown field '\{reponse\}'"),
        ("{response} {}", r"unknown field '\{\}'"),
        ("{response} {0}", r"unknown field '\{0\}'"),
        ("{response!r}", r"unknown field '\{response!r\}'"),
        ("{response:>9}", r"unknown field '\{response:>9\}'"),
        ("{response} {", "malformed brace"),
        ("{response} }", "malformed brace"),
        ('{response} {"X": "y"}', "unknown field"),
    ],
)
def test_a_broken_template_is_refused_with_its_file_and_the_problem(tmp_path, template, problem):
    with pytest.raises(InputError, match=problem) as error:
        write(tmp_path, template)
    assert "user.prompt" in str(error.value)


def test_a_field_in_the_system_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"system\.prompt has an unknown field"):
        write(tmp_path, "{response}", "{response}")


def test_a_missing_or_non_utf8_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read: No such file"):
        from_files(None, tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes("Antwort: {response} für".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8"):
        from_files(None, tmp_path / "latin.txt")


def test_unknown_styles_and_outputs_are_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'direct'"):
        load_style("dirct")
    with pytest.raises(UnknownNameError, match="Did you mean 'json'"):
        from_files(None, tmp_path / "x", output="jsn")


def test_a_folder_with_templates_is_a_style_by_its_name(tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "user.txt").write_text("Answer: {response}", encoding="utf-8")
    for given in (str(own), own):
        style = load_style(given)
        assert (style.name, style.system, style.output) == ("mine", "", "text")
    (own / "system.txt").write_text("Reply in JSON.", encoding="utf-8")
    assert load_style(own).output == "json"


def test_what_is_no_style_is_refused():
    with pytest.raises(InputError, match="a style is a name, a folder or a Style, not 3"):
        load_style(3)


def test_examples_are_turns_before_the_response_and_the_same_for_all_candidates(tmp_path):
    """Shown as text in one message, a small model repeats the response; as turns, it answers with a request."""
    (tmp_path / "system.txt").write_text("Guess.")
    (tmp_path / "user.txt").write_text("Reply: {response}")
    rows = [{"response": "Paris.", "instruction": "Capital of France?"}, {"response": "4", "instruction": "2 + 2?"}]
    (tmp_path / "examples.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    style = load_style(tmp_path)
    one, two = (style.prompt(Task.of("x"), text).turns for text in ("a", "b"))
    assert [(turn.role, "".join(turn.pieces)) for turn in one] == [
        ("system", "Guess."),
        ("user", "Reply: Paris."),
        ("assistant", "Capital of France?"),
        ("user", "Reply: 4"),
        ("assistant", "2 + 2?"),
        ("user", "Reply: a"),
    ]
    assert one[:-1] == two[:-1], "what they share is computed once"
    assert load_style("turns").examples


@pytest.mark.parametrize(
    "line", ["{}", "[]", "nope", '{"response": "a", "instruction": 1}', '{"response": " ", "instruction": "b"}']
)
def test_an_example_that_is_none_is_named_with_its_line(tmp_path, line):
    (tmp_path / "user.txt").write_text("{response}")
    (tmp_path / "examples.jsonl").write_text('{"response": "a", "instruction": "b"}\n' + line)
    with pytest.raises(InputError, match=r"examples\.jsonl, line 2"):
        load_style(tmp_path)
