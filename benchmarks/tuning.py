"""How fast is ``bon train flip`` beside TRL's SFTTrainer? The same pairs, model and LoRA settings, without contrast.

TRL (pip install trl) trains on the same prompts and instructions, the instruction's tokens only, in float32, without
gradient checkpointing, which would cost it time. Loading and writing are not timed.

    python benchmarks/tuning.py --model smollm2-135m --pairs pairs.jsonl --rounds 3
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from bon.bench.harness import Pairs, Report, conditions, interleave
from bon.engines.loading import load
from bon.engines.text.render import Renderer
from bon.errors import InputError, MissingExtraError
from bon.models import Model, weights_of
from bon.scorers.likelihood import BackwardLikelihood
from bon.tuning.encoding import encode
from bon.tuning.pairs import Pair, read_pairs
from bon.tuning.settings import Settings
from bon.tuning.training import Training
from lib.scripts import parser, script


def main(argv: list[str] | None = None) -> None:
    """Train in turn; print a table and one JSON object."""
    options = _options(argv)
    pairs = [pair for pair in read_pairs(str(options.pairs)) if len(pair.response.split()) <= options.max_words]
    pairs = pairs[: options.batch if options.quick else options.count]
    if len(pairs) < options.batch:
        raise InputError(f"{options.pairs} has {len(pairs)} pairs of at most {options.max_words} words: too few.")
    torch.set_num_threads(options.threads)
    settings = Settings(batch=options.batch, seed=options.seed)
    tokens = sum(_tokens(pairs, options.model))
    sides = {"bon": lambda _: _bon(pairs, settings, options), "TRL": lambda _: _trl(pairs, settings, options)}
    timed = interleave(sides, options.rounds, warmup=0, label="tuning")
    rates = {name: [tokens / one.value for one in found] for name, found in timed.items()}
    report = Report("tuning", conditions(model=options.model, pairs=len(pairs), tokens=tokens, batch=options.batch))
    case = Pairs("train", {"pairs": len(pairs)}, ("bon", "TRL"), rates["bon"], rates["TRL"], "tokens/s")
    report.rows.append(case.to_dict())
    report.ratios["vs_trl"] = case.ratio
    report.emit(options.out)


def _tokens(pairs: list[Pair], model: str) -> list[int]:
    _, tokenizer = load(weights_of(Model.of(model)))
    scorer, renderer = BackwardLikelihood(), Renderer(tokenizer)
    return [found.length for pair in pairs if (found := encode(pair, scorer, renderer)) is not None]


def _bon(pairs: list[Pair], settings: Settings, options: argparse.Namespace) -> float:
    with TemporaryDirectory() as folder:
        model = Model.of(options.model)
        training = Training(model, weights_of(model), pairs, Path(folder, "adapter"), settings, options.threads)
        started = perf_counter()
        training.run()
        return perf_counter() - started


def _trl(pairs: list[Pair], settings: Settings, options: argparse.Namespace) -> float:
    try:
        from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise MissingExtraError("TRL, which is compared with,", "pip install trl") from error
    from datasets import Dataset
    from peft import LoraConfig

    model, tokenizer = load(weights_of(Model.of(options.model)))
    scorer = BackwardLikelihood(style=settings.style)
    rows: list[dict[str, Any]] = [
        {
            "prompt": [turn.to_dict() for turn in scorer.style.prompt(pair.task, pair.response, scorer.template).turns],
            "completion": [{"role": "assistant", "content": pair.instruction}],
        }
        for pair in pairs
    ]
    lora = LoraConfig(task_type="CAUSAL_LM", r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
    with TemporaryDirectory() as folder:
        how = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=options.trl_batch,
            gradient_accumulation_steps=settings.batch // options.trl_batch,
            num_train_epochs=1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
            train_sampling_strategy="group_by_length",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=settings.seed,
        )
        trainer = SFTTrainer(
            model, args=how, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
        )
        started = perf_counter()
        trainer.train()
        return perf_counter() - started


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--model", default="mini", help="the base")
    options.add_argument("--pairs", type=Path, required=True, help="as bon pairs writes them")
    options.add_argument("--count", type=int, default=64, help="pairs that are read")
    options.add_argument("--max-words", type=int, default=100, help="of a response")
    options.add_argument("--batch", type=int, default=16, help="pairs of a step")
    options.add_argument("--trl-batch", type=int, default=4, help="pairs that TRL reads at once; divides --batch")
    options.add_argument("--rounds", type=int, default=3, help="of both")
    options.add_argument("--threads", type=int, default=2, help="of the arithmetic")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
