"""The playground in a real headless Chromium."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from fake_openai import FakeServer
from serving import served, until

playwright = pytest.importorskip("playwright.sync_api")

from bon import BestOfN, Score, Scorer, StopAt  # noqa: E402
from bon.engines.http.engine import HTTPEngine  # noqa: E402
from bon.engines.http.wire import RequestRefusedError  # noqa: E402
from bon.engines.scripted import ScriptedEngine  # noqa: E402
from bon.mini.tasks import FAMILIES, knows  # noqa: E402
from bon.serve.failures import public  # noqa: E402

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("BON_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROMPT = "Write a reminder for Anna to water the plants on Monday."
PAYLOADS = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload='window.hacked = 1'>",
    "</p><iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "<a href='javascript:window.hacked=1'>click</a>",
    "<style>body { display: none }</style>",
    "<form action='http://evil.example'><input name=key autofocus onfocus='window.hacked = 1'></form>",
    "\"><script src='http://evil.example/x.js'></script>",
    "&lt;script&gt; stays as it is, and so does \u202e right to left \u0000 and \U0001f331 emoji",
)


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, or set BON_CHROMIUM")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    contexts = []

    def open_page(site, fragment="", wait=True, **options):
        context = chromium.new_context(**options)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.url)
        contexts.append(context)
        page = context.new_page()
        page.problems, page.foreign = [], []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("dialog", lambda dialog: page.problems.append(dialog.message))
        page.on("request", lambda r: page.foreign.append(r.url) if not r.url.startswith((site.url, "data:")) else None)
        page.goto(f"{site.url}/{fragment}")
        if wait:
            page.wait_for_selector("#scorer option", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()


def ask(page, prompt=PROMPT):
    page.fill("#prompt", prompt)
    page.click("#run")
    page.wait_for_selector("body[data-state=done]", timeout=20_000)


def backward(text, draw):
    """Candidates drop words; what is inferred from a candidate is the candidate, with an emoji before it."""
    _, inversion, response = text.rpartition("Response:\n")
    if inversion:
        return f"\U0001f331 {response}"
    words = text.split()
    return " ".join(words[draw:])


@pytest.fixture(scope="module")
def site():
    with served(BestOfN(ScriptedEngine(backward, step_seconds=0.03), "flip", n=4, prune=False)) as it:
        yield it


def test_the_winner_comes_first_with_the_words_that_match(site, open_page):
    page = open_page(site)
    ask(page)
    winner = page.locator("#winner article")
    assert winner.locator(".text").inner_text() == PROMPT
    marks = winner.locator("mark").all_inner_texts()
    assert marks == ["Write", "reminder", "for", "Anna", "to", "water", "plants", "on", "Monday."], (
        "emoji shift nothing"
    )
    rewards = [float(t) for t in page.locator("article .reward").all_inner_texts()]
    assert len(rewards) == 4
    assert rewards == sorted(rewards, reverse=True)
    assert page.locator("#timeline rect.sample").count() == 4
    assert page.locator("#timeline rect.score").count() == 4
    assert page.locator("#rewards circle").count() == 4
    assert page.locator("#rewards circle.best").count() == 1
    assert page.locator("#status").inner_text().startswith("Done in ")
    assert page.problems == page.foreign == []


def test_candidates_and_rewards_appear_as_they_come(open_page):
    policy = ScriptedEngine(lambda text, draw: f"draw {draw} " + "word " * 100 * draw, step_seconds=0.02)
    with served(BestOfN(policy, ScriptedEngine(), n=3)) as site:
        page = open_page(site)
        page.fill("#prompt", PROMPT)
        page.click("#run")
        page.wait_for_selector("#list .reward:text-matches('^[0-9]')")
        page.wait_for_selector("#timeline rect.live", state="attached")
        under_way = page.locator("#list article.waiting")
        assert under_way.count() == 2, "one card for each candidate, written or not"
        assert all(clock.endswith("s") for clock in under_way.locator(".clock").all_inner_texts())
        page.wait_for_selector("#list article.waiting .text:text-matches('draw 2 word word word word')")
        assert page.get_attribute("body", "data-state") == "busy", "a text is read while it is written"
        page.wait_for_selector("body[data-state=done]", timeout=20_000)
        assert page.locator("rect.live, .clock, article.waiting").count() == 0


@pytest.mark.parametrize("where", ["candidate", "inferred", "error"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_models_say_is_never_interpreted(open_page, where, payload):
    def script(text, draw):
        inversion = "Response:\n" in text
        return payload if (inversion if where == "inferred" else not inversion) else "plain"

    class Failing(ScriptedEngine):
        def generate(self, *args, **kwargs):
            raise RequestRefusedError(payload)

    engine = Failing() if where == "error" else ScriptedEngine(script)
    with served(BestOfN(engine, "flip", n=2)) as site:
        page = open_page(site)
        page.fill("#prompt", payload)
        page.click("#run")
        page.wait_for_selector("body[data-state=done], body[data-state=failed]", timeout=20_000)
        shown = {"candidate": "#winner .text", "inferred": "#winner .inferred", "error": "#alert"}[where]
        said = public(payload) if where == "error" else payload
        assert " ".join(said.split()) in " ".join(page.locator(shown).text_content().split())
        page.wait_for_timeout(50)
        assert page.evaluate("window.hacked") is None
        assert (
            page.locator("main").evaluate(
                "node => node.querySelectorAll('script, img, iframe, a, form, style, input').length"
            )
            == 0
        )
        assert page.is_visible("#prompt")
        assert page.foreign == []
        assert [p for p in page.problems if "502" not in p] == [], "the browser's policy had nothing to block either"


def test_the_policy_of_the_page_stops_a_script_that_got_in_anyway(site, open_page):
    page = open_page(site)
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        " document.body.append(s); const i = document.createElement('img');"
        " i.setAttribute('onerror', 'window.hacked = 1'); i.src = 'x:';"
        " document.body.append(i); }"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in problem for problem in page.problems)


def test_it_works_from_the_keyboard_alone(site, open_page):
    page = open_page(site)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type(PROMPT)
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached[:3] == ["n", "scorer", "run"]
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("body[data-state=done]", timeout=20_000)
    page.focus("#winner button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#winner button:text-is('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == PROMPT


def test_escape_stops_the_run_on_the_page_and_on_the_server(open_page):
    policy = ScriptedEngine(lambda text, draw: "word " * (1 + 10_000 * draw), step_seconds=0.02)
    with served(BestOfN(policy, ScriptedEngine(), n=2)) as site:
        page = open_page(site)
        page.fill("#prompt", PROMPT)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#list article:not(.waiting)")
        page.wait_for_selector("#list article.waiting .text:text-matches('word word')")
        page.keyboard.press("Escape")
        page.wait_for_selector("body[data-state=idle]")
        assert page.locator("#status").inner_text() == "Stopped. 1 of 2 were sampled."
        assert "word word" in page.locator("#list article.waiting .text").inner_text(), "nor is what was written lost"
        until(lambda: site.server.admission.running == policy.running == 0)


def test_every_control_has_a_name_and_the_progress_is_announced(site, open_page):
    page = open_page(site)
    ask(page)
    page.click("summary")
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, textarea, select, button')].filter(e => !(e.labels && e.labels.length)"
        " && !e.textContent.trim() && !e.getAttribute('aria-label')).length"
    )
    assert nameless == 0
    assert page.get_attribute("#status", "aria-live") == "polite"
    assert page.locator("svg[role=img][aria-label]").count() == 2


def test_a_run_that_fails_keeps_what_was_there_and_waits_for_nothing_more(open_page):
    policy = ScriptedEngine(["short", "word " * 200, "other " * 200], step_seconds=0.01, fail_after=60)
    with served(BestOfN(policy, ScriptedEngine(), n=3)) as site:
        page = open_page(site)
        page.fill("#prompt", PROMPT)
        page.click("#run")
        page.wait_for_selector("body[data-state=failed]", timeout=20_000)
        assert page.locator("#status").inner_text() == "Failed. 1 of 3 were sampled."
        assert page.is_visible("#alert")
        assert page.locator("#list .reward").all_inner_texts()[1:] == ["not finished", "not finished"]
        assert "word word" in page.locator("#list").inner_text()
        assert page.locator("rect.live, .clock, .tag.win").count() == 0


def test_a_run_that_waits_for_its_turn_says_so_until_it_has_it(open_page):
    policy = ScriptedEngine(lambda text, draw: "word " * 100, step_seconds=0.02)
    with served(BestOfN(policy, "flip", n=1), max_running=1, heartbeat_s=0.2) as site:
        first, second = open_page(site), open_page(site)
        first.fill("#prompt", PROMPT)
        first.click("#run")
        first.wait_for_selector("#list .text:text-matches('word word')")
        second.fill("#prompt", PROMPT)
        second.click("#run")
        second.wait_for_selector("#status:text-is('Waiting: number 1 in the queue')")
        second.wait_for_selector("#list .reward:text-is('in the queue')")
        first.click("#stop")
        second.wait_for_selector("#status:text-is('1 being written')")
        second.wait_for_selector("body[data-state=done]", timeout=20_000)


def test_no_badge_goes_to_a_candidate_without_text(open_page):
    with served(BestOfN(ScriptedEngine([" "]), "flip", n=3)) as site:
        page = open_page(site)
        ask(page)
        assert page.locator(".tag.win").count() == 0
        assert page.is_hidden("#winner")
        assert page.locator("#list article").count() == 1, "three times nothing is one card"
        assert "no text" in page.locator("#list article").inner_text()


def test_copies_are_one_card_and_a_long_list_is_folded(open_page):
    policy = ScriptedEngine(lambda text, draw: f"{PROMPT} {draw % 16}")
    with served(BestOfN(policy, ScriptedEngine(lambda text, draw: text), n=64, prune=False)) as site:
        page = open_page(site)
        ask(page)
        assert page.locator("#winner .name").inner_text().startswith("4 alike: ")
        assert page.locator("article").count() == 16
        assert page.locator("article:visible").count() == 9
        page.click("#list summary:text-is('7 more')")
        assert page.locator("article:visible").count() == 16


def test_a_setting_that_is_wrong_is_shown_even_where_it_is_folded_away(site, open_page):
    page = open_page(site, "#seed=-1&prompt=hello")
    page.click("#more summary")
    assert not page.is_visible("#seed")
    page.click("#run")
    page.wait_for_selector("#seed:focus")


def test_the_words_that_were_missed_are_marked_in_the_prompt(open_page):
    scorer = ScriptedEngine(["Write a reminder for Anna to water on Monday."])
    with served(BestOfN(ScriptedEngine(["Water!"]), scorer, n=1)) as site:
        page = open_page(site)
        ask(page)
        assert page.locator("#winner mark.missed").all_inner_texts() == ["plants"]


def test_warnings_and_echoes_are_shown(open_page):
    policy = ScriptedEngine(lambda text, draw: "The very same story" if "again" in text else f"Once upon a time {draw}")
    scorer = ScriptedEngine(
        lambda text, draw: "Tell a story" if "same" not in text else text.rpartition("Response:\n")[2]
    )
    with served(BestOfN(policy, scorer, n=2, prune=False)) as site:
        page = open_page(site)
        ask(page, "Tell it again")
        assert "repeated" in page.locator("#warnings").inner_text()
        assert page.locator("#winner .tag.warn").inner_text() == "echo"
        assert page.locator("#winner .reward.void").count() == 1
        ask(page, "Tell a story")
        assert "All rewards are 1" in page.locator("#warnings").inner_text()
        assert page.locator("#winner .reward.void").count() == 0


def test_code_headings_and_strong_words_are_set_and_everything_else_is_text(open_page):
    said = "## To do\n1. **Run** `ls -l` *now*\n```python\nprint('**no**')\n```\n  the <b>end</b>"
    with served(BestOfN(ScriptedEngine(lambda text, draw: said), ScriptedEngine(), n=1)) as site:
        page = open_page(site)
        ask(page)
        text = page.locator("#winner .text")
        assert text.locator("strong").all_inner_texts() == ["To do\n", "Run"]
        assert text.locator("code").all_inner_texts() == ["ls -l"]
        assert text.locator("pre").inner_text() == "print('**no**')\n"
        assert "*now*" in text.inner_text()
        assert "  the <b>end</b>" in text.text_content()
        page.click("#winner button")
        assert page.evaluate("navigator.clipboard.readText()") == said, "what is copied is what was said"


def test_the_winners_sentences_are_tinted_by_their_credit_and_say_it(open_page):
    weights = {"Alpha leads.": 0.5, "Beta <b>helps</b>.": 0.25, "Gamma hurts.": -0.125, "No.": 0.0}
    text = "\U0001f331 Alpha leads. Beta <b>helps</b>.\n```\nx = 1.\n\ny\n```\nGamma hurts. No."

    def weigh(prompt, responses):
        return [sum(weight for part, weight in weights.items() if part in response) for response in responses]

    with served(BestOfN(ScriptedEngine(lambda asked, draw: text), weigh, n=2)) as site:
        page = open_page(site)
        ask(page)
        assert page.locator(".credit").count() == 0
        page.click("#more summary")
        page.select_option("#credit", "sentences")
        page.click("#run")
        page.wait_for_selector("#winner .credit")
        page.wait_for_selector("body[data-state=done]")
        spans = page.locator("#winner .credit")
        said = [f"credit {number}" for number in ("+0.500", "+0.250", "+0.000", "-0.125", "+0.000")]
        assert [span.get_attribute("title") for span in spans.all()] == said
        assert spans.nth(1).text_content() == "Beta <b>helps</b>. (credit +0.250)", "read out with the sentence"
        assert spans.nth(2).locator("pre").count() == 1, "a block of code is one part"
        assert "costs" in spans.nth(3).get_attribute("class")
        tints = spans.evaluate_all("spans => spans.map(span => getComputedStyle(span).backgroundColor)")
        assert len({*tints}) == 4, "the more, the deeper; another colour below 0"
        assert not spans.nth(0).locator(".value").bounding_box()["width"] > 1
        spans.nth(0).focus()
        assert spans.nth(0).locator(".value").bounding_box()["width"] > 50
        page.keyboard.press("Tab")
        assert spans.nth(1).locator(".value").bounding_box()["width"] > 50
        page.click("#winner button")
        assert page.evaluate("navigator.clipboard.readText()") == text, "what is copied is the text alone"
        page.click("#code summary")
        page.click("#curl")
        assert '"credit":true' in page.locator("#snippet").text_content()
        assert page.problems == []
        if folder := os.environ.get("BON_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "credit.png", full_page=True)


def test_two_scorers_stand_side_by_side(open_page):
    policy = ScriptedEngine(lambda text, draw: f"{text} {draw}")
    with served(BestOfN(policy, "flip", n=4, prune=False)) as site:
        page = open_page(site)
        page.click("#more summary")
        page.select_option("#second", "likelihood")
        page.fill("#prompt", PROMPT)
        page.click("#run")
        page.wait_for_selector("#compared table")
        page.wait_for_selector("body[data-state=done]")
        assert page.locator("#compared th").all_inner_texts() == ["", "flip", "likelihood", "text"]
        assert page.locator("#compared tr").count() == 5
        assert page.locator("#compared td.picked").count() == 2
        assert page.problems == []


def test_two_scorers_are_not_compared_where_the_policy_answers_something_else_each_time(open_page):
    answers = iter(range(100))
    policy = ScriptedEngine(lambda text, draw: f"{text} {next(answers)}")
    with served(BestOfN(policy, "flip", n=2)) as site:
        page = open_page(site, "#second=likelihood")
        page.fill("#prompt", PROMPT)
        page.click("#run")
        page.wait_for_selector("#compared >> text=cannot be set side by side")


def test_the_longest_candidate_is_named_beside_the_winner(open_page):
    answers = [PROMPT, "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"]
    with served(BestOfN(ScriptedEngine(answers), ScriptedEngine(), n=2, prune=False)) as site:
        page = open_page(site)
        ask(page)
        assert "the longest would have been candidate 1, 0.0" in page.locator("#gain").inner_text()


def test_a_result_can_be_kept_as_a_page_and_as_json(open_page, chromium, tmp_path):
    with served(BestOfN(ScriptedEngine(PAYLOADS), ScriptedEngine(), n=len(PAYLOADS), prune=False)) as site:
        page = open_page(site)
        ask(page)
        with page.expect_download() as download:
            page.click("#json")
        saved = json.loads(download.value.path().read_text())
        assert saved["request"]["messages"][0]["content"] == PROMPT
        assert {c["text"] for c in saved["answer"]["candidates"]} == set(PAYLOADS)
        with page.expect_download() as download:
            page.click("#html")
        download.value.save_as(tmp_path / "bon.html")
    kept = chromium.new_page()
    try:
        kept.goto(f"file://{tmp_path}/bon.html")
        assert kept.locator("article:visible").count() == len(PAYLOADS), "nothing is folded, and no server is needed"
        shown = kept.locator("body").inner_text()
        assert PROMPT in shown
        assert PAYLOADS[0] in shown
        assert kept.evaluate("window.hacked") is None
        assert kept.locator("script, img, iframe, form, input, button").count() == 0
    finally:
        kept.close()


@pytest.mark.parametrize("kind", ["curl", "python"])
def test_the_request_as_code_gives_the_same_answer(site, open_page, tmp_path, kind):
    page = open_page(site)
    page.fill("#prompt", """It's "quoted" $HOME `ls` \\ new""")
    page.click("#more summary")
    page.fill("#seed", "7")
    page.click("#code summary")
    page.click(f"#{kind}")
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == page.locator("#snippet").text_content()
    command = ["sh", "-c", code] if kind == "curl" else [sys.executable, "-c", code]
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"] if kind == "curl" else done.stdout
    assert answer.startswith("""It's "quoted" $HOME `ls` \\ new""")


