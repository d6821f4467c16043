"""Reports to look at: the plots, and the page, also in a real headless Chromium."""

import copy
import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest

matplotlib = pytest.importorskip("matplotlib")

from bon.errors import InputError, MissingExtraError  # noqa: E402
from bon.evals.report import headline, write_plots, write_report  # noqa: E402

PROMPT = "Write a reminder for Anna to water the plants on Monday."
FLIP = 'flip:Qwen/Qwen3-0.6B,style=json,samples=4,sampling={"temperature": 0.7, "max_tokens": 256}'
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "</div></main><style>body { display: none }</style><svg onload='window.hacked = 1'>",
    "{{ report }} {% for x in y %} &lt;b&gt; stays",
    "\u05e9\u05dc\u05d5\u05dd \u202e reversed \u202d, \u0000 and a lone \ud800",
    "word" * 800,
    "def answer():\n" + "    return " + " + ".join(map(str, range(120))),
)


def interval(mean, half=0.1):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def rule(kind, share, tokens=0, **changes):
    score = 0.5 + 0.4 * share
    return {
        "kind": kind,
        "score": score,
        "official": {"Focus": score, "mean": score / 2},
        "share": interval(share, 0 if share in (0, 1) else 0.1),
        "minus_random": interval(0.4 * share),
        "minus_longest": interval(0.4 * share - 0.1),
        "best_of": {str(n): 0.5 + 0.4 * share * at for n, at in ((1, 0), (2, 0.4), (4, 0.7), (7, 1))},
        "by_length": [
            {"words": [3.0, 40.5], "rows": 11, "score": score, "random": 0.5},
            {"words": [41.0, 300.0], "rows": 10, "score": score - 0.1, "random": 0.4},
        ],
        "correlation": {"label": share / 2, "length": None, "echo": 0.1},
        "same_strength": {"rows": 4, "share": interval(share / 2)},
        "failed": 0.01,
        "tied": 0.2,
        "pruned": 0.0,
        "tokens": tokens,
        "seconds": 12.3,
        "tokens_per_correct": tokens / 9 if tokens else None,
        **changes,
    }


def report_of(share=0.4, longest=0.2, texts=HOSTILE):
    names = [FLIP, "likelihood", "longest"]
    candidates = [
        {
            "text": text,
            "label": float(i % 3),
            "rewards": {FLIP: 0.1 * i, "likelihood": None},
            "explanations": {FLIP: f"Water the plants! {text}", "likelihood": text} if i % 2 else {},
        }
        for i, text in enumerate(texts)
    ]
    return {
        "dataset": "llmbar",
        "rows": 21,
        "left_out": 1,
        "policy": None,
        "bigger": {
            "name": "<b>big</b>",
            "score": 0.625,
            "tokens": 900,
            "seconds": 4.5,
            "equal_time": {FLIP: {"n": 3, "score": 0.75}, "longest": None},
        },
        "n": 7,
        "seed": 0,
        "seconds": 81.5,
        "scorers": {
            FLIP: rule("scorer", share, 12_345),
            "likelihood": rule("scorer", -0.3, 4_000, same_strength=None),
            "random": rule("baseline", 0.0),
            "first": rule("baseline", 0.05),
            "longest": rule("baseline", longest),
            "oracle": rule("baseline", 1.0),
        },
        "inversion": {FLIP: {"retrieval_at_1": {"8": 0.71, "64": None}, "margin": 0.12, "echo_rate": 0.3}},
        "diagnosis": "Selection: 95% of the rows have a right answer.",
        "subsets": {"natural": {"rows": 1, "scores": {FLIP: 0.7}}, "adversarial": {"rows": 20, "scores": {}}},
        "disagreements": [
            {"row": 3, "prompt": PROMPT, "candidates": candidates, "picks": dict(zip(names, (1, 2, 5), strict=True))}
        ],
    }


