"""The score store: nothing is scored twice, and nothing that was scored is lost."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from scoring import Own, group_of, scored, scores_of

from bon.errors import InputError, RefusedError, UnavailableError
from bon.evals.store import VERSION, Store, fingerprint, stored
from bon.models import ModelPool
from bon.scorers.base import Needs, Scorer
from bon.scorers.flip import Flip
from bon.spec import SCORERS
from bon.task import Task
from bon.types import Score, Usage

TASK = Task.of("Write a slogan for a bakery called Sunrise.")
TEXTS = ["Sunrise: warm bread for every morning.", "Red, green and blue.", "Good bread, good day!"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.db"


@pytest.fixture
def store(path):
    with Store(path) as store:
        yield store


class Group(Own):
    """A scorer of whole groups."""

    needs = Needs(group=True, all_rewards=True)


def length(pending):
    return float(len(pending.candidate.text))


def rewards(scorer, *texts, task=TASK):
    return [score.reward for score in scores_of(scorer, task, *texts, whole=scorer.needs.group)]


def test_what_was_scored_is_not_scored_again_not_even_after_the_store_was_closed(path):
    own = Own(length)
    with Store(path) as store:
        first = rewards(stored(own, store, "own"), *TEXTS)
    with Store(path) as store:
        again = stored(own, store, "own")
        assert rewards(again, *TEXTS) == first == [len(text) for text in TEXTS]
        assert own.calls == [TEXTS]
        assert again.seconds > 0, "what it took is remembered"


def test_only_what_is_missing_is_scored(store):
    own = Own(length)
    rewards(stored(own, store, "own"), TEXTS[1])
    assert rewards(stored(own, store, "own"), *TEXTS) == [len(text) for text in TEXTS]
    assert own.calls == [[TEXTS[1]], [TEXTS[0], TEXTS[2]]]


def test_another_spec_task_reference_or_column_has_scores_of_its_own(store):
    own = Own(length)
    for spec, task in (
        ("own", TASK),
        ("own:style=json", TASK),
        ("own", Task.of("Name three colours.")),
        ("own", Task.of(TASK.messages, "Write a slogan")),
        ("own", replace(TASK, reference="bread")),
        ("own", replace(TASK, metadata={"difficulty": 3})),
    ):
        rewards(stored(own, store, spec), TEXTS[0], task=task)
    assert len(own.calls) == 6
    rewards(stored(own, store, "own"), TEXTS[0])
    assert len(own.calls) == 6


def test_a_group_scorer_gets_the_whole_group_when_a_candidate_of_it_is_new(store):
    own = Group(lambda each: float(len(each.group.candidates)))
    assert rewards(stored(own, store, "own"), *TEXTS[:2]) == [2, 2]
    assert rewards(stored(own, store, "own"), *TEXTS) == [3, 3, 3], "the group is another one"
    assert rewards(stored(own, store, "own"), *TEXTS) == [3, 3, 3]
    assert own.calls == [TEXTS[:2], TEXTS]


def test_a_torn_group_is_scored_again_as_a_whole(store):
    passing = UnavailableError("it is overloaded")
    own = Group(lambda each: Score(None, "failed", "busy", error=passing) if each.candidate.index == 1 else 1.0)
    rewards(stored(own, store, "own"), *TEXTS)
    own.reward = lambda each: 2.0
    assert rewards(stored(own, store, "own"), *TEXTS) == [2, 2, 2]


def test_what_decided_between_equal_rewards_is_in_the_store_too(store):
    class Settles(Own):
        settled = 0

        async def settle(self, tied):
            for position, each in enumerate(tied):
                self.settled += 1
                yield position, Score(length(each))

    own = Settles(lambda pending: 1.0)
    for _ in range(2):
        scores = scores_of(stored(own, store, "own"), TASK, *TEXTS)
        assert [score.tie_break for score in scores] == [len(text) for text in TEXTS]
    assert own.settled == len(TEXTS)


def test_copies_in_a_group_keep_their_own_scores(store):
    own = Group(lambda each: float(each.candidate.index))
    for _ in range(2):
        assert rewards(stored(own, store, "own"), "same", "same") == [0, 1]
    assert len(own.calls) == 1


@pytest.mark.parametrize("error", [UnavailableError("it is overloaded"), RefusedError("wrong key")])
def test_a_failure_that_says_nothing_about_the_candidate_is_tried_again(store, error):
    failing = Own(lambda each: Score(None, "failed", "not scored", error=error) if each.candidate.index else 1.0)
    rewards(stored(failing, store, "own"), *TEXTS)
    well = Own(length)
    assert rewards(stored(well, store, "own"), *TEXTS) == [1.0, len(TEXTS[1]), len(TEXTS[2])]
    assert well.calls == [TEXTS[1:]]


def test_pruned_and_late_scores_are_tried_again_and_failed_ones_are_kept(store):
    statuses = ("pruned", "late", "failed")
    rewards(stored(Own(lambda each: Score(None, statuses[each.candidate.index], "why")), store, "own"), *TEXTS)
    own = Own(length)
    assert rewards(stored(own, store, "own"), *TEXTS) == [len(TEXTS[0]), len(TEXTS[1]), None]
    assert own.calls == [TEXTS[:2]]


@dataclass(frozen=True)
class Details:
    verdict: str
    votes: tuple[int, ...] = ()


def test_a_score_comes_back_with_everything_that_a_reader_of_json_gets(store):
    full = Score(
        0.1 + 0.2,
        "repaired",
        "a bracket was missing",
        "yes \ud800 \u202e no",
        parts={"style": 0.5, "none": None},
        details=Details("good", (1, 2)),
        tie_break=float("-inf"),
        usage=Usage(scorer_prompt_tokens=7, scorer_completion_tokens=5, cached_tokens=3, drafted_tokens=2),
    )
    own = Own(lambda each: full)
    [first], [again] = (scores_of(stored(own, store, "own"), TASK, TEXTS[0]) for _ in range(2))
    assert len(own.calls) == 1
    keys = ("started", "finished")
    one, other = ({k: v for k, v in s.to_dict().items() if k not in keys} for s in (first, again))
    assert json.dumps(one) == json.dumps(other)
    assert again.details.verdict == "good"
    assert again.usage == full.usage


class Counting:
    """An engine that counts what it is asked for."""

    def __init__(self, engine):
        self._engine, self.requests = engine, 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def generate(self, requests, *, keep=None):
        self.requests += len(requests)
        return self._engine.generate(requests, keep=keep)


@pytest.mark.parametrize("options", [{}, {"samples": 2, "style": "json", "sampling": {"seed": 1, "max_tokens": 24}}])
def test_a_second_evaluation_with_flip_calls_no_engine(path, options):
    pool = ModelPool()
    engine = Counting(pool.engine())
    scorer = Flip(engine, **options)
    spec = SCORERS.spec_of(Flip("mini", **options))
    try:
        with Store(path) as store:
            first = scores_of(stored(scorer, store, spec), TASK, *TEXTS)
        assert engine.requests == 3
        with Store(path) as store:
            again = scores_of(stored(scorer, store, spec), TASK, *TEXTS)
        assert engine.requests == 3
    finally:
        asyncio.run(pool.aclose())
    ran = ("started", "finished")
    one, other = ([{k: v for k, v in s.to_dict().items() if k not in ran} for s in each] for each in (first, again))
    assert json.dumps(one) == json.dumps(other)
    assert "inferred" in one[0], "the details are there"


def test_it_is_the_scorer_that_it_stands_for(store):
    flip = Flip("mini")
    kept = stored(flip, store, "flip:mini")
    assert isinstance(kept, Scorer)
    assert (kept.name, kept.range, kept.models, kept.needs) == (flip.name, flip.range, flip.models, flip.needs)
    pool = ModelPool()
    ready = pool.scorer(kept)
    assert ready.models == ()
    assert [*ready.engines] == [pool.engine("mini")], "the pipeline asks for it"
    assert ready.concurrent == pool.engine("mini").concurrent
    assert not stored(Own(length), store, "own").engines
    asyncio.run(pool.aclose())


def test_a_model_whose_files_change_is_another_model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"1234")
    os.utime(weights, (1, 1))
    before = fingerprint(str(folder))
    (folder / "notes.txt").write_text("nothing to do with it")
    assert fingerprint(str(folder)) == before
    os.utime(weights, (2, 2))
    later = fingerprint(str(folder))
    weights.write_bytes(b"12345")
    os.utime(weights, (2, 2))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert len({before, later, fingerprint(str(folder))}) == 3
    assert fingerprint(str(weights)).startswith(str(weights))


def test_a_model_of_the_hub_is_known_by_its_revision(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("someone/small") == f"someone/small {commit}"
    assert fingerprint("http://localhost:8000/v1") == "http://localhost:8000/v1", "nothing more is known"


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from scoring import Own, group_of, scored
from bon.evals.store import Store, stored
def reward(each):
    if each.candidate.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0 + each.candidate.index
scored(stored(Own(reward), Store({path!r}), "own"), group_of("Say something.", ["a", "b", "c", "d"]))
"""