def test_the_embedded_model_says_what_it_knows_and_other_models_do_not(site, open_page):
    with served(BestOfN(n=2)) as mini:
        page = open_page(mini)
        assert page.locator("#model").inner_text() == "bon-mini"
        assert page.is_visible("#embedded")
        assert page.locator("#examples button").count() == len(FAMILIES)
        page.click("#examples button:text-is('slogan')")
        assert knows(page.input_value("#prompt"))
        ask(page, page.input_value("#prompt"))
        assert "The embedded model knows" not in page.locator("#warnings").inner_text()
        ask(page, "What is the capital of France?")
        assert "The embedded model knows" in page.locator("#warnings").inner_text()
    page = open_page(site)
    assert page.is_hidden("#embedded")
    page.click("#examples button:text-is('haiku')")
    assert page.input_value("#prompt").startswith("Write a haiku")


def test_the_page_waits_for_a_server_behind_this_one_and_shows_what_it_calls_its_model(open_page):
    with FakeServer() as upstream:
        upstream.die()
        with served(BestOfN(HTTPEngine(upstream.url, retries=0), "consensus", n=1)) as site:
            page = open_page(site, wait=False)
            page.wait_for_selector("#status:text-matches('has not answered yet')")
            upstream.listen()
            page.wait_for_selector("#status:text-is('Ready.')")
            assert page.locator("#model").inner_text() == "fake-model"


