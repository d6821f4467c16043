"""Pairs, one by one, from rows as they are, from prompts that a policy answers, and from a model alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from bon import portal
from bon.best_of_n import BestOfN
from bon.data.rows import Row, run_rows
from bon.errors import BonError, InputError
from bon.pairs.alike import Seen
from bon.pairs.collect import Collection
from bon.pairs.sources import Pair, Reading, users_turns, winner

BATCH = 32
"""Users' turns that are sampled together, at one temperature."""
_DRY = 10
"""Batches in a row without a new pair after which a model is given up."""

Fail = Callable[[int, BonError], None]
"""Told of a row that cannot be done."""


def from_rows(rows: Iterable[Row], reading: Reading, collection: Collection, fail: Fail) -> Iterator[Pair]:
    """The pairs that rows hold."""
    for row in rows:
        try:
            pairs = reading.pairs(row)
        except InputError as error:
            fail(row.line, error)
            continue
        collection.refused["no answer is good enough"] += not pairs
        for pair in pairs:  # the next one where the best one may not go in
            if not collection.full(pair.instruction):
                yield pair


def from_prompts(
    bon: BestOfN, rows: Iterable[Row], reading: Reading, collection: Collection, fail: Fail
) -> Iterator[Pair]:
    """The best answers that a policy gives to prompts; those that could become no pair are not asked."""

    def asked() -> Iterator[Row]:
        for row in rows:
            try:
                reading.licence_of(row)
            except InputError as error:
                fail(row.line, error)
                continue
            if reason := collection.refuses(collection.filters.stripped(row.task.instruction)):
                collection.refused[reason] += 1
            else:
                yield row

    with closing(portal.iterate(run_rows(bon, asked()))) as outcomes:
        for row, outcome in outcomes:
            if isinstance(outcome, BonError):
                fail(row.line, outcome)
            elif answer := winner(outcome):
                text, reward, worse = answer
                yield reading.pair(row, text, bon.policy.name, reward, worse)
            else:
                collection.refused["no answer is good enough"] += 1


def from_model(
    bon: BestOfN, temperatures: Sequence[float], reading: Reading, collection: Collection, count: int, fail: Fail
) -> Iterator[Pair]:
    """What a model writes in the user's place and then answers, until the collection has enough pairs.

    A batch of users' turns is sampled at each temperature in turn, and answered to its end. A run that goes on from
    another one of the same seed begins with the batch of its last pair, and comes to the same pairs.

    Args:
        bon: what writes, and answers; its sampling has a seed.
        temperatures: of users' turns.
        reading, collection, fail: as for the others.
        count: pairs wanted at least.

    Raises:
        BonError: the model cannot write a user's turn, or fails.
        InputError: it writes nothing new any more.
    """
    dry = 0
    for batch in itertools.count(max(0, collection.last(reading.source)) // BATCH):
        if collection.count >= count:
            return
        if dry == _DRY:
            raise InputError(
                f"{bon.policy.name!r} wrote {_DRY * BATCH} users' turns in a row of which none became a pair. Take "
                "another --seed, more --turn-temperature, or looser filters."
            )
        sampling = replace(bon.sampling, temperature=temperatures[batch % len(temperatures)])
        turns = portal.run(users_turns(bon.policy, sampling, batch * BATCH, BATCH))
        before, rows, asked = collection.count, list[Row](), Seen()
        for at, text in turns:
            text = collection.filters.stripped(text)
            reason = collection.refuses(text)
            if reason is None and asked.find(text) is not None:
                reason = "the instruction is there already, or nearly the same one"
            if reason is None:
                asked.add(text)
                rows.append(reading.row(at, {"prompt": text}))
            else:
                collection.refused[reason] += 1
        yield from from_prompts(bon, rows, reading, collection, fail)
        dry = dry + 1 if collection.count == before else 0
