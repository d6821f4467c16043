"""Best-of-N reranking by backward inference (FLIP).

    from bon import BestOfN

    result = BestOfN()("Write a reminder for Anna to water the plants on Monday.")
    print(result.text, result.reward)

Importing bon imports neither torch nor transformers; models load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bon.adaptive import Adaptive as Adaptive
    from bon.best_of_n import BestOfN as BestOfN
    from bon.budget import Fixed as Fixed
    from bon.budget import Limited as Limited
    from bon.budget import StopAt as StopAt
    from bon.engines.base import Engine as Engine
    from bon.errors import BonError as BonError
    from bon.errors import InputError as InputError
    from bon.group import Group as Group
    from bon.models import ModelPool as ModelPool
    from bon.pipeline import score as score
    from bon.scorers.base import Scorer as Scorer
    from bon.scorers.flip import Flip as Flip
    from bon.scorers.function import RewardFunction as RewardFunction
    from bon.scorers.likelihood import BackwardLikelihood as BackwardLikelihood
    from bon.selectors import Softmax as Softmax
    from bon.selectors import TopK as TopK
    from bon.selectors import WeightedVote as WeightedVote
    from bon.task import Message as Message
    from bon.task import Task as Task
    from bon.types import Candidate as Candidate
    from bon.types import Result as Result
    from bon.types import Sampling as Sampling
    from bon.types import Score as Score

_HOMES = {
    "BestOfN": "bon.best_of_n",
    "Adaptive": "bon.adaptive",
    "Fixed": "bon.budget",
    "Limited": "bon.budget",
    "StopAt": "bon.budget",
    "Engine": "bon.engines.base",
    "Group": "bon.group",
    "ModelPool": "bon.models",
    "score": "bon.pipeline",
    "BonError": "bon.errors",
    "InputError": "bon.errors",
    "Scorer": "bon.scorers.base",
    "Flip": "bon.scorers.flip",
    "RewardFunction": "bon.scorers.function",
    "BackwardLikelihood": "bon.scorers.likelihood",
    "Softmax": "bon.selectors",
    "TopK": "bon.selectors",
    "WeightedVote": "bon.selectors",
    "Candidate": "bon.types",
    "Message": "bon.task",
    "Result": "bon.types",
    "Sampling": "bon.types",
    "Score": "bon.types",
    "Task": "bon.task",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bon' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