def test_likelihood_is_offered_only_where_the_model_can_read(open_page):
    with FakeServer(lambda seen, draw: "yes") as upstream, served(BestOfN(upstream.url, "flip", n=1)) as site:
        page = open_page(site)
        assert page.locator("#scorer option").all_inner_texts() == ["flip", "judge", "deepconf"]


def test_a_link_carries_the_settings(site, open_page):
    page = open_page(site)
    page.fill("#prompt", "Say & mean <b>it</b> #1")
    page.fill("#n", "3")
    page.select_option("#scorer", "likelihood")
    page.click("summary")
    page.fill("#temperature", "0.5")
    page.fill("#key", "sk-secret")
    page.click("#link")
    link = page.evaluate("navigator.clipboard.readText()")
    assert "sk-secret" not in link
    other = open_page(site, link.removeprefix(site.url + "/"))
    values = [other.input_value(f"#{name}") for name in ("prompt", "n", "scorer", "temperature", "key")]
    assert values == ["Say & mean <b>it</b> #1", "3", "likelihood", "0.5", ""]
    assert other.evaluate("document.body.dataset.state") == "idle", "a link runs nothing by itself"
    assert other.is_visible("#temperature")
    hostile = open_page(site, "#n=%3Cimg&scorer=x&prompt=" + quote("<img src=x onerror=window.hacked=1>"))
    assert hostile.evaluate("window.hacked") is None