def test_a_killed_evaluation_goes_on_where_it_was(path):
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    died = subprocess.run([sys.executable, "-c", script], check=False)
    assert died.returncode == -signal.SIGKILL
    own = Own(lambda each: 9.0)
    with Store(path) as store:
        assert rewards(stored(own, store, "own"), "a", "b", "c", "d", task="Say something.") == [1, 2, 9, 9]


WRITING = """
import sys
sys.path.insert(0, {tests!r})
from scoring import Own, group_of, scored
from bon.evals.store import Store, stored
who = sys.argv[1]
sys.stdin.readline()
with Store({path!r}) as store:
    for row in range(50):
        scorer = stored(Own(lambda each: 1.0), store, "own")
        scored(scorer, group_of(f"Task {{row}} of {{who}}.", ["a", "b"]), group_of(f"Task {{row}}.", ["a", "b"]))
"""


def test_several_processes_may_make_a_store_and_write_it_at_the_same_time(path):
    script = WRITING.format(tests=str(Path(__file__).parent), path=str(path))
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen([*command, str(who)], stdin=subprocess.PIPE) for who in range(3)]
    for each in running:
        each.stdin.write(b"go\n")
        each.stdin.close()
    assert [each.wait() for each in running] == [0, 0, 0]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM scores").fetchone() == (2 * 50 * 4,)
    connection.close()


