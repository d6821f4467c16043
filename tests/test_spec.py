"""Specs: what is written is read back, unknown names and options are refused, objects only where they are allowed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon import BackwardLikelihood, BestOfN, Fixed, Flip, Sampling, Softmax, StopAt, TopK, WeightedVote
from bon.engines.scripted import ScriptedEngine
from bon.errors import BonError, InputError, MissingExtraError, UnknownNameError, UserCodeError
from bon.models import Model, as_scorer
from bon.scorers.base import Scorer
from bon.selectors import Best, as_selector
from bon.spec import (
    BUDGETS,
    DATASETS,
    ENGINES,
    SCORERS,
    SELECTORS,
    Registry,
    Specified,
    import_object,
    join_spec,
    names_object,
    split_spec,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tricky = st.sampled_from(
    [
        "",
        " ",
        "a,b=1",
        '"',
        '",b=1',
        "[a",
        "[0-9]+",
        "{",
        "1",
        "true",
        "null",
        "NaN",
        "1e999",
        "a=b",
        "x=(\\d+)",
        "\\",
        ",",
    ]
)
word = text | tricky | st.lists(tricky, max_size=4).map("".join)
number = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
value = st.recursive(
    st.none() | st.booleans() | number | word,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
)
name = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
head = st.sampled_from(["flip", "top-k:3", "Qwen/Qwen3-4B", "qwen:latest", "http://h:8000/v1", "flip:qwen:latest"])


# --- the grammar ------------------------------------------------------------------------------------------------------


@given(head, st.dictionaries(name, value, max_size=4))
def test_what_is_joined_is_split_into_the_same(begin, options):
    assert split_spec(join_spec(begin, options)) == (begin, options)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("best", ("best", {})),
        ("top-k:3", ("top-k:3", {})),
        ("flip:style=json", ("flip", {"style": "json"})),
        ("flip:Qwen/Qwen3-0.6B,style=json,samples=4", ("flip:Qwen/Qwen3-0.6B", {"style": "json", "samples": 4})),
        ("flip:x, style=json , samples= 4", ("flip:x", {"style": "json", "samples": 4})),
        ("http://a/v1,http://b/v1,model=x", ("http://a/v1,http://b/v1", {"model": "x"})),
        ("qwen:latest,device=cpu", ("qwen:latest", {"device": "cpu"})),
        ("x,a=0.5,b=true,c=null,d=text,e=", ("x", {"a": 0.5, "b": True, "c": None, "d": "text", "e": ""})),
        ('x,a=["b,c=1",2],d={"e":1,"f":[1,2]}', ("x", {"a": ["b,c=1", 2], "d": {"e": 1, "f": [1, 2]}})),
        ('x,a="true",b="p, q=1"', ("x", {"a": "true", "b": "p, q=1"})),
        ("x,a=[not json,b=1", ("x", {"a": "[not json", "b": 1})),
        ('vote:"answer=(\\\\d+), b=1",x=2', ('vote:"answer=(\\\\d+), b=1"', {"x": 2})),
        ("vote:[0-9]{1,3}", ("vote:[0-9]{1,3}", {})),
        (" best ", ("best", {})),
    ],
)
def test_a_spec_divides_at_commas_before_names(spec, parts):
    assert split_spec(spec) == parts


def test_an_option_that_is_given_twice_is_refused():
    with pytest.raises(InputError, match="samples is given twice"):
        split_spec("flip,samples=2,samples=3")


@pytest.mark.parametrize("odd", [object(), math.inf, math.nan, [object()]])
def test_what_has_no_text_is_refused_and_named(odd):
    with pytest.raises(InputError, match=r"similarity=.* cannot be written as text"):
        join_spec("flip", {"similarity": odd})


# --- objects and back -------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6))
def test_top_k_is_its_spec(k):
    for made in (TopK(k), TopK(k=k)):
        assert SELECTORS.make(SELECTORS.spec_of(made)) == made


@given(st.floats(0, 1e9), st.none() | st.integers(0, 2**63), st.booleans())
def test_softmax_is_its_spec(temperature, seed, by_position):
    made = Softmax(temperature, seed) if by_position else Softmax(temperature, seed=seed)
    assert SELECTORS.make(SELECTORS.spec_of(made)) == made


@given(
    word.map(lambda t: "".join(c for c in t if c not in "\\()[]{}*+?|^$."))
    | tricky.filter(lambda t: t not in "[{(\\[a")
)
def test_a_vote_is_its_spec(pattern):
    made = WeightedVote(pattern)
    assert SELECTORS.make(SELECTORS.spec_of(made)) == made


@pytest.mark.parametrize(
    "pattern", [r"answer=(\d+)", r"[0-9]{1,3}", r'"(\w+)"', r"a,b=(\w)", r"x|y, z=1", "3", "", "=", r"\boxed\{"]
)
def test_a_regular_expression_comes_back_as_it_was(pattern):
    made = WeightedVote(pattern)
    assert SELECTORS.make(SELECTORS.spec_of(made)) == made


@given(st.integers(1, 99), st.floats(-1e9, 1e9), st.integers(1, 99), st.booleans())
def test_budgets_are_their_specs(n, reward, most, by_position):
    """What was passed by position behind the first argument was left out: ``StopAt(0.9, 16)`` came back with 8."""
    for made in (Fixed(n), StopAt(reward, most) if by_position else StopAt(reward, most=most), StopAt(reward=reward)):
        assert BUDGETS.make(BUDGETS.spec_of(made)) == made


models = st.none() | st.sampled_from(
    ["mini", "Qwen/Qwen3-0.6B", "qwen:latest", "http://h:8000/v1,model=x", "a b", "Q/q,dtype=bfloat16,engine=torch"]
)


@given(
    models,
    st.fixed_dictionaries(
        {},
        optional={
            "style": st.sampled_from(["direct", "json"]),
            "parser": st.sampled_from(["robust", "reference"]),
            "similarity": st.sampled_from(["word_f1", "rouge_l"]),
            "samples": st.integers(1, 9),
            "sampling": st.sampled_from([None, {"temperature": 0.5}, Sampling(stop=("a,b=1",), max_tokens=9)]),
            "tie_break": st.sampled_from(["logprob", "likelihood", "none"]),
            "retries": st.integers(0, 3),
            "thinking": st.booleans(),
            "draft": st.booleans(),
            "device": st.sampled_from(["cpu", "cuda"]),
        },
    ),
)
def test_flip_is_its_spec(model, options):
    if model and "dtype" in model:
        options.pop("device", None)
    made = Flip(model, **options)
    again = SCORERS.make(SCORERS.spec_of(made))
    compared = ("samples", "retries", "style", "parser", "similarity", "tie_break", "template", "model", "range")
    assert [getattr(again, field) for field in compared] == [getattr(made, field) for field in compared]
    if not isinstance(options.get("sampling"), Sampling):
        assert again.sampling == made.sampling
    assert SCORERS.spec_of(again) == SCORERS.spec_of(made)


def test_a_scorer_that_was_moved_to_an_engine_still_has_its_spec():
    flip = Flip("mini", samples=2)
    assert SCORERS.spec_of(flip.on(ScriptedEngine())) == "flip:mini,samples=2"
    assert SCORERS.spec_of(BackwardLikelihood(model="mini")) == "likelihood:mini"
    assert SCORERS.spec_of(Flip(Model.of("http://h/v1,model=x"))) == 'flip:"http://h/v1,model=x"'
    assert SCORERS.spec_of(Flip()) == "flip"
    assert SELECTORS.spec_of(Best()) == "best"


def test_an_object_of_ones_own_has_no_spec_and_is_named():
    class Mine(Scorer):
        def score(self, pending):
            raise NotImplementedError

    for registry, made in ((SCORERS, Mine()), (SELECTORS, print), (SCORERS, Flip(ScriptedEngine()))):
        with pytest.raises(InputError, match=r"has no spec|cannot be written as text"):
            registry.spec_of(made)
    with pytest.raises(InputError, match=r"extract|its argument"):
        SELECTORS.spec_of(WeightedVote(lambda text: text))


# --- names and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registry", "spec", "complaint"),
    [
        (SELECTORS, "bets", "unknown selector 'bets'. Did you mean 'best'"),
        (SELECTORS, "softmx:0.5", "Did you mean 'softmax'"),
        (SELECTORS, "softmax:0.5,sed=1", "Did you mean 'seed'"),
        (SELECTORS, "best:3", "selector 'best' cannot be made"),
        (SELECTORS, "top-k", "It is written top-k:K"),
        (SELECTORS, "top-k:three", "k must be a whole number"),
        (SELECTORS, "top-k:3,k=4", "k= is what stands behind top-k: already"),
        (SELECTORS, "vote:(", "not a regular expression"),
        (SCORERS, "flipp", "Did you mean 'flip'"),
        (SCORERS, "flip:mini,stile=json", "Did you mean 'style'"),
        (SCORERS, "flip:mini,style=jsn", "Did you mean 'json'"),
        (SCORERS, "likelihood:mini,stile=direct", "Did you mean 'style'"),
        (SCORERS, "flip:http://h/v1,model=x", 'flip:"MODEL,model=VALUE"'),
        (BUDGETS, "stop-at:0.5,moss=3", "Did you mean 'most'"),
        (BUDGETS, "fixd:3", "Did you mean 'fixed'"),
        (DATASETS, "mimi", "Did you mean 'mini'"),
        (ENGINES, "tortch", "Did you mean 'torch'"),
        (ENGINES, "scripted:max_model=5", "Did you mean 'max_model_len'"),
        (ENGINES, "torch", "It is written torch:MODEL"),
        (ENGINES, "torch:mini,devise=cpu", "Did you mean 'device'"),
    ],
)
def test_a_typo_is_refused_with_what_was_meant(registry, spec, complaint):
    with pytest.raises(InputError, match=complaint.replace("(", r"\(")):
        registry.make(spec)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"policy": "mini,devise=cpu"}, "Did you mean 'device'"),
        ({"policy": "mini,engine=torhc"}, "Did you mean 'torch'"),
        ({"policy": "scripted,max_model=5"}, "Did you mean 'max_model_len'"),
        ({"policy": "http://127.0.0.1:9/v1,modle=x"}, "Did you mean 'model'"),
        ({"policy": "mini,engine=scripted"}, "runs no model"),
        ({"policy": "scripted", "scorer": "flip:mini,devise=cpu"}, "Did you mean 'device'"),
        ({"policy": "scripted", "scorer": "flip:scripted,stile=json"}, "Did you mean 'style'"),
        ({"policy": "scripted", "scorer": "fliip"}, "Did you mean 'flip'"),
        ({"policy": "scripted", "n": "stop-att:1"}, "Did you mean 'stop-at'"),
        ({"policy": "scripted", "selector": "tok-k:3"}, "Did you mean 'top-k'"),
        ({"policy": "scripted", "selector": "votee:answer"}, "Did you mean 'vote'"),
    ],
)
def test_the_same_holds_for_everything_that_a_best_of_n_is_given(options, complaint):
    with pytest.raises(BonError, match=complaint):
        BestOfN(**options)


def test_defaults_hold_where_the_spec_says_nothing_and_the_class_has_them():
    assert SELECTORS.make("softmax:0.5", {"seed": 3}) == Softmax(0.5, seed=3)
    assert SELECTORS.make("softmax:0.5,seed=4", {"seed": 3}) == Softmax(0.5, seed=4)
    assert SELECTORS.make("best", {"seed": 3}) == Best()


def test_a_class_without_a_constructor_takes_no_options():
    """They were swallowed: a typo in an option of somebody's scorer was never seen."""

    class Plain(Specified):
        pass

    assert Plain()
    with pytest.raises(TypeError, match="takes no arguments"):
        Plain(samples=3)


