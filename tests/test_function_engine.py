import asyncio
import threading

import pytest

from bon.engines.base import Engine, Prompt
from bon.engines.function import FunctionEngine
from bon.errors import InputError, UserCodeError
from bon.task import as_messages
from bon.types import Sampling

HI = Prompt.of(as_messages("hi"))


def sample(function, n=3, prompts=(HI,)):
    async def collect():
        return [c async for c in FunctionEngine(function).generate(prompts, Sampling(), n)]

    return sorted(asyncio.run(collect()), key=lambda c: (c.prompt_index, c.sample_index))


def test_a_function_engine_is_an_engine():
    assert isinstance(FunctionEngine(str.upper), Engine)


def test_a_function_of_the_prompt_is_called_once_for_each_sample():
    calls = []

    def generate(prompt):
        calls.append(prompt)
        return f"{prompt} {len(calls)}"

    assert [c.text for c in sample(generate)] == ["hi 1", "hi 2", "hi 3"]


def test_a_function_that_takes_n_is_called_once_for_each_prompt():
    calls = []

    def generate(prompt, n):
        calls.append((prompt, n))
        return [f"{prompt} {i}" for i in range(n)]

    prompts = [HI, Prompt.of(as_messages("ho"))]
    assert [c.text for c in sample(generate, 2, prompts)] == ["hi 0", "hi 1", "ho 0", "ho 1"]
    assert sorted(calls) == [("hi", 2), ("ho", 2)]


def test_a_second_parameter_with_a_default_is_not_taken_for_n():
    assert [c.text for c in sample(lambda prompt, temperature=0.5: f"{prompt} {temperature}", 1)] == ["hi 0.5"]


def test_async_functions_run_at_the_same_time():
    together = []
    running = 0

    async def generate(prompt):
        nonlocal running
        running += 1
        await asyncio.sleep(0.01)
        together.append(running)
        running -= 1
        return "x"

    sample(generate, 4)
    assert max(together) >= 3


def test_a_sync_function_is_never_called_twice_at_a_time_nor_on_the_event_loop():
    busy = threading.Lock()
    loop_thread = threading.current_thread()

    def generate(prompt):
        assert threading.current_thread() is not loop_thread
        assert busy.acquire(blocking=False)
        busy.release()
        return "x"

    assert len(sample(generate, 4)) == 4


def test_a_conversation_reaches_the_function_as_role_and_content():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    seen = []
    sample(lambda prompt: seen.append(prompt) or "x", 1, [Prompt.of(as_messages(messages))])
    assert seen == [messages]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda prompt: 1 / 0, "'<lambda>' raised ZeroDivisionError: division by zero"),
        (lambda prompt: ["a"], "must return 3 texts, but returned 1"),
        (lambda prompt, n: ["a"] * (n + 1), "must return 3 texts, but returned 4"),
        (lambda prompt, n: "abc", "must return 3 texts, but returned 'abc'"),
        (lambda prompt: None, "must return 3 texts, but returned None"),
        (lambda prompt, n: ["a", 5, "c"], "must return texts, but returned 5"),
    ],
)
def test_a_function_that_fails_is_named_in_the_error(function, complaint):
    with pytest.raises(UserCodeError, match=complaint):
        sample(function)


def test_a_function_cannot_rate():
    with pytest.raises(InputError, match="gives no probabilities"):
        asyncio.run(FunctionEngine(str.upper).loglikelihood([HI], ["x"]))


def test_fewer_than_one_sample_is_refused():
    with pytest.raises(InputError, match="at least 1, got 0"):
        sample(str.upper, 0)