def refused(path, match):
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    with pytest.raises(InputError, match=match) as raised:
        Store(path)
    assert {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} == before, "untouched"
    assert "\n" not in str(raised.value)


def test_a_store_of_another_version_is_refused_and_stays_as_it_is(path):
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    refused(path, f"has version {VERSION + 1}, and this bon writes version {VERSION}")


def test_a_database_of_something_else_is_refused_and_stays_as_it_is(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    connection.close()
    refused(path, "is a database of something else")


@pytest.mark.parametrize("content", [b"hello", b'{"messages": []}\n' * 1000])
def test_a_file_that_is_no_database_is_refused_and_stays_as_it_is(path, content):
    path.write_bytes(content)
    refused(path, "no score store; name another file")


def test_an_empty_file_becomes_a_store(path):
    path.touch()
    with Store(path) as store:
        assert rewards(stored(Own(length), store, "own"), "abc") == [3.0]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder '.*/results' for the score store"):
        Store(tmp_path / "results" / "scores.db")
    with pytest.raises(InputError, match="cannot be opened"):
        Store(tmp_path)


def test_a_read_only_place_is_refused_before_anything_is_scored():
    with pytest.raises(InputError, match=r"'/proc/scores\.db' cannot be opened: unable to open"):
        Store("/proc/scores.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write what is read-only")
def test_a_read_only_store_is_refused_before_anything_is_scored(path):
    Store(path).close()
    path.chmod(0o444)
    refused(path, "cannot be opened: .*readonly")


def test_a_store_that_was_closed_says_so_in_one_sentence(store):
    kept = stored(Own(length), store, "own")
    store.close()
    with pytest.raises(InputError, match="cannot be read: Cannot operate on a closed database"):
        scored(kept, group_of(TASK, TEXTS))
