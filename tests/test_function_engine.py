import asyncio
import contextvars
import functools
import threading
from contextlib import aclosing

import pytest

from bon import portal
from bon.engines.base import Generates, Prompt, Rates, Request
from bon.engines.function import FunctionEngine
from bon.errors import InputError, UnavailableError, UserCodeError
from bon.task import as_messages
from bon.types import Sampling
from bon.usercode import is_async

HI = Prompt.of(as_messages("hi"))


async def completions(function, *requests):
    engine = FunctionEngine(function)
    done = [c async for c in engine.generate(requests)]
    await engine.aclose()
    return done


def sample(function, n=3, prompts=(HI,), first=0):
    done = asyncio.run(completions(function, *(Request(prompt, n=n, first_sample=first) for prompt in prompts)))
    return sorted(done, key=lambda c: (c.request_index, c.sample_index))


def test_a_function_engine_samples_and_does_not_rate():
    engine = FunctionEngine(str.upper)
    assert isinstance(engine, Generates)
    assert not isinstance(engine, Rates)


def test_a_function_of_the_prompt_is_called_once_for_each_sample_in_order():
    calls = []

    def generate(prompt):
        calls.append(prompt)
        return f"{prompt} {len(calls)}"

    done = sample(generate)
    assert [c.text for c in done] == ["hi 1", "hi 2", "hi 3"]
    assert all(c.finish_reason == "stop" and c.prompt_tokens == c.completion_tokens == 0 for c in done)


def test_a_function_that_takes_n_is_called_once_for_each_request():
    calls = []

    def generate(prompt, n):
        calls.append((prompt, n))
        return [f"{prompt} {i}" for i in range(n)]

    prompts = [HI, Prompt.of(as_messages("ho"))]
    assert [c.text for c in sample(generate, 2, prompts)] == ["hi 0", "hi 1", "ho 0", "ho 1"]
    assert calls == [("hi", 2), ("ho", 2)]


@pytest.mark.parametrize("function", [lambda prompt: "x", lambda prompt, n: ["x"] * n])
def test_a_later_request_goes_on_with_the_indices_of_an_earlier_one(function):
    assert [c.sample_index for c in sample(function, n=2, first=5)] == [5, 6]


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
    assert max(together) == 4


class AsyncObject:
    async def __call__(self, prompt, suffix=""):
        return prompt + suffix


async def join(prefix, prompt):
    return prefix + prompt


@pytest.mark.parametrize(
    ("function", "found", "text"),
    [
        (AsyncObject(), True, "hi"),
        (AsyncObject().__call__, True, "hi"),
        (functools.partial(join, "oh "), True, "oh hi"),
        (functools.partial(functools.partial(AsyncObject(), suffix="!")), True, "hi!"),
        (lambda prompt: join("oh ", prompt), False, "oh hi"),
        (str.upper, False, "HI"),
        (AsyncObject, False, None),
    ],
)
def test_what_is_async_is_known_and_a_coroutine_that_comes_back_is_awaited(function, found, text):
    assert is_async(function) is found
    if text:
        assert [c.text for c in sample(function, 1)] == [text]


def test_a_sync_function_is_never_called_twice_at_a_time_nor_on_the_event_loop():
    busy = threading.Lock()
    loop_thread = threading.current_thread()
    calls = []

    def generate(prompt):
        assert threading.current_thread() is not loop_thread
        assert busy.acquire(blocking=False)
        calls.append(prompt)
        busy.release()
        return "x"

    async def both():
        engine = FunctionEngine(generate)
        await asyncio.gather(*(anext(engine.generate([Request(HI)])) for _ in range(4)))

    asyncio.run(both())
    assert len(calls) == 4


def test_a_sync_function_leaves_the_default_executor_to_others_and_samples_come_one_by_one():
    """Its calls filled the executor that scoring waits for too: nothing was scored before all was sampled."""
    scored = threading.Event()
    calls = []

    def generate(prompt):
        calls.append(prompt)
        if len(calls) == 64:
            assert scored.wait(60), "the first sample was not scored while the others were made"
        return "x"

    async def score_the_first():
        async with aclosing(FunctionEngine(generate).generate([Request(HI, n=64)])) as samples:
            await anext(samples)
            await asyncio.to_thread(scored.set)
            return [c async for c in samples]

    assert len(asyncio.run(score_the_first())) == 63