# --- objects of one's own ---------------------------------------------------------------------------------------------


def test_objects_are_imported_only_where_they_are_allowed():
    """A request must never be able to import a module by its name."""
    for registry in (SELECTORS, SCORERS, BUDGETS, ENGINES, DATASETS):
        with pytest.raises(UnknownNameError):
            registry.make("json:dumps")
    with pytest.raises(UnknownNameError, match="module:object"):
        SELECTORS.make("jsn", objects=True)
    assert as_selector("json:dumps").__name__ == "dumps"


@pytest.mark.parametrize("model", ["qwen:latest", "http://h:80/v1", "a/b:c", "json:"])
def test_a_name_with_a_colon_is_a_models_name_where_no_module_has_it(model):
    assert not names_object(model)
    assert Model.of(model).name == model
    assert as_scorer(model).model == Model.of(model)


@pytest.mark.parametrize("model", ["llama3:8b", "qwen2.5:0.5b"])
def test_a_name_of_ollamas_is_one_for_an_engine_that_is_named_and_else_gets_advice(model):
    assert not names_object(model)
    assert Model.of(model, engine="scripted").name == model
    with pytest.raises(InputError, match="Ollama"):
        as_scorer(model)


def test_modules_of_the_current_folder_are_found_after_all_others(tmp_path, monkeypatch):
    """The folder was put first, so ``--scorer statistics:mean`` beside a file torch.py executed that file."""
    (tmp_path / "statistics.py").write_text("raise SystemExit('executed')")
    (tmp_path / "torch.py").write_text("raise SystemExit('executed')")
    (tmp_path / "own_rewards.py").write_text("def reward(prompt, responses): return [1.0 for _ in responses]")
    monkeypatch.chdir(tmp_path)
    assert import_object("statistics:mean")([1, 3]) == 2
    assert as_scorer("own_rewards:reward").name == "own_rewards:reward"
    assert names_object("own_rewards:reward")