def test_pruned_candidates_are_grey_with_their_bound(open_page):
    answers = [PROMPT, "one two three four five six seven eight nine ten eleven twelve thirteen " * 3]
    with served(BestOfN(ScriptedEngine(answers, step_seconds=0.002), ScriptedEngine(step_seconds=0.01), n=2)) as site:
        page = open_page(site)
        ask(page)
        pruned = page.locator("#list article.pruned")
        assert pruned.count() == 1
        assert pruned.locator(".reward").inner_text().startswith("≤ 0.")
        assert "pruned" in pruned.inner_text()


def test_a_candidate_whose_sampling_was_stopped_says_so(open_page):
    policy = ScriptedEngine([PROMPT, "word " * 500], step_seconds=0.005)
    with served(BestOfN(policy, ScriptedEngine(), n=StopAt(1.0, most=2))) as site:
        page = open_page(site)
        ask(page)
        assert "sampling stopped" in page.locator("#list article.pruned").inner_text()


def test_what_another_scorer_says_is_shown_as_text(open_page):
    class Judge(Scorer):
        concurrent = True

        async def score(self, pending):
            for position, _ in enumerate(pending):
                yield position, Score(0.5, explanation="<b>well</b> written")

    with served(BestOfN(ScriptedEngine(), Judge(), n=1)) as site:
        page = open_page(site)
        assert page.locator("#scorer option").all_inner_texts() == [
            "Judge",
            "flip",
            "likelihood",
            "judge",
            "slot",
            "forward",
        ]
        ask(page)
        assert "<b>well</b> written" in page.locator("#winner .inferred").inner_text()


