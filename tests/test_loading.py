"""From a name to a model: what is fetched of a repository, what is shown meanwhile, and what happens when it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import in_process_of_its_own, process
from fake_hub import FakeHub
from tiny import save

from bon.engines.loading import files_to_load, weight_files
from bon.mini import WEIGHTS

PROMPT = "Write a slogan for a bakery called Sunrise."


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with bon's mini model, beside other formats of the same weights as real repositories have them."""
    folder = shutil.copytree(WEIGHTS, tmp_path / "repository")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"much")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.onnx", "README.md"):
        (folder / name).write_bytes(b"much")
    with FakeHub({"someone/mini": folder}) as made:
        yield made


@pytest.fixture
def online(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_a_model_by_name_is_fetched_once_and_without_what_is_not_needed(
    hub: FakeHub, online: dict[str, str], tmp_path: Path, engine: str
) -> None:
    arguments = ("run", PROMPT, "-n", 2, "--policy", f"someone/mini,engine={engine}", "--json")
    code, out, err = in_process_of_its_own(*arguments, cwd=tmp_path, env=online)
    assert code == 0, err
    assert len(json.loads(out)["candidates"]) == 2
    assert err.splitlines()[0] == "bon: fetching someone/mini, 0.0 GB"
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(hub.fetched)
    assert hub.fetched.count("model.safetensors") == 1
    assert not {"pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth"} & set(hub.fetched)
    assert not [file for file in hub.fetched if file.endswith((".onnx", ".md"))]
    again = in_process_of_its_own(*arguments, cwd=tmp_path, env={**online, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert again[0] == 0, again[2]
    assert "fetching" not in again[2]


def test_the_log_of_a_server_is_json_from_the_fetching_of_its_model_on(online: dict[str, str], tmp_path: Path) -> None:
    server = process("serve", "someone/mini,engine=torch", "--port", 0, cwd=tmp_path, env=online)
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(json.loads(line))
        if "http://" in lines[-1]["message"]:
            break
    server.terminate()
    server.communicate(timeout=60)
    said = ["loading someone/mini,engine=torch", "fetching someone/mini, 0.0 GB"]
    assert [line["message"] for line in lines[:2]] == said


def test_a_name_that_the_hub_does_not_know_is_said_to_be_unknown(online: dict[str, str], tmp_path: Path) -> None:
    code, _, err = in_process_of_its_own("run", PROMPT, "--policy", "someone/else", cwd=tmp_path, env=online)
    assert code == 2
    assert "'someone/else' is neither a folder nor a model on this machine, and the hub knows none of that name" in err


def test_a_model_with_terms_to_accept_says_where(online: dict[str, str], tmp_path: Path) -> None:
    with FakeHub({"someone/gated": WEIGHTS}, gated=True) as hub:
        env = {**online, "HF_ENDPOINT": hub.url}
        code, _, err = in_process_of_its_own("run", PROMPT, "--policy", "someone/gated", cwd=tmp_path, env=env)
    assert code == 2
    assert "do that at https://huggingface.co/someone/gated, then type: hf auth login" in err


def test_a_hub_that_cannot_be_reached_is_said_with_the_way_around(online: dict[str, str], tmp_path: Path) -> None:
    env = {**online, "HF_ENDPOINT": "http://127.0.0.1:9"}
    code, _, err = in_process_of_its_own("run", PROMPT, "--policy", "someone/mini", cwd=tmp_path, env=env)
    assert code == 2
    assert "and it could not be fetched" in err
    assert "hf download someone/mini" in err


def test_the_size_of_a_model_is_known_before_its_weights_are_here(
    hub: FakeHub, online: dict[str, str], tmp_path: Path
) -> None:
    """Looking at the configuration puts a folder without weights into the cache: they counted as 0 bytes."""
    code = "from bon.engines.placement import need_of; print(need_of('someone/mini').weights)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **online}, capture_output=True, text=True)
    assert done.stdout.strip() == str((WEIGHTS / "model.safetensors").stat().st_size), done.stderr
    assert hub.fetched == ["config.json"]


def test_one_set_of_weights_is_taken_from_a_repository() -> None:
    def listed(*names: str) -> list[str]:
        return list(files_to_load(SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=1) for n in names])))

    small = ("config.json", "tokenizer.model")
    both = (*small, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "pytorch_model.bin")
    assert listed(*both, "onnx/model.onnx", "consolidated.safetensors") == sorted(both[:-1])
    assert listed(*small, "pytorch_model.bin", "flax_model.msgpack") == sorted((*small, "pytorch_model.bin"))


def test_weights_of_which_a_part_is_missing_count_as_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]
    _shard(folder)
    assert [file.name for file in weight_files(folder)] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert weight_files(folder) == []
    (folder / "model.safetensors.index.json").unlink()
    assert weight_files(folder) == []


def _shard(folder: Any) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / "model.safetensors").rename(folder / names[0])
    (folder / names[1]).write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    )
