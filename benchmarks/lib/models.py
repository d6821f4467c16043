"""What is timed: randomly initialised models of a given shape, and text of a given length.

Random models say nothing sensible and never end a completion by themselves: what they cost is what counts, and every
run of them decodes the same number of tokens.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bon.bench.harness import shape_of
from bon.engines.loading import load_config
from bon.errors import InputError, UnknownNameError
from bon.models import MINI, Model

CONTEXT = 8192

# Shapes as published, vocabulary included. Input and output embeddings are not tied: see ``random_model``.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-4.7m": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 928,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "llama-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3-4b": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def random_model(
    folder: Path, shape: str = "llama-4.7m", *, tokenizer: str | Path | None = None, seed: int = 0, **changes: Any
) -> Path:
    """Write a randomly initialised model with a tokenizer to a folder, in float32 on CPU or bfloat16 on a GPU.

    Only ordinary tokens of the tokenizer can be sampled: the output rows of all others are zero, and the rest are
    scaled so that zero is far below the likeliest. Text therefore round-trips, and no completion ends early.

    Args:
        folder: where to; made if it is not there.
        shape: a key of ``SHAPES``.
        tokenizer: folder or name; None for the mini model's.
        seed: of the weights.
        changes: fields of the configuration that replace the shape's.

    Raises:
        UnknownNameError: no such shape.
    """
    if shape not in SHAPES:
        raise UnknownNameError("model shape", shape, SHAPES)
    if tokenizer is None:
        from bon.mini import WEIGHTS

        tokenizer = WEIGHTS
    words = AutoTokenizer.from_pretrained(tokenizer)
    fields = {**SHAPES[shape], "max_position_embeddings": CONTEXT, "tie_word_embeddings": False, **changes}
    fields["vocab_size"] = max(fields["vocab_size"], len(words))
    ends = {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "pad_token_id": words.pad_token_id}
    config_class, model_class = (
        (LlamaConfig, LlamaForCausalLM) if shape.startswith("llama") else (Qwen3Config, Qwen3ForCausalLM)
    )
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = model_class(config_class(**fields, **ends))
    with torch.no_grad():
        head = model.lm_head.weight
        special = sorted({*words.all_special_ids, *words.added_tokens_decoder})
        head.mul_(8.0 / (head.std() * fields["hidden_size"] ** 0.5))  # logits with a standard deviation of about 8
        head[len(words) :] = 0
        head[special] = 0
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def dummy_model(folder: Path, config: str | Path, *, tokenizer: str | Path | None = None) -> Path:
    """Write a folder with a configuration and a tokenizer and no weights: vLLM's ``load_format="dummy"`` makes them up.

    Args:
        folder: where to; made if it is not there.
        config: a key of ``SHAPES``, a ``config.json``, or a folder that holds one.
        tokenizer: folder or name; None for the mini model's, which is small but enough to make and read text.

    Raises:
        UnknownNameError: neither a shape nor a file or folder.
        InputError: a file that is no configuration of a model that is known here.
    """
    from bon.mini import WEIGHTS

    words = AutoTokenizer.from_pretrained(tokenizer or WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    if str(config) in SHAPES:
        shape = str(config)
        fields = {**SHAPES[shape], "max_position_embeddings": CONTEXT, "tie_word_embeddings": True}
        written = (LlamaConfig if shape.startswith("llama") else Qwen3Config)(**fields, dtype="bfloat16")
        written.architectures = ["LlamaForCausalLM" if shape.startswith("llama") else "Qwen3ForCausalLM"]
    elif Path(config).exists():
        try:
            written = AutoConfig.from_pretrained(config)
        except (OSError, ValueError) as error:
            raise InputError(f"{str(config)!r} is no configuration of a model: {str(error).splitlines()[0]}") from error
    else:
        raise UnknownNameError("model shape, and there is no such file or folder:", str(config), SHAPES)
    text = written.get_text_config(decoder=True)
    text.vocab_size = max(text.vocab_size, len(words))
    written.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def describe(model: str | Path | None) -> dict[str, Any]:
    """Name, size and shape of a model, for the conditions card. Nothing is loaded but its configuration."""
    from bon.mini import WEIGHTS

    name = "bon's mini model" if model is None else Path(model).name
    return {"model": name, **shape_of(load_config(model or WEIGHTS))}


def model_of(folder: str | Path | None, options: argparse.Namespace, **more: Any) -> Model:
    """A model on the engine, device and dtype that the command line asks for; ``more`` are options of the engine."""
    engine = getattr(options, "engine", "torch")
    device = {"device": options.device} if engine == "torch" and options.device else {}
    return Model(MINI if folder is None else str(folder), engine, {"dtype": options.dtype, **device, **more})


class Filler:
    """Makes text of an exact number of tokens, from words that are one token each with the space before them.

    Args:
        tokenizer: a transformers tokenizer.
        seed: of the choice of words.
    """

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._words = single_token_words(tokenizer)

    def __call__(self, tokens: int) -> str:
        """As many words as tokens are asked for; the text starts with a space."""
        return "".join(self._random.choices(self._words, k=tokens))


def word_ids(tokenizer: Any, most: int = 64) -> list[int]:
    """Token ids of ``single_token_words``: whatever is made of them round-trips through text, and ends nothing."""
    return [
        int(tokenizer.encode("." + word, add_special_tokens=False)[-1]) for word in single_token_words(tokenizer, most)
    ]


def single_token_words(tokenizer: Any, most: int = 500) -> Sequence[str]:
    """Words (" garden") that a tokenizer encodes as one token."""
    words: list[str] = []
    for index in range(len(tokenizer)):
        text = tokenizer.decode([index])
        if re.fullmatch(r" ?[A-Za-z]+", text):
            word = " " + text.strip()
            if tokenizer.encode("a" + word * 2, add_special_tokens=False)[1:] == [index, index]:
                words.append(word)
                if len(words) == most:
                    break
    if not words:
        raise ValueError("the tokenizer has no words that are one token")
    return words
