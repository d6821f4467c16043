"""What is sent back, as the OpenAPI document describes it; ``answers.py`` makes it.

Not ``openai.types``: those are what a client must be ready for, with most fields optional; these are what is sent.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from bon.types import FinishReason, ScoreStatus


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Any error."""

    error: ErrorBody


class UsageBody(BaseModel):
    """Tokens of policy and scorer, in sum and separately; a prompt counts as often as it was sent to a model."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int] = Field(description="Those that were not computed.")
    policy: dict[Literal["prompt_tokens", "completion_tokens"], int]
    scorer: dict[Literal["prompt_tokens", "completion_tokens"], int]


class RewardBody(BaseModel):
    """What is known of one candidate's reward."""

    index: int
    reward: float | None
    status: ScoreStatus
    explanation: str | None = Field(description="What the scorer says about the reward.")
    inferred: str | None = Field(description="The instruction that was inferred from the candidate.")
    matched: list[tuple[int, int]] = Field(description="Spans of ``inferred`` whose words are in the instruction.")
    missed: list[tuple[int, int]] = Field(description="Spans of the instruction whose words are not in ``inferred``.")
    precision: float | None
    recall: float | None
    upper_bound: float | None = Field(description="The reward of a pruned candidate could not have exceeded this.")
    reason: str | None = Field(description="Why there is no reward.")
    same_as: int | None = Field(description="An identical candidate, whose score this is.")
    scored_s: tuple[float, float] | None = Field(description="When its score was started and finished.")


class ScoreBody(RewardBody):
    """What is known of one candidate that was sampled."""

    finish_reason: FinishReason = Field(description="'abort' where it was stopped because it was not needed.")
    text: str | None = Field(default=None, description="With return_candidates.")
    completion_tokens: int | None
    sampled_s: float = Field(description="When it was finished, from the start of the run.")


class StopBody(BaseModel):
    """Why no more was sampled."""

    reason: str
    gain: float | None = Field(description="What one more sample could be expected to gain, as its budget counts it.")


class EvidenceBody(BaseModel):
    """What is known of the candidates of one prompt together."""

    n: int
    scorer: str
    instruction: str
    best: int | None = Field(description="Index of the winner, null when no candidate has a sufficient reward.")
    reward: float | None
    mean_reward: float | None
    reason: str | None = Field(description="Why there is no winner, or why no more was done.")
    stop: StopBody | None = Field(description="Why no more was sampled, where that was decided while it went on.")
    warnings: list[str] = Field(
        description="What to know before relying on the answer: rewards that say nothing, a cut."
    )
    deadline_passed: bool
    statuses: dict[ScoreStatus, int]
    timing: dict[Literal["queue_s", "sample_s", "score_s", "overlap_s", "total_s"], float]


class CreditBody(BaseModel):
    """What a sentence of the winner adds to its reward."""

    start: int = Field(description="Where it is in the candidate's text, in characters (code points).")
    end: int
    text: str
    credit: float | None = Field(description="The reward less that of the text without the sentence.")
    reason: str | None = Field(description="Why there is none.")


class BestOfNBody(EvidenceBody):
    """The evidence."""

    choices: list[ScoreBody] = Field(description="Scores of the returned choices, in their order.")
    candidates: list[ScoreBody] | None = Field(default=None, description="All of them, with return_candidates.")
    credit: list[CreditBody] | None = Field(default=None, description="Of the winner's sentences, on request.")


class MessageBody(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: dict[str, Any] | None = Field(description="The tokens of the answer, in OpenAI's format, on request.")


class ChatChoice(_Choice):
    """One of the best."""

    message: MessageBody


class TextChoice(_Choice):
    """One of the best."""

    text: str


class _Response(BaseModel):
    id: str
    created: int
    model: str
    usage: UsageBody
    best_of_n: BestOfNBody


class ChatResponse(_Response):
    """OpenAI's chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionResponse(_Response):
    """OpenAI's text completion; several prompts have their choices one after the other, and evidence each."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    best_of_n: BestOfNBody | list[BestOfNBody]  # type: ignore[assignment]


class ScoreItem(BaseModel):
    """A pair of texts."""

    index: int
    object: Literal["score"]
    score: float | None = Field(description="null where there is no reward; best_of_n says why.")
    best_of_n: RewardBody


class GroupItem(BaseModel):
    """A prompt and its candidates."""

    index: int
    object: Literal["score.group"]
    scores: list[float | None] = Field(description="In the order of the candidates.")
    error: ErrorBody | None = Field(description="Why this group has no scores, where it could not be scored.")
    best_of_n: list[RewardBody]


class ScoreResponse(BaseModel):
    """vLLM's scores; for ``groups`` one item for each of them."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: UsageBody
    data: list[ScoreItem] | list[GroupItem]
    best_of_n: list[EvidenceBody | None] = Field(description="Of each prompt; null where it could not be scored.")


class DocumentBody(BaseModel):
    """A document."""

    text: str


class RerankItem(BaseModel):
    """One of the documents."""

    index: int = Field(description="Its place in the request.")
    relevance_score: float | None = Field(description="null where there is no reward; best_of_n says why.")
    document: DocumentBody | None = Field(default=None, description="Unless return_documents is false.")
    best_of_n: RewardBody


class RerankResponse(BaseModel):
    """The documents, best first, as Jina, Cohere and vLLM have it."""

    id: str
    model: str
    usage: UsageBody
    results: list[RerankItem]
    best_of_n: EvidenceBody


class ModelDefaults(BaseModel):
    """What a client may ask for."""

    n: int | None = Field(description="Candidates of a request that does not say, where the budget has a limit.")
    max_n: int
    scorers: list[str]
    scorer: str
    kinds: dict[str, str] | None = Field(
        default=None, description="What the embedded model can write, each with a prompt."
    )


class ModelBody(BaseModel):
    """One model name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    best_of_n: ModelDefaults


class ModelList(BaseModel):
    """What ``model`` may be."""

    object: Literal["list"]
    data: list[ModelBody]


class StateBody(BaseModel):
    """Whether the server is well."""

    status: str
    reason: str | None = None
