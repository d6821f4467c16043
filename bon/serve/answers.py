"""A result, as OpenAI's response: whole, or as a stream of chunks.

Whoever reads only OpenAI's fields sees an ordinary completion. What a stream tells of its progress comes in chunks
with an empty delta, so that no client has to know of it.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import orjson

from bon.serve.failures import ApiError, bad
from bon.serve.plan import Plan
from bon.similarity import matched_words
from bon.task import canonical_calls
from bon.types import Candidate, Result, Score, Usage

DONE = b"data: [DONE]\n\n"
_PIECE = re.compile(r"\s*\S{1,24}\s*|\s+")


class Answer:
    """Builds what is sent for one request.

    Args:
        plan: what was asked for.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.id = ("chatcmpl-" if plan.chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())

    def whole(self, result: Result, queue_s: float) -> dict[str, Any]:
        """The response in one piece."""
        return {
            **self._head("chat.completion" if self._plan.chat else "text_completion"),
            "choices": [self._choice(place, pick, result) for place, pick in enumerate(self._picks(result))],
            "usage": usage_body(result.usage),
            "best_of_n": self._evidence(result, queue_s),
        }

    def opening(self) -> bytes:
        """The first chunk of a stream."""
        return self._chunk({"role": "assistant", "content": ""} if self._plan.chat else "")

    def progress(self, about: dict[str, Any]) -> bytes:
        """A chunk that tells of the work; its delta is empty."""
        return self._chunk({} if self._plan.chat else "", best_of_n=about)

    def news(self, event: Candidate | Score) -> dict[str, Any]:
        """A candidate that was finished or scored."""
        if isinstance(event, Candidate):
            return {
                "event": "candidate",
                "index": event.index,
                "text": event.text,
                "finish_reason": _reason(event),
                "completion_tokens": event.completion_tokens,
                "sampled_s": event.finished,
            }
        return {"event": "score", **self._score(event)}

    def closing(self, result: Result, queue_s: float) -> Iterator[bytes]:
        """The winner's chunks, the evidence, the usage, the end."""
        picks = self._picks(result)
        for place, pick in enumerate(picks):
            if place and self._plan.chat:
                yield self._chunk({"role": "assistant", "content": ""}, place)
            for piece in _PIECE.findall(_content(pick) or "") if pick else ():
                yield self._chunk({"content": piece} if self._plan.chat else piece, place)
            if pick and pick.tool_calls and self._plan.chat:
                calls = [{"index": i, **call} for i, call in enumerate(pick.tool_calls)]
                yield self._chunk({"tool_calls": calls}, place)
            if pick is None and self._plan.chat:
                yield self._chunk({"refusal": result.selection.reason}, place)
            evidence = {"best_of_n": self._evidence(result, queue_s)} if place == len(picks) - 1 else {}
            yield self._chunk({} if self._plan.chat else "", place, _ended(pick), self._logprobs(pick), **evidence)
        if self._plan.stream_usage:
            yield _event({**self._head(self._kind), "choices": [], "usage": usage_body(result.usage)})
        yield DONE

    def _picks(self, result: Result) -> list[Candidate | None]:
        """The candidates to return, best first; None for an answer that is refused.

        Without any reward (all of them late or unparsable) the first finished text is better than nothing, and the
        evidence says what it is. Where a minimum was asked for there is no answer instead.

        Raises:
            ApiError: 408 when the deadline passed before any candidate was finished.
        """
        if result.best is None and (self._plan.min_reward or any(s.reward is not None for s in result.scores)):
            return [None] * self._plan.k
        unfinished = {
            c.index for c in result.candidates if c.error is not None or result.scores[c.index].status == "late"
        }
        unfinished = {index for index in unfinished if not _text(result, index)}
        if len(unfinished) == len(result.candidates):
            said = f"the deadline of {self._plan.deadline_s:g} s passed before any candidate was finished."
            raise ApiError(408, said, "deadline_exceeded", "best_of_n.deadline_s")
        order = [i for i in result.selection.ranking if i != result.best and i not in unfinished]
        if result.best is None:
            order.sort(key=lambda i: not _text(result, i).strip())
        picks = [result.candidates[i] for i in ([] if result.best is None else [result.best]) + order]
        return [*picks[: self._plan.k]]

    def _choice(self, place: int, pick: Candidate | None, result: Result) -> dict[str, Any]:
        ended: dict[str, Any] = {"index": place, "logprobs": self._logprobs(pick), "finish_reason": _ended(pick)}
        if not self._plan.chat:
            return {**ended, "text": pick.text if pick else ""}
        message: dict[str, Any] = {
            "role": "assistant",
            "content": _content(pick) if pick else None,
            "refusal": None if pick else result.selection.reason,
        }
        if pick and pick.tool_calls:
            message["tool_calls"] = list(pick.tool_calls)
        return {**ended, "message": message}

    def _logprobs(self, pick: Candidate | None) -> dict[str, Any] | None:
        """The answer's tokens with their log-probabilities; in a stream they come with the end of the answer.

        Raises:
            ApiError: 400 when the policy does not tell them.
        """
        if pick is None or not self._plan.logprobs:
            return None
        if pick.logprobs is None:
            raise bad("logprobs", "the policy does not tell them.", "unsupported_parameter")
        spoken = _spoken(pick, pick.logprobs)
        if self._plan.chat:
            content = [
                {"token": piece, "logprob": logprob, "bytes": _bytes(piece), "top_logprobs": []}
                for piece, logprob in spoken
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [piece for piece, _ in spoken],
            "token_logprobs": [logprob for _, logprob in spoken],
            "top_logprobs": None,
            "text_offset": [*accumulate((len(piece) for piece, _ in spoken[:-1]), initial=0)] if spoken else [],
        }

    def _evidence(self, result: Result, queue_s: float) -> dict[str, Any]:
        rewards = [s.reward for s in result.scores if s.reward is not None]
        timing, late = result.timing, [s for s in result.scores if s.status == "late"]
        picks = [self._about(pick, result, text=False) for pick in self._picks(result) if pick]
        everything = (
            [self._about(candidate, result) for candidate in result.candidates]
            if self._plan.return_candidates
            else None
        )
        return {
            "n": len(result.candidates),
            "scorer": self._plan.scorer,
            "instruction": result.task.instruction,
            "best": result.best,
            "reward": result.reward,
            "mean_reward": sum(rewards) / len(rewards) if rewards else None,
            "reason": result.selection.reason or (self._late if late else None),
            "deadline_passed": bool(late),
            "statuses": result.counts,
            "choices": picks,
            **({} if everything is None else {"candidates": everything}),
            "timing": {
                "queue_s": queue_s,
                "sample_s": timing.sample,
                "score_s": timing.score,
                "overlap_s": timing.overlap,
                "total_s": queue_s + timing.total,
            },
        }

    def _about(self, candidate: Candidate, result: Result, text: bool = True) -> dict[str, Any]:
        left_out = ("event",) if text else ("event", "text")
        sampled = {name: value for name, value in self.news(candidate).items() if name not in left_out}
        return self._score(result.scores[candidate.index]) | sampled

    def _score(self, score: Score) -> dict[str, Any]:
        matched = matched_words(score.inferred, self._plan.task.instruction) if score.inferred else []
        return {
            "index": score.candidate,
            "reward": score.reward,
            "status": score.status,
            "inferred": score.inferred,
            "matched": matched,
            "precision": score.precision,
            "recall": score.recall,
            "upper_bound": score.upper_bound,
            "reason": score.reason,
            "same_as": score.same_as,
            "scored_s": (score.started, score.finished) if score.finished else None,
        }

    @property
    def _late(self) -> str:
        return f"the deadline of {self._plan.deadline_s:g} s passed; this is the best of what was there."

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._plan.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._plan.model}

    def _chunk(
        self, delta: Any, place: int = 0, finish_reason: str | None = None, logprobs: Any = None, **more: Any
    ) -> bytes:
        content = {"delta": delta} if self._plan.chat else {"text": delta}
        choice = {"index": place, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return _event({**self._head(self._kind), "choices": [choice], **more})


def failure(error: ApiError) -> bytes:
    """An error inside a stream that is already open."""
    return _event(error.body)


def usage_body(usage: Usage) -> dict[str, Any]:
    """Tokens in OpenAI's shape: cached ones are part of the prompt's, as OpenAI counts them."""
    policy, scorer = usage.policy_prompt_tokens, usage.scorer_prompt_tokens
    policy_new, scorer_new = usage.policy_completion_tokens, usage.scorer_completion_tokens
    return {
        "prompt_tokens": policy + scorer,
        "completion_tokens": policy_new + scorer_new,
        "total_tokens": policy + scorer + policy_new + scorer_new,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "policy": {"prompt_tokens": policy, "completion_tokens": policy_new},
        "scorer": {"prompt_tokens": scorer, "completion_tokens": scorer_new},
    }


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _text(result: Result, index: int) -> str:
    return result.candidates[index].text


def _reason(candidate: Candidate) -> str | None:
    return None if candidate.finish_reason == "pruned" else candidate.finish_reason


def _spoken(pick: Candidate, logprobs: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The tokens of the answer's text: no special ones, and none past a stop string."""
    spoken = [(piece, logprob) for piece, logprob in logprobs if piece]
    said = "".join(piece for piece, _ in spoken)
    if said.startswith(pick.text):
        surplus = len(said) - len(pick.text)
        while spoken and len(spoken[-1][0]) <= surplus:
            surplus -= len(spoken.pop()[0])
    return spoken


def _bytes(piece: str) -> list[int] | None:
    """UTF-8 of a token; None for one that holds a part of a character."""
    return None if "\ufffd" in piece else list(piece.encode())


def _content(pick: Candidate) -> str | None:
    """The text without the canonical form of its tool calls, which is there to be scored."""
    if not pick.tool_calls:
        return pick.text
    return pick.text.removesuffix(canonical_calls(pick.tool_calls)).removesuffix("\n") or None


def _ended(pick: Candidate | None) -> str:
    if pick and pick.tool_calls:
        return "tool_calls"
    return "length" if pick and pick.finish_reason == "length" else "stop"