def test_rewards_below_zero_are_drawn_as_well(site, open_page):
    page = open_page(site)
    page.select_option("#scorer", "likelihood")
    ask(page)
    assert page.locator("#rewards circle").count() == 4
    assert page.locator("#winner .reward").inner_text().startswith("-")
    assert page.problems == []


def test_a_key_is_asked_for_where_one_is_needed(open_page):
    with served(BestOfN(ScriptedEngine(), "flip", n=1), api_keys=("sk-1",)) as site:
        page = open_page(site, wait=False)
        page.wait_for_selector("text=wants an API key")
        page.fill("#key", "sk-1")
        page.keyboard.press("Tab")
        page.wait_for_selector("#scorer option", state="attached")
        ask(page)
        assert page.locator("#winner article").count() == 1


def test_a_key_that_is_entered_last_changes_no_other_setting(site, open_page):
    page = open_page(site)
    page.fill("#n", "3")
    page.select_option("#scorer", "likelihood")
    page.click("summary")
    page.select_option("#second", "judge")
    page.fill("#key", "sk-secret")
    page.keyboard.press("Tab")
    page.evaluate("describe()")  # as the key does, and to its end
    assert [page.input_value(f"#{name}") for name in ("n", "scorer", "second")] == ["3", "likelihood", "judge"]