class Elements(HTMLParser):
    """Elements and texts of a page, as a reader of HTML sees them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.texts.append(data)


def page_of(report, tmp_path):
    write_report(report, tmp_path / "r.html")
    return (tmp_path / "r.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("share", "longest", "says"),
    [
        (0.4, 0.2, r"“flip:.*” pays: it goes 40% \[30, 50\] of the way .*without a model, “longest”, gets 20% \["),
        (0.4, 0.6, r"“flip:.*” goes 40% .*, but the rule “longest” needs no model and gets 60% \[50, 70\]\.$"),
        (0.05, 0.02, r"^Nothing pays here: the best scorer, “flip:.*”, goes 5% \[−5, 15\]"),
        (-0.5, -0.2, r"^Nothing pays here: the best scorer, “likelihood”, goes −30% .*, “first”, gets 5%"),
    ],
)
def test_the_headline_says_what_pays_here_or_that_nothing_does(share, longest, says):
    assert re.search(says, headline(report_of(share, longest)))


def test_the_page_loads_nothing_from_anywhere_and_runs_nothing(tmp_path):
    page = page_of(report_of(), tmp_path)
    found = Elements(page)
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert all(link.startswith("#") for link in found.links), "glyphs and markers of the plots"
    assert found.tags.count("svg") == 4
    assert "@import" not in page
    assert "url(http" not in page


def test_every_text_is_on_the_page_as_text(tmp_path):
    report = report_of()
    report["scorers"]["<b>mine</b>&$x$"] = rule("scorer", 0.1)
    report["diagnosis"] = "<i>sampling</i>"
    found = Elements(page_of(report, tmp_path))
    texts = "".join(found.texts).replace("\ufffd", "")
    for hostile in HOSTILE:
        assert hostile.replace("\ud800", "") in texts
    assert found.texts.count("<b>mine</b>&$x$") >= 3, "in tables and in plots"
    assert "<i>sampling</i>" in found.texts
    assert "i" not in found.tags


def test_words_that_an_inferred_instruction_shares_with_the_prompt_are_marked(tmp_path):
    report = report_of(texts=["no", "yes"])
    page = page_of(report, tmp_path)
    assert "<mark>Water</mark> the <mark>plants!</mark> yes" in page
    report["inversion"] = {}
    assert "<mark>Water" not in page_of(report, tmp_path), "other explanations are no instructions"


def test_scorers_stand_by_their_share_with_baselines_marked(tmp_path):
    page = page_of(report_of(), tmp_path)
    table = page[page.index('id="scorers"') : page.index("In the time of")]
    names = re.findall(r'<th scope="row"><bdi>(.*?)</bdi>(.*baseline)?', table)
    assert [name[:10] for name, _ in names] == ["oracle", "flip:Qwen/", "longest", "first", "random", "likelihood"]
    assert [bool(marked) for _, marked in names] == [True, False, True, True, True, False]


def test_a_report_without_what_some_datasets_lack_is_a_page_as_well(tmp_path):
    report = json.loads(json.dumps(report_of()))
    report |= {"inversion": {}, "subsets": {}, "disagreements": [], "policy": "smollm2-135m", "policy_tokens": 5000}
    report["bigger"] = None
    for scorer in report["scorers"].values():
        scorer |= {
            "official": None,
            "share": None,
            "by_length": [],
            "best_of": {"1": 0.5},
            "tokens": 0,
            "same_strength": None,
        }
    page = page_of(report, tmp_path)
    assert "by <bdi>smollm2-135m</bdi>" in page
    assert "No scorer could be compared." in page
    for heading in ("Where they disagree", "In the time of", "By its own protocol"):
        assert heading not in page


def test_the_page_says_what_a_bigger_model_gets_and_what_the_datasets_own_protocol_gives(tmp_path):
    text = "".join("".join(Elements(page_of(report_of(), tmp_path)).texts).split())
    assert "Onegreedyanswerof<b>big</b>foreachrowisworth0.625andtook4.5sforallrows." in text
    assert "0.75longest––" in text.split("pickbycandidatesscore")[1].replace(",", "")
    assert "pickbyFocusmean" in text.split("Byitsownprotocol")[1]


def test_plots_are_written_for_what_a_report_has(tmp_path):
    paths = write_plots(report_of(), tmp_path / "made" / "plots")
    assert [path.name for path in paths] == ["share.png", "best_of.png", "tokens.png", "length.png"]
    for path in paths:
        height, width = matplotlib.image.imread(path).shape[:2]
        assert width > 600
        assert height > 300
    free = report_of()
    for scorer in free["scorers"].values():
        scorer["tokens"] = 0
    assert "tokens.png" not in [path.name for path in write_plots(free, tmp_path / "free")]
    assert "tokens.png" in [path.name for path in write_plots(free | {"policy_tokens": 9000}, tmp_path / "sampled")]


def test_drawing_changes_no_setting_of_the_callers_plots(tmp_path):
    before = copy.deepcopy(dict(matplotlib.rcParams))
    write_plots(report_of(), tmp_path)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("write", [write_plots, write_report])
def test_a_place_that_cannot_be_written_is_named(write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/r' cannot be written: Not a directory\."):
        write(report_of(), tmp_path / "file" / "r")


@pytest.mark.parametrize("write", [write_plots, write_report])
def test_without_matplotlib_the_extra_is_named(write, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib, .* is not installed. Type: pip install 'bon\[bench\]'"):
        write(report_of(), tmp_path / "r")


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    found = os.environ.get("BON_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium, or set BON_CHROMIUM")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--headless", "--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 900, 1400])
def test_the_page_fits_every_width_whatever_the_candidates_hold(width, scheme, chromium, tmp_path):
    write_report(report_of(), tmp_path / "r.html")
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "r.html").as_uri())
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    cut = "e => [...e].filter(x => x.scrollWidth > x.clientWidth + 1).map(x => x.textContent.slice(0, 60))"
    assert page.locator(".candidate, .candidate .text, .tag, .prompt, .headline").evaluate_all(cut) == []
    assert page.locator("article:visible").count() == len(HOSTILE)
    assert page.evaluate("window.hacked") is None
    assert page.locator(".text", has_text=HOSTILE[0]).first.is_visible()
    text, ground = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (text, ground)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
    fills = page.locator("figure svg text").evaluate_all("all => all.map(e => getComputedStyle(e).fill)")
    assert text in fills, "plots have the page's colour"
    assert "rgb(11, 12, 13)" not in fills
    assert problems == []
    assert requests == [(tmp_path / "r.html").as_uri()]
    page.close()
