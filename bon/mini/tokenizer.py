"""The mini model's tokenizer: byte-level BPE trained on the mini world, and its ChatML template.

Any text round-trips, since unknown words fall back to bytes. A word and the space before it are one token wherever the
vocabulary has the word, so values are copied as single tokens; digits and white space are tokens of their own.
"""

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bon.mini.examples import BACKWARD_SYSTEM, BACKWARD_USER
from bon.mini.lexicon import LEXICON
from bon.mini.tasks import instruction, response, sample_task

PAD, _, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_PIECES = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s")
_LEXICON_REPEATS = 40  # enough for every word of the lexicon to be merged into one token


def _corpus(tasks: int, rng: random.Random) -> list[str]:
    """Both sides of training tasks, the words of the lexicon, and the fixed text of every prompt."""
    texts = []
    for _ in range(tasks):
        task = sample_task(rng, "train")
        texts += [instruction(task), response(task, rng)]
    texts += [f" {value}" for values in LEXICON.values() for value in values] * _LEXICON_REPEATS
    texts += ["system\n", "user\n", "assistant\n", BACKWARD_SYSTEM, BACKWARD_USER] * tasks
    return texts


def build_tokenizer(
    seed: int = 0, vocab_size: int = 2048, tasks: int = 20_000, max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same arguments give the same tokenizer.

    Arguments:
        seed: which tasks it is trained on.
        vocab_size: entries at most, the 256 bytes and 3 special tokens included.
        tasks: size of the corpus.
        max_length: context length of the model, in tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(tasks, random.Random(seed)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
