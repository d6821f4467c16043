"""DSPy's own modules with bon's rewards and its concurrent BestOfN, on scripted models and on a real bon serve."""

import threading

import pytest

from bon import BestOfN as Bon
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError
from bon.scorers.base import Scorer
from bon.types import Score

pytestmark = [pytest.mark.dspy, pytest.mark.filterwarnings("ignore")]  # their warnings are theirs
dspy = pytest.importorskip("dspy", reason="pip install 'bon[dspy]'")

from dspy.utils import DummyLM  # noqa: E402

from bon.integrations.dspy import BestOfN, reward  # noqa: E402

PLANTS = "Write a reminder for Anna to water the plants on Monday."
GOOD, BAD = "Hello Anna, this is a reminder to water the plants on Monday.", "Dear Tom, thank you."


class Numbered(dspy.Module):
    """Answers with the number of its attempt, which is its language model's rollout id."""

    def __init__(self, before=lambda i: None):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")
        self.before = before

    def forward(self, question):
        i = self.get_lm().kwargs["rollout_id"]
        self.before(i)
        if dspy.settings.trace is not None:
            dspy.settings.trace.append((self, {"question": question}, i))
        return dspy.Prediction(answer=str(i))


def by(*rewards):
    """A reward by the number of the attempt; an exception is raised."""

    def rate(args, pred):
        found = rewards[int(pred.answer)]
        if isinstance(found, Exception):
            raise found
        return found

    return rate


@pytest.fixture(autouse=True)
def lm():
    with dspy.context(lm=DummyLM([{"answer": "x"}] * 100), trace=[]) as context:
        yield context


@pytest.mark.parametrize(
    "rewards",
    [
        (0.1, 0.9, 0.5, 0.9),
        (0.1, 0.8, 1.0, 1.0),
        (1.0, 0.0, 0.0, 0.0),
        (-2, -1, -3, -5),
        (0.1, ValueError("no"), 0.3, 0.2),
    ],
)
def test_it_returns_what_dspys_own_returns_and_leaves_the_same_trace(rewards):
    given = {"module": Numbered(), "N": 4, "reward_fn": by(*rewards), "threshold": 1.0}
    found = []
    for kind in (dspy.BestOfN, BestOfN):
        with dspy.context(trace=[]):
            found.append((kind(**given)(question="q").answer, [step[2] for step in dspy.settings.trace]))
    assert found[0] == found[1]
    assert len(found[1][1]) == 1


def test_all_attempts_run_at_the_same_time():
    together = threading.Barrier(6)
    module = Numbered(before=lambda i: together.wait(timeout=30))
    best = BestOfN(module=module, N=6, reward_fn=by(0, 1, 2, 3, 4, 5), threshold=9)
    assert best(question="q").answer == "5"


def test_dspys_number_of_threads_bounds_what_runs_together():
    running, most, lock = 0, [], threading.Lock()

    def counted(i):
        nonlocal running
        with lock:
            running += 1
            most.append(running)
        done.wait(0.01)
        with lock:
            running -= 1

    done = threading.Event()
    with dspy.context(num_threads=2):
        BestOfN(module=Numbered(before=counted), N=8, reward_fn=by(*range(8)), threshold=99)(question="q")
    assert max(most) <= 2
    assert len(most) == 8


def test_what_is_good_enough_ends_it_and_the_attempts_behind_it_do_not_begin():
    begun = []
    with dspy.context(num_threads=1):
        best = BestOfN(module=Numbered(before=begun.append), N=50, reward_fn=by(0.2, 1.0, *[0.3] * 48), threshold=1.0)
        assert best(question="q").answer == "1"
    assert begun == [0, 1]


def test_one_object_serves_many_threads_and_many_calls_and_counts_failures_anew():
    best = BestOfN(module=Numbered(), N=3, reward_fn=by(ValueError("bad"), 0.5, 0.7), threshold=1.0, fail_count=1)
    before = dict(vars(best))
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(best(question="q").answer)) for _ in range(8)]
    lm = dspy.settings.lm
    dspy.configure(lm=lm)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers + [best(question="q").answer for _ in range(4)] == ["2"] * 12
    assert vars(best) == before


@pytest.mark.parametrize(("fail_count", "raises"), [(None, False), (2, False), (1, True), (0, True)])
def test_more_failures_than_may_be_raise_the_error(fail_count, raises):
    rewards = by(ValueError("first"), ValueError("second"), 0.5)
    best = BestOfN(module=Numbered(), N=3, reward_fn=rewards, threshold=1.0, fail_count=fail_count)
    if raises:
        with pytest.raises(ValueError, match="first" if fail_count == 0 else "second"):
            best(question="q")
    else:
        assert best(question="q").answer == "2"


