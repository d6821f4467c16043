import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import bon
from bon.errors import InputError, UnknownNameError
from bon.task import Message, Task, as_messages
from bon.types import Candidate, Sampling, Saved, Score, Usage


def test_a_string_prompt_is_one_user_message():
    assert as_messages("Hello") == (Message("user", "Hello"),)


def test_openai_style_dicts_become_messages():
    messages = as_messages(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}]
    )
    assert [m.role for m in messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ([], "non-empty list"),
        (7, "non-empty list"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"role": "user"}], r"messages\[0\].content must be text"),
        ([{"role": "usr", "content": "x"}], "Did you mean 'user'"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\]: only text and image_url"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "image_url can be honoured, not 'input_audio'"),
        ([{"role": "user", "content": "x", "colour": 1}], r"messages\[0\].colour: there is no such"),
        ([{"role": "assistant", "content": "x"}], "no user message"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "not from 'system'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}], "is empty: leave it out"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
            "calls tools, whose results are missing",
        ),
        ([{"role": "user", "content": "x", "audio": {"id": "a"}}], r"messages\[0\].audio: there is no such"),
        ([{"role": "system", "content": "x"}, {"role": "tool", "content": "x"}], "no user message"),
        ([{"role": "user", "content": " "}, {"role": "tool", "content": "x"}], "last user message has no text"),
        (
            [{"role": "assistant", "content": None}, {"role": "user", "content": "x"}],
            r"messages\[0\].content must be text or a list of text parts, not None",
        ),
        (
            [{"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}],
            "belongs to .* role 'assistant'",
        ),
        ([{"role": "user", "content": "x", "tool_call_id": "1"}], "belongs to .* role 'tool'"),
        (
            [{"role": "assistant", "tool_calls": ["f"]}, {"role": "user", "content": "x"}],
            r"tool_calls\[0\] must be an object",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "tool", "content": "x", "tool_call_id": 7}],
            "text, not 7",
        ),
    ],
)
def test_a_bad_prompt_is_refused_with_its_reason(prompt, complaint):
    with pytest.raises(InputError, match=complaint):
        as_messages(prompt)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", True),
        ("min_p", 2),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("seed", -2),
        ("top_k", -2),
        ("logprobs", 5),
    ],
)
def test_a_sampling_option_out_of_range_is_refused_by_name(option, value):
    with pytest.raises(InputError, match=option):
        Sampling.of({option: value})


def test_minus_one_means_at_random_all_and_no_limit_as_elsewhere():
    sampling = Sampling.of({"seed": -1, "top_k": -1, "max_tokens": -1})
    assert sampling == Sampling(seed=None, top_k=0, max_tokens=2**31 - 1)
    assert Sampling(seed=7).replace(seed=-1).seed is None


HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "Is it warm "}, {"type": "text", "text": "in Rome?"}]},
    {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "annotations": [{"type": "url_citation", "url_citation": {"url": "http://x", "title": "x"}}],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning_content": "Rome is in Italy.",
        "provider_specific_fields": {"citations": None},
    },
    {"role": "user", "content": "How do you know?"},
    {"role": "assistant", "content": None, "refusal": "I may not say."},
    {"role": "user", "content": "Say it."},
    {"role": "assistant", "content": None, "reasoning_content": "It thought until it was cut off."},
    {"role": "user", "content": "Well?", "name": "Ann"},
]


def test_a_history_is_read_as_servers_and_clients_write_it():
    """Files and Python refused what the server took, and all of them what other servers add."""
    said = ["Is it warm in Rome?", "Yes.", "How do you know?", "I may not say.", "Say it.", "", "Well?"]
    assert [message.content for message in as_messages(HISTORY)] == said


def test_a_last_message_of_the_assistant_is_what_the_answer_begins_with_and_no_context():
    task = Task.of([{"role": "user", "content": "Write to Anna"}, {"role": "assistant", "content": "Dear "}])
    assert (task.instruction, task.prefill, task.context) == ("Write to Anna", "Dear ", "")
    assert Task.of("Write to Anna").prefill == ""


def test_a_typo_in_a_sampling_option_is_never_ignored():
    with pytest.raises(UnknownNameError, match="Did you mean 'temperature'"):
        Sampling.of({"temprature": 1.0})


def test_one_stop_string_may_be_given_bare():
    assert Sampling.of({"stop": "END"}).stop == ("END",)


