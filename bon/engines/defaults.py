"""How a model's own ``generation_config.json`` wants it sampled, where nobody says otherwise.

It says temperature, top-p, top-k, min-p and a repetition penalty. Whether to sample at all (``do_sample``) is not
asked, and a temperature of 0 is left out: best-of-N needs candidates that differ, so a model that would rather be
greedy is sampled at temperature 1. Greedy decoding is what a caller says, as scorers do, and then none of this applies.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from bon.errors import InputError
from bon.types import Drawing, Sampling

log = logging.getLogger("bon")

PENALTY = "repetition_penalty"
_GREEDY = 1e-5  # a temperature below which the likeliest token is all that is ever drawn


def own_drawing(name: str, config: Mapping[str, Any], *, penalises: bool) -> tuple[Drawing, float | None]:
    """A model's own way to draw tokens, and its repetition penalty; what they change is said once in the log.

    Args:
        name: the model's.
        config: what its generation_config.json holds.
        penalises: whether the engine knows repetition penalties.
    """
    said: dict[str, Any] = {}
    for field in Drawing._fields:
        with suppress(InputError):  # a file that nobody has checked
            if (value := getattr(Sampling.of({field: config.get(field)}), field)) is not None:
                said[field] = value
    if said.get("temperature", 1) < _GREEDY:
        del said["temperature"]
    penalty = config.get(PENALTY)
    if not isinstance(penalty, int | float) or penalty <= 0 or penalty == 1:
        penalty = None
    changed = {field: value for field, value in said.items() if value != getattr(Drawing(), field)}
    applied = changed | ({PENALTY: penalty} if penalty and penalises else {})
    if applied:
        shown = ", ".join(f"{field}={value:g}" for field, value in applied.items())
        log.info("%s is sampled as its generation_config.json says, unless you say otherwise: %s", name, shown)
    if penalty and not penalises:
        log.info("%s: the torch engine does not apply its repetition_penalty=%g; engine=vllm does", name, penalty)
    return Drawing(**said), penalty
