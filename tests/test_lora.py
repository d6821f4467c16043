"""The folder of a LoRA adapter is a model: its base, with the adapter added."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import save, tokenizer

from bon import BestOfN
from bon.engines.base import Generates, Prompt, Request
from bon.engines.loading import load
from bon.engines.placement import need_of
from bon.errors import InputError, ModelNotFoundError
from bon.models import ModelPool
from bon.task import Message
from bon.types import Sampling

RANK, ALPHA = 4, 16.0
MODULES = {"model.layers.0.self_attn.q_proj": (64, 32), "model.layers.1.mlp.down_proj": (32, 64)}  # out, in


def matrices(modules: dict[str, tuple[int, int]] = MODULES) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    found = {}
    for name, (out, into) in modules.items():
        found[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, into, generator=made)
        found[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=made)
    return found


def write(folder: Path, base: Any, weights: dict[str, torch.Tensor], **more: Any) -> Path:
    """An adapter as PEFT writes it."""
    folder.mkdir()
    targets = ["q_proj", "o_proj", "down_proj"]
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": targets}
    config |= {"r": RANK, "lora_alpha": ALPHA, **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(12)[None]).logits
    return found


@pytest.mark.parametrize(
    ("more", "scale"), [({}, 4.0), ({"use_rslora": True}, 8.0), ({"alpha_pattern": {"q_proj|down_proj": 2}}, 0.5)]
)
def test_the_logits_are_those_of_the_base_with_the_adapter_beside_it(
    tmp_path: Path, more: dict[str, Any], scale: float
) -> None:
    base, weights = save(tmp_path / "base", "Llama", "ascii"), matrices()
    adapted = logits(load(write(tmp_path / "adapter", base, weights, **more))[0])
    plain, _ = load(base)
    assert not torch.allclose(adapted, logits(plain), atol=1e-2)
    for name in MODULES:
        down, up = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        plain.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, down=down, up=up: output + scale * (inputs[0] @ down.T @ up.T)
        )
    assert torch.allclose(adapted, logits(plain), atol=1e-3)


def test_an_adapter_with_a_tokenizer_is_spoken_to_as_it_was_trained(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", save(tmp_path / "base", "Llama", "ascii"), matrices())
    own = tokenizer("ascii")
    own.chat_template = "{{ messages[0]['content'] }} =>"
    own.save_pretrained(folder)
    assert load(folder)[1].chat_template == own.chat_template


def test_an_adapter_is_a_policy_and_takes_the_room_of_its_base(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "Llama", "ascii")
    folder = write(tmp_path / "adapter", base, matrices())
    with BestOfN(f"{folder},engine=torch", lambda prompt, responses: [1.0] * len(responses), n=2) as bon:
        assert len(bon("Hi", sampling={"max_tokens": 5}).candidates) == 2
    assert need_of(str(folder)) == need_of(str(base))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"weights": matrices({"model.layers.9.self_attn.q_proj": (64, 32)})}, "does not fit"),
        ({"weights": matrices({"model.layers.0.self_attn.q_proj": (32, 32)})}, "does not fit"),
        ({"weights": {"base_model.model.lm_head.weight": torch.zeros(2)}}, r"\(base_model.model.lm_head.weight\)"),
        ({"use_dora": True}, "of another kind"),
        ({"peft_type": "IA3"}, "of another kind"),
        ({"r": "many"}, "cannot be read as a LoRA adapter's"),
        ({"base": ""}, "names no base"),
    ],
)
def test_an_adapter_that_cannot_be_added_is_refused(tmp_path: Path, more: dict[str, Any], complaint: str) -> None:
    base = more.pop("base", None) if "base" in more else save(tmp_path / "base", "Llama", "ascii")
    folder = write(tmp_path / "adapter", base, more.pop("weights", matrices()), **more)
    with pytest.raises(InputError, match=complaint):
        load(folder)


def test_a_base_that_is_not_there_is_named_with_the_adapter(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", tmp_path / "gone", matrices())
    with pytest.raises(
        ModelNotFoundError, match=r"no model folder at .*gone.*base of the LoRA adapter .*adapter_config"
    ):
        load(folder)


@pytest.mark.vllm
def test_vllm_and_torch_say_the_same_with_an_adapter(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "Qwen3", "ascii", head_dim=32)
    weights = matrices({"model.layers.0.self_attn.o_proj": (32, 128), "model.layers.1.mlp.down_proj": (32, 64)})
    folder = write(tmp_path / "adapter", base, {name: matrix / 4 for name, matrix in weights.items()})
    request = Request(Prompt.of([Message("user", "Hi")]), Sampling(temperature=0.0, max_tokens=8))

    async def said(spec: str) -> str:
        async with ModelPool() as pool:
            engine = pool.engine(spec)
            assert isinstance(engine, Generates)
            return "".join([completion.text async for completion in engine.generate([request])])

    texts = [asyncio.run(said(f"{model},engine={name}")) for model in (folder, base) for name in ("vllm", "torch")]
    assert texts[0] == texts[1] != texts[2] == texts[3]
