"""The embedded model: a small world of writing tasks, and a one-million-parameter model trained on it.

`tasks` is the world (instructions, right answers, verifier), `train` makes the model, `weights/` holds it in
Hugging Face format. Importing this package loads neither torch nor the weights.
"""

from pathlib import Path

WEIGHTS: Path = Path(__file__).parent / "weights"
"""Folder of the embedded model: loads with `AutoModelForCausalLM.from_pretrained(WEIGHTS)`."""


def shown_name(model: str | Path) -> str:
    """What messages and tables call a model: its name or folder, "mini" for the embedded one."""
    return "mini" if Path(model) == WEIGHTS else str(model)


__all__ = ["WEIGHTS", "shown_name"]