def test_where_every_attempt_failed_there_is_an_error_and_not_nothing():
    best = BestOfN(module=Numbered(), N=2, reward_fn=by(ValueError("a"), ValueError("b")), threshold=1.0)
    with pytest.raises(ValueError, match="b"):
        best(question="q")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"module": "question -> answer"},
            "module must be one of DSPy's, such as dspy.Predict('question -> answer'), not",
        ),
        ({"N": 0}, "N must be a whole number of at least 1, got 0"),
        ({"threshold": "high"}, "threshold must be a number, got 'high'"),
        ({"fail_count": -1}, "fail_count must be a whole number of at least 0, got -1"),
        ({"reward_fn": 0.5}, "reward_fn must be a function of (inputs, prediction), not 0.5"),
        ({"reward_fn": lambda args, pred: "good", "fail_count": 0}, "must be a number, got 'good'"),
        ({"reward_fn": lambda args, pred: None, "fail_count": 0}, "must be a number, got None"),
        ({"reward_fn": lambda args, pred: float("nan"), "fail_count": 0}, "the reward must be a number, got nan"),
    ],
)
def test_an_argument_that_cannot_be_is_a_sentence(change, said):
    given = {"module": Numbered(), "N": 2, "reward_fn": by(0, 1), "threshold": 1.0, **change}
    with pytest.raises(InputError) as refused:
        BestOfN(**given)(question="q")
    assert said in str(refused.value)


def test_without_a_language_model_it_says_so():
    with dspy.context(lm=None), pytest.raises(InputError, match="there is no language model"):
        BestOfN(module=dspy.Predict("question -> answer"), N=2, reward_fn=by(0, 1), threshold=1.0)(question="q")


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_a_scorer_rewards_the_last_output_by_the_only_input():
    rate = reward("flip:mini")
    good = rate({"question": PLANTS}, dspy.Prediction(reasoning=BAD, answer=GOOD))
    assert (good, rate({"question": PLANTS}, dspy.Prediction(answer=BAD)) < 0.5) == (1.0, True)
    named = reward("flip:mini", prompt="question", response="answer")
    assert named({"question": PLANTS, "context": "none"}, dspy.Prediction(answer=GOOD, more=BAD)) == 1.0


class Seen(Scorer):
    """Rewards an answer with its length and notes what was asked."""

    name = "seen"

    def __init__(self):
        self.asked = []

    async def score(self, pending):
        for position, each in enumerate(pending):
            self.asked.append(each.task.instruction)
            yield position, Score(float(len(each.candidate.text)))


def test_several_inputs_are_asked_under_their_names():
    rate = reward(seen := Seen())
    assert rate({"context": "Rain.", "question": "Why?"}, dspy.Prediction(answer="wet")) == 3.0
    assert seen.asked == ["context: Rain.\nquestion: Why?"]


@pytest.mark.parametrize(
    ("options", "args", "fields", "said"),
    [
        ({"prompt": "ask"}, {"question": "q"}, {"answer": "a"}, "called without the input 'ask' (prompt=). It got: 'q"),
        ({}, {}, {"answer": "a"}, "called without inputs"),
        ({"response": "text"}, {"question": "q"}, {"answer": "a"}, "no output 'text' (response=). It has: 'answer'"),
        ({}, {"question": "q"}, {}, "the prediction has no outputs"),
        ({}, {"question": "q"}, {"answer": " "}, "an answer has no reward: no text. The attempt has failed."),
        ({}, {"question": "q"}, {"answer": None}, "an answer has no reward: no text"),
    ],
)
def test_what_a_reward_cannot_rate_is_a_sentence(options, args, fields, said):
    with pytest.raises(InputError) as refused:
        reward("flip:mini", **options)(args, dspy.Prediction(**fields))
    assert said in str(refused.value)


def test_dspy_on_a_real_bon_serve_is_rewarded_by_a_scorer():
    from serving import served

    answers = iter([BAD, BAD, GOOD, BAD])
    engine = ScriptedEngine(lambda text, draw: f"[[ ## answer ## ]]\n{next(answers)}\n\n[[ ## completed ## ]]")
    with served(Bon(engine, "first", n=1), model_names=("m",)) as site:
        lm = dspy.LM("openai/m", api_base=f"{site.url}/v1", api_key="none", cache=False)
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
            module = dspy.Predict("question -> answer")
            best = BestOfN(module=module, N=4, reward_fn=reward("flip:mini"), threshold=2.0)
            assert best(question=PLANTS).answer == GOOD
    assert engine.calls == 4
