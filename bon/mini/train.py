"""Train the embedded model: `python -m bon.mini.train --out DIR`.

One decoder learns both directions from examples generated on the fly, so no example is ever repeated on purpose. The
layer matrices are trained with Muon, the rest with AdamW, in float32; the weights are saved in bfloat16. The same
recipe on the same machine, with the same number of threads, gives the same weights.

Writes to the output folder: the model and tokenizer in Hugging Face format, `recipe.json`, `loss.jsonl`, and
`loss.png` if matplotlib is installed. Other files there stay. It refuses a folder that already holds a model unless
told `--overwrite`; in particular it never touches `bon/mini/weights` by itself.
"""

import argparse
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bon.mini.examples import Example, training_examples
from bon.mini.tokenizer import build_tokenizer

IGNORE = -100  # cross_entropy's own "no target here"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what comes out of training."""

    steps: int = 3000
    tokens_per_step: int = 3000
    seed: int = 0
    threads: int = 1
    drop: float = 0.5
    alter: float = 0.03
    matrix_lr: float = 0.02
    other_lr: float = 0.004
    hidden: int = 128
    layers: int = 4
    mlp: int = 384
    head: int = 32
    vocab: int = 2048
    context: int = 1024
    corpus_tasks: int = 20_000


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and next-token targets, both int64 of shape [rows, length]; IGNORE outside the target text."""

    ids: torch.Tensor
    targets: torch.Tensor


# --- Data ------------------------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[tuple[list[int], list[int]]]:
    """Each example as (prompt ids, target ids and the end token)."""
    texts = sorted({piece for example in examples for piece in (*example.prompt, example.target)})
    ids = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
    return [
        ([token for piece in example.prompt for token in ids[piece]], [*ids[example.target], tokenizer.eos_token_id])
        for example in examples
    ]


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, pool: int = 2048) -> Iterator[Batch]:
    """Endless batches of at most `tokens_per_step` tokens (padding included), rows of similar length together."""
    rng = random.Random(recipe.seed)
    examples = training_examples(rng, recipe.drop, recipe.alter)
    while True:
        rows = sorted(encode(tokenizer, list(itertools.islice(examples, pool))), key=lambda row: len(row[0] + row[1]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for prompt, target in rows:
            if (len(groups[-1]) + 1) * len(prompt + target) > recipe.tokens_per_step:
                groups.append([])
            groups[-1].append((prompt, target))
        rng.shuffle(groups)
        for group in filter(None, groups):
            yield _pad(group, tokenizer.pad_token_id)


def _pad(rows: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    length = max(len(prompt) + len(target) for prompt, target in rows)
    ids = torch.full((len(rows), length), pad)
    targets = torch.full((len(rows), length), IGNORE)
    for row, (prompt, target) in enumerate(rows):
        ids[row, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        # Position i predicts token i + 1.
        targets[row, len(prompt) - 1 : len(prompt) + len(target) - 1] = torch.tensor(target)
    return Batch(ids, targets)


# --- Model and optimizers --------------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Any:
    """A fresh Qwen3-layout decoder in float32."""
    heads = recipe.hidden // recipe.head
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=recipe.head,
        max_position_embeddings=recipe.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.3)  # what each layer adds starts small
    return model


def build_optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    parameters = list(model.named_parameters())
    matrices = [weight for name, weight in parameters if weight.ndim == 2 and ".layers." in name]
    others = [weight for name, weight in parameters if not (weight.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.02),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def lr_factor(step: int, steps: int, warmup: int = 30) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine down to 3%."""
    return min(1.0, (step + 1) / warmup) * (0.03 + 0.97 * (1 + math.cos(math.pi * step / steps)) / 2)


# --- The loop --------------------------------------------------------------------------------------------------------


def train(out: Path, recipe: Recipe, *, overwrite: bool = False, progress: bool = True) -> list[float]:
    """Train a model, save it to `out`, and return the loss of every step (nats per target token).

    Raises:
        FileExistsError: `out` already holds a model and `overwrite` is not set.
    """
    if (out / "model.safetensors").exists() and not overwrite:
        raise FileExistsError(f"{out} already holds a model: choose another folder, or pass --overwrite to replace it")
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe.seed, recipe.vocab, recipe.corpus_tasks, recipe.context)
    model = build_model(tokenizer, recipe)
    optimizers = build_optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, recipe.steps))
        for optimizer in optimizers
    ]

    losses: list[float] = []
    bar = tqdm(batches(tokenizer, recipe), total=recipe.steps, disable=not progress, unit="step")
    for batch in itertools.islice(bar, recipe.steps):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # [rows, length, hidden]
        wanted = batch.targets != IGNORE
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), batch.targets[wanted])
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.3f}")
    bar.close()
    save(out, model, tokenizer, recipe, losses)
    return losses


def save(out: Path, model: Any, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, losses: list[float]) -> None:
    """Write the model in Hugging Face format, its recipe and its loss curve."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that only transformers 5 knows; this one loads everywhere.
    config = json.loads((out / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    window = 20  # steps per line
    ends = range(window, len(losses) + 1, window)
    means = [(end, sum(losses[end - window : end]) / window) for end in ends]
    lines = [json.dumps({"step": step, "loss": round(loss, 4)}) for step, loss in means]
    (out / "loss.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if means:
        plot_loss(out / "loss.png", means)


def plot_loss(path: Path, means: Sequence[tuple[int, float]]) -> None:
    """Draw a loss by step, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*means, strict=True), linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per target token)", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Command line; every field of `Recipe` is an option."""
    parser = argparse.ArgumentParser(prog="python -m bon.mini.train", description="Train the embedded mini model.")
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="folder to write (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in that folder")
    for option in fields(Recipe):
        kind = type(option.default)
        name = "--" + option.name.replace("_", "-")
        parser.add_argument(name, type=kind, default=option.default, help="default: %(default)s")
    options = vars(parser.parse_args(argv))
    out, overwrite = options.pop("out"), options.pop("overwrite")
    try:
        losses = train(out, Recipe(**options), overwrite=overwrite)
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 2
    tail = losses[-200:]
    print(f"wrote {out}: loss {sum(tail) / max(1, len(tail)):.4f} over the last {len(tail)} steps", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
