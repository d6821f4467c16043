"""Hidden states of responses: one plain pass of transformers over padded rows, nothing generated, nothing shared."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bon.engines.base import Reading
from bon.engines.torch.rows import Ids
from bon.errors import EngineError

_SEEN = 64  # numbers of each weight that the fingerprint looks at


def fingerprint(model: Any, tokenizer: str) -> str:
    """Tell a model from every other by some numbers of each weight, rounded to bfloat16: dtypes and devices agree.

    Args:
        model: of transformers, its weights where transformers put them.
        tokenizer: fingerprint of its tokenizer.
    """
    return _fingerprint(model.named_parameters(), tokenizer)


def fingerprint_on_disk(skeleton: Any, folder: str | Path, tokenizer: str) -> str | None:
    """The same of a model that is not loaded here; None where its files do not name its weights as it does.

    Args:
        skeleton: the model without its weights.
        folder: its safetensors.
        tokenizer: see ``fingerprint``.
    """
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(file, "pt")) for file in Path(folder).glob("*.safetensors")]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        names = [name for name, _ in skeleton.named_parameters()]
        if not where.keys() >= {*names}:
            return None
        return _fingerprint(((name, where[name].get_tensor(name)) for name in names), tokenizer)


def _fingerprint(weights: Iterable[tuple[str, torch.Tensor]], tokenizer: str) -> str:
    digest = hashlib.blake2b(tokenizer.encode(), digest_size=12)
    for name, weight in weights:
        some = weight.detach().reshape(-1)[:: max(1, weight.numel() // _SEEN)]
        digest.update(f"{name} {tuple(weight.shape)} ".encode())
        digest.update(some.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def in_batches(rows: Mapping[int, Ids], most: int) -> Iterator[list[int]]:
    """What is about equally long together; in whichever order the rows came, the same run together.

    Args:
        rows: token ids, by their name.
        most: tokens of a batch, padding included; a longer row is alone.
    """
    batch: list[int] = []
    for i in sorted(rows, key=lambda i: (len(rows[i]), rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> torch.Tensor:
    """Rows with ``fill`` behind their ends: shape (rows, longest)."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def read(model: Any, rows: Sequence[Ids], starts: Sequence[int], layers: Sequence[int]) -> Iterator[Reading]:
    """Read some rows in one pass.

    Rows are padded behind their ends. A causal model never looks ahead, so no token that counts sees the padding, and
    positions are what they would be alone.

    Args:
        model: a causal language model of transformers.
        rows: token ids of prompt and response.
        starts: index of the first token of each response; from there to the end is pooled.
        layers: whose states are pooled.
    """
    ids, mask = (padded(some, 0, model.device) for some in (rows, [(1,) * len(row) for row in rows]))
    accepted = inspect.signature(model.forward).parameters
    few = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **few).hidden_states
    for at, (row, first) in enumerate(zip(rows, starts, strict=True)):
        last = states[-1][at, len(row) - 1].float()
        pools = [states[layer][at, first : len(row)].float().mean(0) for layer in layers]
        found = torch.stack([*pools, last]).cpu().numpy()
        if torch.isfinite(torch.from_numpy(found)).all():
            yield Reading(found[:-1], found[-1], len(row))
        else:
            yield Reading.failed(EngineError("the model's hidden states are no finite numbers."))
