"""An evaluation with a real model: does it read backwards at all?"""

import json

import pytest

from bon.evals.harness import evaluate

PAIRS = [
    ("What is the capital of Portugal?", "The capital of Portugal is Lisbon."),
    (
        "Write a haiku about autumn rain.",
        "Grey clouds gather low,\nautumn rain taps on the leaves,\nthe path turns to gold.",
    ),
    ("How do I boil an egg?", "Put the egg in boiling water, wait eight minutes, then cool it under cold water."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Name three kinds of fruit.", "Apples, bananas and cherries."),
    ("Translate 'good morning' into French.", "'Good morning' is 'bonjour' in French."),
    ("Why is the sky blue?", "Air scatters the short waves of sunlight more than the long ones, so we see blue."),
    (
        "Write an e-mail to my boss asking for a day off.",
        "Dear Ms Hill,\n\nmay I take next Friday off?\n\nBest regards,\nTom",
    ),
    ("What is 12 times 12?", "12 times 12 is 144."),
    ("Tell me a joke about a cat.", "Why did the cat sit on the computer? To keep an eye on the mouse."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("List the planets of the solar system.", "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune."),
    ("Give me a recipe for pancakes.", "Mix flour, milk and eggs, then fry thin layers of the batter in butter."),
    ("What does a doctor do?", "A doctor examines patients, finds out what ails them and treats it."),
    ("Write a slogan for a bicycle shop.", "Two wheels, endless roads: ride with us!"),
    ("How many days are in a leap year?", "A leap year has 366 days."),
    ("Explain what a volcano is.", "A volcano is an opening in the earth through which lava, ash and gas come out."),
    ("Suggest a name for a dog.", "How about Buddy?"),
    ("Describe the taste of a lemon.", "A lemon tastes sour and fresh, with a sharp edge."),
    ("What should I pack for the beach?", "Pack a towel, sunscreen, a hat, water and a good book."),
]


@pytest.mark.real
def test_a_real_model_tells_the_answer_to_a_prompt_from_the_answer_to_another(smollm2, tmp_path):
    rows = []
    for i, (prompt, answer) in enumerate(PAIRS):
        candidates = [answer, PAIRS[(i + 1) % len(PAIRS)][1]]
        turned = i % 2  # so that no place is always right
        rows.append({"prompt": prompt, "candidates": candidates[:: -1 if turned else 1], "best": turned})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store, name = tmp_path / "scores.db", f"default:{smollm2}"
    report = evaluate(str(tmp_path / "rows.jsonl"), scorers=[name], store=store)
    found = report["scorers"][name]
    assert (report["rows"], report["left_out"], found["failed"]) == (20, 0, 0)
    assert found["score"] >= 0.8
    assert found["minus_random"]["low"] > 0
    again = evaluate(str(tmp_path / "rows.jsonl"), scorers=[name], store=store)
    assert again["scorers"][name] == found, "all of it came from the store"