def test_a_link_is_followed_once_a_late_server_answers(site, open_page):
    page = open_page(site, wait=False)
    page.route(
        "**/v1/models", lambda route: route.fulfill(status=503, json={"error": {"message": "Not yet."}}), times=1
    )
    page.goto(f"{site.url}/#n=3&scorer=likelihood")
    page.reload()
    page.wait_for_selector("#status:text-is('Not yet.')")
    page.wait_for_selector("#scorer option", state="attached")
    assert [page.input_value(f"#{name}") for name in ("n", "scorer")] == ["3", "likelihood"]


@pytest.mark.parametrize(("width", "height"), [(360, 740), (768, 1024), (1440, 900)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_can_be_read(site, open_page, width, height, scheme):
    page = open_page(site, color_scheme=scheme, viewport={"width": width, "height": height})
    ask(page, PROMPT + " " + "x" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    contrasts = page.evaluate(CONTRAST)
    assert min(contrasts) >= 4.5, "WCAG AA"
    if folder := os.environ.get("BON_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"playground-{width}-{scheme}.png", full_page=True)


# Contrast of each visible text with the first opaque background behind it (WCAG 2.1, relative luminance).
CONTRAST = """() => {
  const rgb = (text) => {
    const values = text.match(/[\\d.]+/g).map(Number);
    return {color: values.slice(0, 3), alpha: values[3] ?? 1};
  };
  const light = (color) => color.map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = rgb(getComputedStyle(node).backgroundColor);
      if (found.alpha === 1) return found.color;
    }
  };
  const texts = 'h1, h2, p, label, .reward, .name, .tag, mark, .numbers, #status, button:enabled';
  const shown = [...document.querySelectorAll(texts)].filter(node => node.offsetParent && node.textContent.trim());
  return shown.map(node => {
    const [a, b] = [light(rgb(getComputedStyle(node).color).color), light(behind(node))];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  });
}"""
