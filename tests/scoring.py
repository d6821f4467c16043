"""Candidates that are scored by themselves, through the pipeline and without a policy."""

import asyncio

from bon.group import Group
from bon.pipeline import Pipeline
from bon.scorers.base import Scorer
from bon.task import Task
from bon.types import Candidate, Score


def group_of(task, texts, **options):
    """A group with these candidates; ``options`` are those of ``Group``."""
    group = Group(Task.of(task), **options)
    group.ask(len(texts))
    for index, text in enumerate(texts):
        group.admit(text if isinstance(text, Candidate) else Candidate(index, text), sampled=False)
    return group


def scored(scorer, *groups):
    """The groups, scored in one call; the first one's error is raised."""
    asyncio.run(Pipeline(scorer).run(groups))
    for group in groups:
        if group.error is not None:
            raise group.error
    return groups


def scores_of(scorer, task, *texts, **options):
    """One score for each text."""
    [group] = scored(scorer, group_of(task, texts, **options))
    return list(group.scores)


class Own(Scorer):
    """A scorer of one's own: ``reward(pending)`` is a number, a ``Score``, or raises."""

    concurrent = True

    def __init__(self, reward, *, concurrent=True):
        self.reward, self.concurrent = reward, concurrent
        self.calls = []

    async def score(self, pending):
        self.calls.append([each.candidate.text for each in pending])
        for position, each in enumerate(pending):
            found = self.reward(each)
            yield position, found if isinstance(found, Score) else Score(found)
