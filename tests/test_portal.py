"""The sync door: one loop on a thread of its own, seen from blocking code, from other loops, and after a fork."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from bon import portal
from bon.errors import InputError


async def numbers(closed: list[str], upto: int = 3) -> AsyncGenerator[int, None]:
    try:
        for number in range(upto):
            await asyncio.sleep(0.001)
            yield number
        if upto == 2:
            raise ValueError("two is not enough")
    finally:
        await asyncio.sleep(0.001)
        closed.append(threading.current_thread().name)


async def collect(closed: list[str], upto: int = 3) -> list[int]:
    return [n async for n in portal.across(numbers(closed, upto))]


async def where() -> str:
    return threading.current_thread().name


def test_items_come_from_the_portal_in_order() -> None:
    closed: list[str] = []
    assert asyncio.run(collect(closed)) == [0, 1, 2]
    assert portal.run(collect(closed)) == [0, 1, 2]
    assert list(portal.iterate(numbers(closed))) == [0, 1, 2]
    assert closed == ["bon"] * 3


def test_an_error_arrives_where_the_items_do() -> None:
    closed: list[str] = []
    with pytest.raises(ValueError, match="two is not enough"):
        asyncio.run(collect(closed, 2))
    with pytest.raises(ValueError, match="two is not enough"):
        list(portal.iterate(numbers(closed, 2)))
    assert closed == ["bon"] * 2


def test_leaving_waits_until_the_source_has_cleaned_up() -> None:
    closed: list[str] = []

    async def leave() -> int:
        async with aclosing(portal.across(numbers(closed, 1000))) as items:
            async for item in items:
                return item
        raise AssertionError("nothing came")

    assert asyncio.run(leave()) == 0
    assert closed == ["bon"]
    for _ in portal.iterate(numbers(closed, 1000)):
        break
    assert closed == ["bon"] * 2


def test_an_error_of_the_clean_up_is_not_lost() -> None:
    async def source() -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            raise ValueError("no way to clean up")

    items = portal.iterate(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no way to clean up"):
        items.close()  # type: ignore[attr-defined]


def test_cancelling_the_consumer_closes_the_source() -> None:
    closed: list[str] = []

    async def cancel() -> None:
        task = asyncio.create_task(collect(closed, 10_000))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert closed == ["bon"]


def test_cancelling_who_waits_for_a_coroutine_waits_for_its_clean_up() -> None:
    story: list[str] = []
    started = threading.Event()

    async def work() -> None:
        try:
            started.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            story.append("cleaned up")

    async def cancel() -> None:
        task = asyncio.create_task(portal.there(work()))
        await asyncio.to_thread(started.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert story == ["cleaned up"]

    asyncio.run(cancel())


def test_a_coroutine_runs_on_the_portal_from_anywhere() -> None:
    async def ask() -> str:
        return await portal.there(where())

    assert asyncio.run(ask()) == portal.run(ask()) == "bon"


@pytest.mark.parametrize("way", ["iterate", "across"])
def test_one_task_makes_all_the_steps_of_a_generator(way: str) -> None:
    """A task group in a generator hung or raised when its steps were tasks of their own: its task was gone."""

    async def source() -> AsyncGenerator[int, None]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asyncio.sleep(0.001, i)) for i in range(3)]
            for task in tasks:
                yield await task
            group.create_task(failing())
            await asyncio.sleep(60)

    async def failing() -> None:
        raise ValueError("one of the group failed")

    async def over() -> list[int]:
        return [item async for item in portal.across(source())]

    with pytest.raises(ExceptionGroup) as caught:
        list(portal.iterate(source())) if way == "iterate" else asyncio.run(over())
    assert str(caught.value.exceptions[0]) == "one of the group failed"


def test_a_task_that_exits_ends_its_caller_and_not_the_loop() -> None:
    async def leave() -> None:
        sys.exit(3)

    with pytest.raises(SystemExit):
        portal.run(leave())
    assert portal.run(where()) == "bon"


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs behind a prompt
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


async def interrupted(story: list[str], *, hangs: bool = False) -> None:
    """Work during which somebody presses Ctrl-C."""
    try:
        press_ctrl_c()
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        story.append("cancelled")
        if hangs:
            press_ctrl_c()
            await asyncio.sleep(60)
        await asyncio.sleep(0.01)
        story.append("cleaned up")
        raise


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_cancels_and_waits_for_the_clean_up() -> None:
    story: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        portal.run(interrupted(story))
    assert story == ["cancelled", "cleaned up"]


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_does_not_wait() -> None:
    story: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        portal.run(interrupted(story, hangs=True))
    assert story == ["cancelled"]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("hangs", [False, True])
def test_ctrl_c_while_the_next_item_is_awaited_closes_the_generator(hangs: bool) -> None:
    """It gave "RuntimeError: aclose(): asynchronous generator is already running" in place of KeyboardInterrupt."""
    story: list[str] = []

    async def source() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await interrupted(story, hangs=hangs)
        finally:
            story.append("closed")

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(portal.iterate(source()))
    assert story == (["cancelled"] if hangs else ["cancelled", "cleaned up", "closed"])


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_the_body_of_the_loop_closes_the_generator() -> None:
    closed: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        any(press_ctrl_c() for _ in portal.iterate(numbers(closed, 10_000)))
    assert closed == ["bon"]


@pytest.mark.usefixtures("interruptible")
def test_a_generator_that_takes_the_cancellation_for_itself_is_closed_all_the_same() -> None:
    closed: list[str] = []

    async def source() -> AsyncGenerator[int, None]:
        try:
            press_ctrl_c()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                yield 1
            yield 2
        finally:
            closed.append("closed")

    with pytest.raises(KeyboardInterrupt):
        list(portal.iterate(source()))
    assert closed == ["closed"]


# --- from inside ------------------------------------------------------------------------------------------------------


def test_a_blocking_call_on_the_portals_own_thread_is_refused() -> None:
    """An async reward function that called another ``BestOfN`` without ``await`` stopped everything for ever."""

    async def reward() -> str:
        return portal.run(where())

    async def rewards() -> list[int]:
        return list(portal.iterate(numbers([])))

    for call in (reward, rewards):
        with pytest.raises(InputError, match=r"write 'await bon\.run\(prompt\)'"):
            portal.run(call())


def test_a_blocking_call_from_a_thread_that_the_portal_waits_for_works() -> None:
    async def outer() -> str:
        return await asyncio.to_thread(lambda: portal.run(where()))

    assert portal.run(outer()) == "bon"


def test_an_iterator_that_is_dropped_on_the_portals_own_thread_does_not_stop_it() -> None:
    """The garbage collector runs on any thread, and closing an iterator waits for the loop."""
    closed = threading.Event()

    async def source() -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            closed.set()

    items = portal.iterate(source())
    assert next(items) == 1

    async def drop() -> None:
        items.close()  # type: ignore[attr-defined]
        await asyncio.to_thread(closed.wait)

    portal.run(drop())


# --- fork -------------------------------------------------------------------------------------------------------------

FORK = """
import asyncio, os, sys
from bon import portal

