"""Work that lives on the background loop, seen from other loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from bon import portal


async def numbers(closed: list[str], upto: int = 3) -> AsyncIterator[int]:
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


def test_items_come_from_the_background_loop_in_order() -> None:
    closed: list[str] = []
    assert asyncio.run(collect(closed)) == [0, 1, 2]
    assert portal.run(collect(closed)) == [0, 1, 2]
    assert closed == ["bon", "bon"]


def test_an_error_arrives_where_the_items_do() -> None:
    closed: list[str] = []
    with pytest.raises(ValueError, match="two is not enough"):
        asyncio.run(collect(closed, 2))
    assert closed == ["bon"]


def test_leaving_waits_until_the_source_has_cleaned_up() -> None:
    closed: list[str] = []

    async def leave() -> int:
        async with aclosing(portal.across(numbers(closed, 1000))) as items:  # type: ignore[type-var]
            async for item in items:
                return item
        raise AssertionError("nothing came")

    assert asyncio.run(leave()) == 0
    assert closed == ["bon"]


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


def test_a_coroutine_runs_on_the_background_loop_from_anywhere() -> None:
    async def where() -> str:
        return threading.current_thread().name

    async def ask() -> str:
        return await portal.there(where())

    assert asyncio.run(ask()) == portal.run(ask()) == "bon"
