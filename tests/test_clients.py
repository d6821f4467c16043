"""Clients that people have, in front of ``bon serve`` with nothing changed but their base URL.

Marker ``clients``: each library is skipped where it is not installed (pip install -e '.[clients]').
"""

import json
import os
import subprocess
import sys

import pytest
from serving import served

from bon import BestOfN
from bon.engines.scripted import ScriptedEngine

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # their warnings are theirs

MESSAGES = [{"role": "user", "content": "Write about a quick red fox"}]


def script(text, draw):
    """The second draw is the longest and follows the instruction; one that asks for JSON gets JSON."""
    if "Response:\n" in text:
        return text.rpartition("Response:\n")[2]
    if "JSON" in text or "json" in text:
        return json.dumps({"name": "Anna", "age": 7})
    return "a quick red fox" if draw == 1 else "a fox"


@pytest.fixture(scope="module")
def site():
    with served(
        BestOfN(ScriptedEngine(script), lambda prompt, responses: [len(r) for r in responses], n=3), model_names=("m",)
    ) as it:
        yield it


def test_litellm_answers_and_streams(site):
    litellm = pytest.importorskip("litellm")
    to = {"model": "openai/m", "api_base": f"{site.url}/v1", "api_key": "none", "messages": MESSAGES}
    answer = litellm.completion(**to)
    assert answer.choices[0].message.content == "a quick red fox"
    assert answer.usage.total_tokens > 0
    chunks = litellm.completion(**to, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "a quick red fox"


def test_instructor_gets_its_object(site):
    instructor = pytest.importorskip("instructor")
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    client = instructor.from_openai(site.openai(), mode=instructor.Mode.MD_JSON)
    person = client.chat.completions.create(model="m", messages=MESSAGES, response_model=Person)
    assert (person.name, person.age) == ("Anna", 7)


def test_aisuite_answers(site):
    aisuite = pytest.importorskip("aisuite")
    client = aisuite.Client({"openai": {"api_key": "none", "base_url": f"{site.url}/v1"}})
    answer = client.chat.completions.create(model="openai:m", messages=MESSAGES)
    assert answer.choices[0].message.content == "a quick red fox"


def test_llm_answers_and_goes_on_with_a_conversation(site, tmp_path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: bon\n  model_name: m\n  api_base: {site.url}/v1\n  api_key_name: none\n"
    )
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "NONE": "none"}

    def ask(*arguments):
        command = [sys.executable, "-m", "llm", *arguments, "--key", "none"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert ask("-m", "bon", MESSAGES[0]["content"]) == "a quick red fox"
    assert ask("-c", "And once more") == "a quick red fox"