def test_leaving_early_makes_no_more_calls():
    gate, calls = threading.Event(), []

    def generate(prompt):
        calls.append(prompt)
        if len(calls) == 2:
            gate.wait(60)
        return "x"

    async def first():
        engine = FunctionEngine(generate)
        async with aclosing(engine.generate([Request(HI, n=64)])) as samples:
            await anext(samples)
        gate.set()
        return [c async for c in engine.generate([Request(HI)])]  # comes after all that was asked for before

    assert len(asyncio.run(first())) == 1
    assert len(calls) <= 3


def test_leaving_early_cancels_async_calls_and_waits_for_their_clean_up():
    cleaned = []

    async def generate(prompt):
        if len(cleaned) == 0 and not started.is_set():
            started.set()
            return "x"
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(prompt)

    started = asyncio.Event()

    async def first():
        async with aclosing(FunctionEngine(generate).generate([Request(HI, n=3)])) as samples:
            return (await anext(samples)).text

    assert asyncio.run(first()) == "x"
    assert cleaned == ["hi", "hi"]


def test_a_sync_function_sees_the_callers_context():
    user = contextvars.ContextVar("user", default="nobody")

    async def ask():
        user.set("Anna")
        return await completions(lambda prompt: user.get(), Request(HI))

    assert [c.text for c in asyncio.run(ask())] == ["Anna"]


def test_a_sync_function_may_call_back_into_bon():
    async def inner():
        return "x"

    assert [c.text for c in portal.run(completions(lambda prompt: portal.run(inner()), Request(HI, n=2)))] == ["x", "x"]


def test_a_conversation_reaches_the_function_as_role_and_content():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    seen = []
    sample(lambda prompt: seen.append(prompt) or "x", 1, [Prompt.of(as_messages(messages))])
    assert seen == [messages]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_failing_call_of_eight_loses_one_sample(asynchronous):
    """It lost the prompt with all eight."""
    calls = []

    def generate(prompt):
        calls.append(prompt)
        if len(calls) == 3:
            raise ValueError("no third")
        return "x"

    async def generate_async(prompt):
        return generate(prompt)

    function = generate_async if asynchronous else generate
    done = sample(function, 8)
    assert [c.finish_reason for c in done] == ["stop"] * 2 + ["error"] + ["stop"] * 5
    assert str(done[2].error) == f"the function {function.__name__!r} raised ValueError: no third"
    assert isinstance(done[2].error, UserCodeError)
    assert isinstance(done[2].error.__cause__, ValueError)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda prompt: 1 / 0, "'<lambda>' raised ZeroDivisionError: division by zero"),
        (lambda prompt: next(iter([])), "'<lambda>' raised StopIteration: "),
        (lambda: "x", "raised TypeError"),
        (lambda prompt: ["a"], "must return one text, but returned ['a']"),
        (lambda prompt: (yield "a"), "must return one text, but returned <generator object"),
        (lambda prompt: None, "must return one text, but returned None"),
        (lambda prompt: b"a", "must return one text, but returned b'a'"),
        (lambda prompt, n: 1 / 0, "raised ZeroDivisionError"),
        (lambda prompt, n: ["a"] * (n + 1), "must return a list of 3 texts, but returned 4 (prompt: 'hi')."),
        (lambda prompt, n: "abc", "must return a list of 3 texts, but returned 'abc'"),
        (lambda prompt, n: (t for t in "abc"), "must return a list of 3 texts, but returned <generator object"),
        (lambda prompt, n: ["a", 5, "c"], "must return a list of 3 texts, but returned 5 as sample 1 (prompt: 'hi')."),
    ],
)
def test_a_function_that_fails_is_named_in_the_error_of_each_sample(function, complaint):
    done = sample(function)
    assert [c.sample_index for c in done] == [0, 1, 2]
    for completion in done:
        assert isinstance(completion.error, UserCodeError)
        assert complaint in str(completion.error)


def test_an_error_of_bon_that_a_function_raises_stays_what_it_is():
    def generate(prompt):
        raise UnavailableError("the server is busy")

    assert [type(c.error) for c in sample(generate, 1)] == [UnavailableError]


def test_sampling_options_of_some_engine_are_refused_by_the_call_itself():
    with pytest.raises(InputError, match="takes no sampling options: min_p"):
        FunctionEngine(str.upper).generate([Request(HI, Sampling(extra={"min_p": 0.1}))])