async def numbers():
    for i in range(3):
        await asyncio.sleep(0.001)
        yield i

async def answer():
    return 42

items = portal.iterate(numbers())
assert next(items) == 0
if (child := os.fork()) == 0:
    items.close()  # the parent's: there is nobody here to wait for
    code = 0 if portal.run(answer()) == 42 and list(portal.iterate(numbers())) == [0, 1, 2] else 1
    os._exit(code)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert list(items) == [1, 2]
assert portal.run(answer()) == 42
"""


def test_calls_work_after_a_fork_in_the_child_and_in_the_parent() -> None:
    """The child had the parent's loop and no thread that ran it: every call hung."""
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run([sys.executable, "-c", FORK], cwd=root, timeout=60, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


ENDS = """
import asyncio
from bon import portal

async def count():
    for number in range(3):
        yield number
        await asyncio.sleep(0)

def use():
    return [1 / number for _, number in zip("ab", portal.iterate(count()))]

use()
"""


def test_a_script_that_fails_while_it_iterates_ends() -> None:
    """Python drops the last traceback, and the iterator in it, when the loop's thread is gone: it waited for ever."""
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run([sys.executable, "-c", ENDS], cwd=root, timeout=60, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ZeroDivisionError" in ran.stderr


# --- what blocks ------------------------------------------------------------------------------------------------------


async def pulled(items) -> list[object]:
    return [item async for item in portal.pull(items)]


def test_a_blocking_iterable_is_read_item_by_item_when_asked_and_off_the_loop() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for number in range(5):
            assert threading.current_thread().name == "bon-read"
            read.append(number)
            yield number

    async def some() -> list[int]:
        taken = []
        async with aclosing(portal.pull(source())) as items:
            async for item in items:
                taken.append(item)
                if len(taken) == 2:
                    break
        return taken

    assert asyncio.run(some()) == [0, 1] == read
    assert asyncio.run(pulled([7, None])) == [7, None]


def test_leaving_does_not_wait_for_an_item_that_is_still_to_come() -> None:
    gate = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        gate.wait(60)

    async def leave() -> None:
        async with aclosing(portal.pull(source())) as items:
            assert await anext(items) == 1
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(items), 0.01)

    asyncio.run(leave())
    assert not gate.is_set()
    gate.set()


def test_errors_of_a_blocking_iterable_arrive() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("the file is broken")

    with pytest.raises(ValueError, match="the file is broken"):
        asyncio.run(pulled(source()))
    with pytest.raises(TypeError, match="not iterable"):
        asyncio.run(pulled(3))