@pytest.mark.parametrize(
    ("source", "spec", "complaint"),
    [
        ("x = 1 / 0", "broken_one:x", "ZeroDivisionError"),
        ("import nowhere_to_be_found", "broken_two:x", "no module 'nowhere_to_be_found'"),
        ("y = 1", "broken_three:x", "has no 'x'"),
        ("x = 1", "broken_four:x", "no scorer and no function, but int"),
        ("class x:\n def __init__(self): raise ValueError('no')", "broken_five:x", "raised ValueError: no"),
    ],
)
def test_what_cannot_be_imported_says_why(tmp_path, monkeypatch, source, spec, complaint):
    (tmp_path / f"{spec.partition(':')[0]}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserCodeError, match=complaint):
        as_scorer(spec)


# --- other packages ---------------------------------------------------------------------------------------------------

THEIRS = """
from bon.scorers.base import Scorer
from bon.types import Score

class Length(Scorer):
    def __init__(self, unit: str = "words", *, scale: float = 1.0) -> None:
        if unit not in ("words", "characters"):
            raise ValueError(f"no unit {unit}")
        self.unit, self.scale = unit, scale

    async def score(self, pending):
        for position, each in enumerate(pending):
            text = each.candidate.text
            yield position, Score(self.scale * len(text.split() if self.unit == "words" else text))
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A package with an entry point is installed, and a registry that has not looked yet."""
    (tmp_path / "their_scorers.py").write_text(THEIRS)
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[bon.scorers]\nlength = their_scorers:Length\nlost = nowhere_to_be_found:Scorer\nflip = their_scorers:Length\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    SCORERS.__dict__.pop("_others", None)
    yield SCORERS
    SCORERS.__dict__.pop("_others", None)


def test_a_scorer_of_another_package_is_there_by_its_entry_point(theirs):
    made = theirs.make("length:characters,scale=2")
    assert (made.unit, made.scale) == ("characters", 2)
    assert theirs.spec_of(made) == "length:characters,scale=2"
    result = BestOfN(ScriptedEngine(["a b", "abcdef"]), "length:characters", n=2)("x")
    assert (result.text, result.reward) == ("abcdef", 6.0)
    with pytest.raises(UnknownNameError, match="Did you mean 'length'"):
        BestOfN(ScriptedEngine(), "lenght:characters")
    with pytest.raises(UnknownNameError, match="Did you mean 'scale'"):
        theirs.make("length:words,scal=2")
    with pytest.raises(UserCodeError, match="the scorer 'length' raised ValueError: no unit pages"):
        theirs.make("length:pages")
    with pytest.raises(MissingExtraError, match="pip install theirs"):
        theirs.make("lost")


def test_nobody_takes_the_place_of_bons_own(theirs):
    assert isinstance(theirs.make("flip:mini"), Flip)


def test_every_registered_class_of_bon_can_be_loaded():
    for registry in (SCORERS, SELECTORS, BUDGETS, DATASETS, ENGINES):
        for known in registry:
            if registry is not ENGINES or not known.startswith("vllm"):
                assert registry.load(known)


def test_an_unknown_registry_entry_is_refused_by_its_kind():
    with pytest.raises(UnknownNameError, match=r"unknown thing .a.\. Known: b"):
        Registry("thing", {"b": "json:dumps"}).load("a")