def test_the_last_user_message_is_the_instruction_and_the_history_its_context():
    task = Task.of(
        [
            {"role": "system", "content": "You are a poet."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Write a haiku"},
        ]
    )
    assert task.instruction == "Write a haiku"
    assert task.context == "System: You are a poet.\nUser: Hi\nAssistant: Hello"


def test_calls_of_tools_and_their_results_are_context_and_not_the_instruction():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{ "city": "Rome" }'}}
    turns = [
        {"role": "user", "content": "Is it warm in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "21 degrees", "tool_call_id": "c1"},
    ]
    task = Task.of(turns)
    assert task.instruction == "Is it warm in Rome?"
    assert task.context == 'Assistant: [{"arguments":{"city":"Rome"},"name":"weather"}]\nTool: 21 degrees'
    assert [message.to_dict() for message in task.messages] == turns
    assert Task.of(turns, "in Rome").context.startswith("Is it warm\n?\nAssistant: [")


def test_a_named_instruction_leaves_the_rest_of_the_prompt_as_context():
    task = Task.of("Here is a text.\n\nSummarise it.\n\nThanks.", "Summarise it.")
    assert task.instruction == "Summarise it."
    assert task.context == "Here is a text.\nThanks."


@pytest.mark.parametrize(
    ("instruction", "complaint"), [("  ", "empty"), ("Translate", "part of the last user message")]
)
def test_an_instruction_that_is_not_in_the_prompt_is_refused(instruction, complaint):
    with pytest.raises(InputError, match=complaint):
        Task.of("Summarise it.", instruction)


def test_another_instruction_of_a_task_keeps_what_else_the_task_has():
    """``run(task, instruction=...)`` ignored the instruction."""
    task = replace(Task.of("Here is a text.\nSummarise it."), reference="short", metadata={"row": 7})
    named = Task.of(task, "Summarise it.")
    assert (named.instruction, named.context) == ("Summarise it.", "Here is a text.")
    assert (named.reference, named.metadata) == ("short", {"row": 7})
    assert Task.of(task) is task
    with pytest.raises(InputError, match="part of the last user message"):
        Task.of(task, "Translate it.")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0.5, "pruend"), "Did you mean 'pruned'"),
        ((0.0, "failed"), "'failed' has no reward, got 0.0"),
        (("0.5",), "must be a number or None, got '0.5'"),
        (([1.0],), "must be a number or None"),
    ],
)
def test_a_score_that_contradicts_itself_is_refused(arguments, complaint):
    with pytest.raises(InputError, match=complaint):
        Score(*arguments)


def test_the_details_of_a_score_are_a_dataclass():
    """A dict there was found out when a whole file of results was written."""
    with pytest.raises(InputError, match="not dict"):
        Score(0.5, details={"verdict": "good"})


def test_a_reward_of_another_library_is_a_float():
    assert type(Score(np.float32(0.5)).reward) is float
    assert type(Score(True).reward) is float


def test_usage_adds_up_and_leaves_out_what_was_cached():
    usage = Usage(10, 20, 30, 40, 5) + Usage(1, 2, 3, 4, 0)
    assert usage == Usage(11, 22, 33, 44, 5)
    assert usage.total_tokens == 105


def test_what_was_saved_is_counted_and_only_the_tokens_that_never_were_are_estimated():
    def cost(tokens, drafted=0):
        return {"usage": Usage(scorer_completion_tokens=tokens, drafted_tokens=drafted)}

    candidates = [Candidate(i, "text") for i in range(5)] + [Candidate(5, "te", "abort")]
    scores = [
        Score(1.0, candidate=0, **cost(10)),
        Score(0.5, candidate=1, **cost(20, 16)),
        Score(None, "pruned", candidate=2, upper_bound=0.4, **cost(6)),
        Score(None, "pruned", candidate=3, upper_bound=0.4, **cost(40)),
        Score(1.0, candidate=4, same_as=0, **cost(10)),
        Score(None, "pruned", candidate=5),
    ]
    saved = Saved.of(candidates, scores)
    assert (saved.unsampled, saved.pruned, saved.copies) == (1, 2, 1)
    assert (saved.decoded, saved.drafted, saved.spent_pruned) == (60, 16, 46)
    assert saved.estimate == (15 - 6) + 0 + 10 + 15, "the pruned, the longer pruned, the copy, the unsampled"
    assert saved.share == (34 + 16) / 110
    assert (saved + saved).share == saved.share
    assert Saved.of(candidates[:2], scores[:2]) == Saved(decoded=14, drafted=16)
    assert Saved().share == 0


def test_the_text_of_a_candidate_is_text():
    with pytest.raises(InputError, match="candidate 3 must be text, not int"):
        Candidate(3, 4)


def test_sampling_says_what_differs_from_the_defaults():
    sampling = Sampling(temperature=0.5, stop=("a",))
    assert sampling.to_dict() == {"temperature": 0.5, "stop": ("a",)}
    assert Sampling.of(sampling.to_dict()) == sampling


def test_every_public_name_can_be_imported():
    for name in bon.__all__:
        assert getattr(bon, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'BestOfM'"):
        bon.BestOfM  # noqa: B018


def test_importing_bon_imports_neither_torch_nor_transformers():
    heavy = "('torch', 'transformers', 'vllm')"
    code = f"import sys, bon, bon.types, bon.best_of_n; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
