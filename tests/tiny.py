"""Small tokenizers and randomly initialised models for the tests: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bon.engines.loading import empty_model

torch.set_num_threads(1)  # for models this small a second thread only waits

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles!') }}"
    "{% endif %}{% endfor %}"
)
CORPUS = [
    "Write a haiku about the autumn rain, please.",
    "Dear Anna,\n\nthank you for the lovely evening.\n\n\nYours, Tom",
    "system user assistant model You are a helpful assistant.",
    "What is 12 + 30?  It is 42. Ja, natürlich: schön!",
] * 20


def _byte_level(special: list[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(
        Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        "isolated",
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(special)
    return tokenizer


def _sentencepiece_like(special: list[AddedToken], prepend: str) -> Tokenizer:
    """BPE over text whose spaces are ``▁``, with bytes for unknown characters, as in Gemma, Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    if prepend == "always":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    elif prepend == "never":
        tokenizer.normalizer = space
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = [] if prepend == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    names = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator([t.replace(" ", " ▁") for t in CORPUS], trainer)
    layout = json.loads(tokenizer.to_str())
    layout["added_tokens"] = layout["added_tokens"][:1]  # the bytes are ordinary vocabulary, as in the real ones
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.add_tokens(special)
    return tokenizer


def _ascii() -> Tokenizer:
    """One token per printable character: every text has exactly one encoding."""
    vocabulary = {char: i for i, char in enumerate("\n" + "".join(map(chr, range(32, 127))))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(_special("<|im_start|>", "<|im_end|>"))
    return tokenizer


def _special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def _wordpiece() -> Tokenizer:
    """Lower-cases, with [CLS] and [SEP], as BERT's."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def tokenizer(kind: str) -> Any:
    """A small tokenizer with the chat template of a family (ascii, chatml, llama3, gemma, ...), or BERT's wordpiece."""
    if kind == "ascii":
        wrapped = PreTrainedTokenizerFast(tokenizer_object=_ascii(), eos_token="<|im_end|>")
        wrapped.chat_template = CHATML
    elif kind == "wordpiece":
        wrapped = transformers.BertTokenizerFast(tokenizer_object=_wordpiece(), model_max_length=128)
    elif kind in ("chatml", "bare"):
        plain = [AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>", "<tool_call>")]
        backend = _byte_level([*_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), *plain])
        wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        wrapped.chat_template = CHATML if kind == "chatml" else None
    elif kind == "llama3":
        names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(_special(*names)), bos_token=names[0], eos_token=names[1]
        )
        wrapped.chat_template = LLAMA3
    elif kind == "gemma":
        added = _special("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
        spaces = [AddedToken(t, special=False, normalized=False) for t in ("\n\n", "\n\n\n", "▁▁")]
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=_sentencepiece_like([*added, *spaces], "never"),
            bos_token="<bos>",
            eos_token="<eos>",
            unk_token="<unk>",
        )
        wrapped.chat_template = GEMMA
    else:
        names = ("<s>", "</s>", *(("[INST]", "[/INST]") if kind == "metaspace" else ()))
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=_sentencepiece_like(_special(*names), "always" if kind == "mistral" else "first"),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        )
        wrapped.chat_template = MISTRAL
    return wrapped


def model(family: str, tokenizer: Any, seed: int = 0, **changes: Any) -> Any:
    """A randomly initialised float32 model of a family ("Llama", "Qwen3", ...), as wide as a test can afford."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "tie_word_embeddings": True,
        "initializer_range": 0.15 if family.startswith("Gemma") else 0.4,  # Gemma scales its embeddings up
    }
    prefix = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **changes})
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    return made.eval()


def save(folder: Any, family: str = "Llama", kind: str = "chatml", **changes: Any) -> Any:
    """Write a random model and its tokenizer to a folder and return the folder."""
    made_tokenizer = tokenizer(kind)
    made_tokenizer.save_pretrained(folder)
    model(family, made_tokenizer, **changes).save_pretrained(folder)
    return folder


def save_classifier(
    folder: Any, family: str, tokenizer: Any, head: str = "SequenceClassification", **changes: Any
) -> Any:
    """Write a random model with a classification head and its tokenizer to a folder and return the folder."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.4,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "DebertaV2":
        sizes |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        sizes |= {"type_vocab_size": 0}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    tokenizer.save_pretrained(folder)
    getattr(transformers, f"{family}For{head}")(config).eval().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Any, *, rank: int = 4, size: float = 1.0, seed: int = 0, name: str = "") -> Path:
    """Write a random LoRA adapter for all linear layers of a model but its last, as PEFT writes it."""
    config = transformers.AutoConfig.from_pretrained(base)
    made = torch.Generator().manual_seed(seed)
    weights = {}
    for layer, module in empty_model(config).named_modules():
        if isinstance(module, torch.nn.Linear) and layer != "lm_head":
            down = torch.randn(rank, module.in_features, generator=made) / module.in_features**0.5
            weights[f"base_model.model.{layer}.lora_A.weight"] = down
            up = torch.randn(module.out_features, rank, generator=made) * size / rank**0.5
            weights[f"base_model.model.{layer}.lora_B.weight"] = up
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": name or str(base)}
    targets = sorted({key.split(".")[-3] for key in weights})
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": targets}))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder
