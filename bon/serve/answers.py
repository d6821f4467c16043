"""A result, as OpenAI's response: whole, or as a stream of chunks.

To a client that reads only OpenAI's fields it is an ordinary completion. A stream reports its progress in chunks with
an empty delta, which such clients pass over.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, cycle
from typing import Any

from bon.data.sink import to_json
from bon.serve.failures import ApiError, bad, public
from bon.serve.plan import Plan, Work
from bon.similarity import matched_words, missed_words
from bon.task import Task, without_calls
from bon.types import Candidate, Credit, Result, Score, Usage

DONE = b"data: [DONE]\n\n"
_PIECE = re.compile(r"\s*\S{1,24}\s*|\s+")


class Answer:
    """Builds what is sent for one request.

    Args:
        plan: what was asked for.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._chat, self._options = plan, plan.chat, plan.request.options
        self.id = ("chatcmpl-" if plan.chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._shown: dict[int, int] = {}  # characters of each candidate that the client has

    def whole(self, result: Result, queue_s: float) -> dict[str, Any]:
        """The response in one piece."""
        picks = self._picks(result)
        return {
            **self._head("chat.completion" if self._chat else "text_completion"),
            "choices": [self._choice(place, pick, result) for place, pick in enumerate(picks)],
            "usage": usage_body(result.usage),
            "best_of_n": self._evidence(result, picks, queue_s),
        }

    def opening(self) -> bytes:
        """The first chunk of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def progress(self, about: dict[str, Any]) -> bytes:
        """A chunk that reports on the work; its delta is empty."""
        return self._chunk({}, best_of_n=about)

    def news(self, event: Candidate | Score) -> dict[str, Any]:
        """A candidate that was finished or scored."""
        if isinstance(event, Candidate):
            return {"event": "candidate", **_sampled(event)}
        return {"event": "score", **scored(event, self._plan.task)}

    def growth(self, texts: Mapping[int, str]) -> Iterator[dict[str, Any]]:
        """What was added to the texts of candidates since the last time."""
        for index, text in list(texts.items()):
            if more := text[self._shown.get(index, 0) :]:
                self._shown[index] = len(text)
                yield {"event": "text", "index": index, "more": more}

    def closing(self, result: Result, queue_s: float) -> Iterator[bytes]:
        """The winner's chunks, the evidence, the usage, the end."""
        picks = self._picks(result)
        for place, pick in enumerate(picks):
            if self._chat and place:
                yield self._chunk({"role": "assistant", "content": ""}, place)
            for piece in _PIECE.findall(self._content(pick) or ""):
                yield self._chunk({"content": piece}, place)
            apart = _apart(pick, result) if self._chat else {}
            if calls := apart.get("tool_calls"):
                apart["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
            if any(apart.values()):
                yield self._chunk(apart, place)
            evidence = {"best_of_n": self._evidence(result, picks, queue_s)} if place == len(picks) - 1 else {}
            yield self._chunk({}, place, _ended(pick), self._logprobs(pick), **evidence)
        if self._plan.request.stream_options and self._plan.request.stream_options.include_usage:
            yield _event({**self._head(self._kind), "choices": [], "usage": usage_body(result.usage)})
        yield DONE

    def _picks(self, result: Result) -> Sequence[Candidate | None]:
        """The candidates to return, best first; None for an answer that is refused.

        Without any reward (all of them late or unparsable) the first finished text is better than nothing, and the
        evidence says what it is. Where a minimum was asked for there is no answer instead.

        Raises:
            ApiError: 408 when the deadline passed before any candidate was finished.
        """
        k, best, candidates = self._plan.request.returned, result.best, result.candidates
        if best is None and (self._options.min_reward is not None or any(s.reward is not None for s in result.scores)):
            return [None] * k
        missing = {s.candidate for s in result.scores if s.status == "late" or candidates[s.candidate].error}
        finished = [i for i in result.selection.ranking if candidates[i].text or i not in missing]
        if not finished:
            said = f"the deadline of {self._plan.deadline_s:g} s passed before any candidate was finished."
            raise ApiError(408, said, "deadline_exceeded", "best_of_n.deadline_s")
        finished.sort(key=lambda i: (i != best, best is None and not candidates[i].text.strip()))
        return [candidates[i] for i in finished[:k]]

    def _choice(self, place: int, pick: Candidate | None, result: Result) -> dict[str, Any]:
        choice = {"index": place, "logprobs": self._logprobs(pick), "finish_reason": _ended(pick)}
        if not self._chat:
            return {**choice, "text": self._content(pick) or ""}
        return {**choice, "message": {"role": "assistant", "content": self._content(pick), **_apart(pick, result)}}

    def _content(self, pick: Candidate | None) -> str | None:
        """What the policy wrote: no prefill, nor the canonical form of tool calls, which is there to be scored."""
        if pick is None:
            return None
        text = pick.text.removeprefix(self._plan.task.prefill)
        return without_calls(text, pick.tool_calls) or (None if pick.tool_calls else "")

    def _logprobs(self, pick: Candidate | None) -> dict[str, Any] | None:
        """The answer's tokens with their log-probabilities; in a stream they come with the end of the answer.

        Raises:
            ApiError: 400 when the policy does not have them.
        """
        if pick is None or not self._plan.bon.sampling.logprobs:
            return None
        if pick.logprobs is None:
            raise bad("logprobs", "the policy does not have them.", "unsupported_parameter")
        spoken = _spoken(self._content(pick) or "", pick.logprobs)
        if self._chat:
            asked = self._plan.passed.get("top_logprobs", 0)  # a scorer may have had it tell more
            likely = [top for (piece, _), top in zip(pick.logprobs, pick.top_logprobs, strict=False) if piece]
            tokens = [{"token": piece, "logprob": logprob, "bytes": _bytes(piece)} for piece, logprob in spoken]
            content = [
                {**token, "top_logprobs": top[:asked]}
                for token, top in zip(tokens, likely or cycle([()]), strict=False)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [piece for piece, _ in spoken],
            "token_logprobs": [logprob for _, logprob in spoken],
            "top_logprobs": None,
            "text_offset": [*accumulate((len(piece) for piece, _ in spoken[:-1]), initial=0)] if spoken else [],
        }

    def _evidence(self, result: Result, picks: Sequence[Candidate | None], queue_s: float) -> dict[str, Any]:
        everything = result.candidates if self._options.return_candidates else ()
        return {
            **evidence(result, self._plan, queue_s),
            "choices": [self._about(pick, result, "text") for pick in picks if pick],
            **({} if result.credit is None else {"credit": [_credit(each) for each in result.credit]}),
            **({"candidates": [self._about(candidate, result) for candidate in everything]} if everything else {}),
        }

    def _about(self, candidate: Candidate, result: Result, *without: str) -> dict[str, Any]:
        about = scored(result.scores[candidate.index], result.task) | _sampled(candidate)
        return {name: value for name, value in about.items() if name not in without}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._plan.model}

    def _chunk(
        self, delta: dict[str, Any], place: int = 0, ended: str | None = None, logprobs: Any = None, **more: Any
    ) -> bytes:
        content = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": place, **content, "logprobs": logprobs, "finish_reason": ended}
        return _event({**self._head(self._kind), "choices": [choice], **more})


def joined(answers: Sequence[dict[str, Any]], results: Sequence[Result]) -> dict[str, Any]:
    """The answers to several prompts as one: choices in order, the sum of what they cost, evidence of each."""
    if len(answers) == 1:
        return answers[0]
    choices = [choice for answer in answers for choice in answer["choices"]]
    return {
        **answers[0],
        "choices": [{**choice, "index": place} for place, choice in enumerate(choices)],
        "usage": usage_body(sum((result.usage for result in results), Usage())),
        "best_of_n": [answer["best_of_n"] for answer in answers],
    }


def evidence(result: Result, work: Work, queue_s: float) -> dict[str, Any]:
    """What is known of the candidates of one prompt together."""
    rewards = [s.reward for s in result.scores if s.reward is not None]
    timing, late = result.timing, "late" in result.counts
    passed = f"the deadline of {work.deadline_s:g} s passed; this is the best of what was there." if late else None
    return {
        "n": len(result.candidates),
        "scorer": work.scorer,
        "instruction": result.task.instruction,
        "best": result.best,
        "reward": result.reward,
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        "reason": public(result.selection.reason) if result.selection.reason else passed,
        "stop": result.stop and asdict(result.stop),
        "warnings": [public(warning) for warning in result.warnings],
        "deadline_passed": late,
        "statuses": result.counts,
        "timing": {
            "queue_s": queue_s,
            "sample_s": timing.sample,
            "score_s": timing.score,
            "overlap_s": timing.overlap,
            "total_s": queue_s + timing.total,
        },
    }


def scored(score: Score, task: Task) -> dict[str, Any]:
    """What is known of one candidate."""
    known = score.to_dict()
    names = ("reward", "status", "explanation", "inferred", "precision", "recall", "upper_bound", "same_as")
    inferred = known.get("inferred")
    return {
        "index": score.candidate,
        **{name: known.get(name) for name in names},
        "reason": None if score.reason is None else public(score.reason),
        "matched": matched_words(inferred, task.instruction) if inferred else [],
        "missed": missed_words(inferred, task.instruction) if inferred else [],
        "scored_s": (score.started, score.finished) if score.finished else None,
    }


def failure(error: ApiError) -> bytes:
    """An error inside a stream that is already open."""
    return _event(error.body)


def usage_body(usage: Usage) -> dict[str, Any]:
    """Tokens in OpenAI's shape, the scorer's included.

    A prompt counts as often as it was sent to a model, and cached tokens are part of it, as OpenAI counts them.
    """
    prompt = {"policy": usage.policy_prompt_tokens, "scorer": usage.scorer_prompt_tokens}
    completion = {"policy": usage.policy_completion_tokens, "scorer": usage.scorer_completion_tokens}
    return {
        "prompt_tokens": sum(prompt.values()),
        "completion_tokens": sum(completion.values()),
        "total_tokens": sum(prompt.values()) + sum(completion.values()),
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        **{model: {"prompt_tokens": prompt[model], "completion_tokens": completion[model]} for model in prompt},
    }


def _sampled(candidate: Candidate) -> dict[str, Any]:
    return {
        "index": candidate.index,
        "text": candidate.text,
        "finish_reason": candidate.finish_reason,
        "completion_tokens": candidate.completion_tokens,
        "sampled_s": candidate.finished,
    }


def _credit(credit: Credit) -> dict[str, Any]:
    return {**asdict(credit), "reason": None if credit.reason is None else public(credit.reason)}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"


def _spoken(text: str, logprobs: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The tokens of the answer's text: no special ones, and none past a stop string."""
    spoken = [(piece, logprob) for piece, logprob in logprobs if piece]
    said = "".join(piece for piece, _ in spoken)
    if said.startswith(text):
        surplus = len(said) - len(text)
        while spoken and len(spoken[-1][0]) <= surplus:
            surplus -= len(spoken.pop()[0])
    return spoken


def _bytes(piece: str) -> list[int] | None:
    """UTF-8 of a token; None for one that holds a part of a character."""
    return None if "\ufffd" in piece else list(piece.encode())


def _apart(pick: Candidate | None, result: Result) -> dict[str, Any]:
    """What a message holds beside its content."""
    if pick is None:
        return {"refusal": public(result.selection.reason or "")}
    calls = {"tool_calls": list(pick.tool_calls)} if pick.tool_calls else {}
    thought = {"reasoning_content": pick.reasoning} if pick.reasoning else {}
    return {"refusal": pick.refusal or None, **thought, **calls}


def _ended(pick: Candidate | None) -> str:
    if pick and pick.tool_calls:
        return "tool_calls"
    return "length" if pick and pick.finish_reason == "length" else "stop"
