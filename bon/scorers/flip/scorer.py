"""FLIP: infer the instruction back from each response; agreement with the original one is the reward.

Source: "Small Reward Models via Backward Inference", arXiv 2602.13551. All items of a call become one batch of the
engine. A reconstruction is given up as soon as the best reward it can still reach lies strictly below one that another
candidate of the same task has; the bound holds for whatever the parser could finally return, so the winner is the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bon.engines.base import Engine, Generates, Keep, Partial, Rates, Request, Wanted, WritesJSON
from bon.errors import UnknownNameError, whole_number
from bon.prompts import Style, load_style
from bon.scorers.base import ModelScorer, Pending, can
from bon.scorers.flip.drafting import Drafting
from bon.scorers.flip.reconstruction import Reconstruction
from bon.scorers.likelihood import BackwardLikelihood
from bon.scorers.parsing import NO_RESPONSE, Parser, response_piece
from bon.similarity import Similarity, as_similarity
from bon.types import Sampling, Score

if TYPE_CHECKING:
    from bon.models import Model

TieBreak = Literal["logprob", "likelihood", "none"]
TIE_BREAKS: tuple[TieBreak, ...] = ("logprob", "likelihood", "none")
MAX_TOKENS = 512
"""Tokens of a reconstruction, as in the paper."""
_SPARE = 64  # tokens of a reconstruction beyond one for each byte of the instruction, which has fewer
RETRY_TEMPERATURE = 0.7


class Flip(ModelScorer):
    """Scores candidates by backward inference.

    Args:
        model: what infers instructions: an engine or a function, which stay the caller's; a model's name or folder,
            with options of its engine if need be; or None for the policy's own model (without a policy: the embedded
            mini model).
        style: "direct" (the bare instruction), "json" (reasoning first, as in the paper), a folder with templates of
            your own (``system.txt``, ``user.txt``), or a ``Style`` (``bon.prompts.from_files``).
        parser: "robust", or "reference" for the paper's released code with its quirks.
        similarity: a name in ``bon.similarity.SIMILARITIES``, or a ``Similarity``.
        samples: reconstructions per candidate; the reward is the mean over those that could be parsed.
        sampling: how reconstructions are sampled: a ``Sampling``, or what is to differ from the usual (greedy for one
            sample, temperature 1 for several).
        max_tokens: tokens of a reconstruction. None takes 512 where the model reasons first (a style whose answer is
            JSON, ``thinking``), and else 64 and one for each byte of the instruction, 512 at most: what is much longer
            than the instruction has no reward to gain. One that repeats itself is cut off before that.
        tie_break: between different responses that share the best reward, "likelihood" prefers the higher mean
            log p(instruction | response), which costs one more prefill of these; where the instruction came back from
            all of them, or the model can only be sampled, it is the same as "logprob", which prefers the likelier
            reconstruction. "none" leaves it to the number of tokens and the index, and asks for no log-probabilities:
            they cost up to a tenth of the time where vLLM's batch is full (``benchmarks/throughput.py --engine vllm``).
        retries: how often candidates none of whose reconstructions could be parsed are tried again, at temperature 0.7
            at least.
        thinking: whether the model may think before it answers. Off, templates that know ``enable_thinking`` are told
            so, and an answer that closes a thinking block it did not open has failed.
        draft: whether the instruction is handed to the engine as a guess at a greedy "direct" reconstruction, for as
            long as that pays (``bon.scorers.flip.drafting``); it changes the cost and no reward, up to rounding of the
            model's arithmetic.
        options: passed on when a model is loaded by name, ``engine`` among them.

    Raises:
        UnknownNameError: a style, parser, similarity or tie-break that does not exist.
        InputError: samples < 1, retries < 0, options for an engine that is already there.
    """

    ability: ClassVar[type] = Generates

    def __init__(
        self,
        model: str | Path | Model | Engine | Callable[..., Any] | None = None,
        *,
        style: str | Style = "direct",
        parser: str = "robust",
        similarity: str | Similarity = "word_f1",
        samples: int = 1,
        sampling: Sampling | Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        tie_break: TieBreak = "likelihood",
        retries: int = 0,
        thinking: bool = False,
        draft: bool = True,
        **options: Any,
    ) -> None:
        if tie_break not in TIE_BREAKS:
            raise UnknownNameError("tie-break", tie_break, TIE_BREAKS)
        self.samples, self.retries = whole_number("samples", samples, 1), whole_number("retries", retries, 0)
        self.style = load_style(style)
        self.parser = Parser(parser, self.style.output, thinking)
        self.similarity = as_similarity(similarity)
        self.range = (0.0, self.similarity.maximum)
        usual = {
            "temperature": 0.0 if samples == 1 else 1.0,
            "max_tokens": MAX_TOKENS if max_tokens is None else max_tokens,
        }
        said = max_tokens is not None or isinstance(sampling, Sampling) or "max_tokens" in (sampling or {})
        self._scaled = not said and self.style.output == "text" and not thinking
        if not isinstance(sampling, Sampling):
            sampling = Sampling.of({**usual, **(sampling or {})})
        elif max_tokens is not None:
            sampling = sampling.replace(max_tokens=max_tokens)
        self.sampling = sampling.replace(logprobs=sampling.logprobs or tie_break != "none")
        self.tie_break: TieBreak = tie_break
        self.template = {"enable_thinking": thinking}
        greedy = self.samples == 1 and self.sampling.temperature == 0
        self._drafting = Drafting(draft and greedy and self.style.output == "text")
        super().__init__(model, options)

    @property
    def name(self) -> str:
        """Style and model."""
        return f"flip-{self.style.name}({self._model_name})"

    def on(self, engine: Engine) -> Flip:
        """Return the same scorer on an engine, which stays its owner's."""
        other = super().on(engine)
        other._drafting = self._drafting.restarted()
        return other

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once; each score comes as soon as it is known."""
        runs = []
        full = getattr(self.engine, "full", False)  # Batches; ``isinstance`` of a protocol is slow, once a candidate
        for position, each in enumerate(pending):
            response = response_piece(each.candidate)
            if response is None:
                yield position, NO_RESPONSE
                continue
            prompt = self.style.prompt(each.task, response, self.template)
            if not full and self._drafting.pays():
                prompt = replace(prompt, draft=each.task.instruction.strip())
            runs.append(Reconstruction(position, each, prompt, self.parser, self.similarity, self.samples))
        for attempt in range(self.retries + 1):
            again: list[Reconstruction] = []
            async with aclosing(self._reconstruct(runs, attempt)) as ended:
                async for run in ended:
                    if run.status == "failed" and attempt < self.retries and not run.too_long:
                        again.append(run.restarted())
                    else:
                        yield run.position, run.score(None if self.tie_break == "none" else run.mean_logprob)
            runs = again
            if not runs:
                break

    async def settle(self, tied: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Rate the instruction after each response, unless it came back from all of a task's; see ``Scorer.settle``."""
        if self.tie_break != "likelihood" or not can(self.engine, Rates):
            return
        unsure = [at for at, each in enumerate(tied) if each.group.best_reward != self.similarity.maximum]
        likelihood = BackwardLikelihood(self.engine, style=self.style if self.style.output == "text" else "direct")
        async with aclosing(likelihood.score([tied[at] for at in unsure])) as scores:
            async for place, score in scores:
                yield unsure[place], score

    async def _reconstruct(self, runs: Sequence[Reconstruction], attempt: int) -> AsyncGenerator[Reconstruction, None]:
        """Run all reconstructions as one batch and yield each run when its last one ends."""
        sampling = self._held(self.sampling)
        if attempt:
            sampling = sampling.replace(temperature=max(sampling.drawing.temperature, RETRY_TEMPERATURE))
        keep = _keep(runs, sampling.stop)
        requests = [
            Request(run.prompt, self._limited(sampling, run), self.samples, run.first_sample, keep is None)
            for run in runs
        ]
        async with aclosing(self.engine.generate(requests, keep=keep)) as completions:
            async for completion in completions:
                run = runs[completion.request_index]
                if run.prompt.draft:
                    self._drafting.learn(completion)
                if run.finish(completion):
                    yield run

    def _limited(self, sampling: Sampling, run: Reconstruction) -> Sampling:
        if not self._scaled:
            return sampling
        enough = _SPARE + len(run.pending.task.instruction.encode(errors="surrogatepass"))
        return sampling if enough >= sampling.max_tokens else sampling.replace(max_tokens=enough)

    def _held(self, sampling: Sampling) -> Sampling:
        """Hold the engine to the style's JSON schema where it can be held, and need not think first."""
        schema = self.style.schema
        if schema is None or self.template["enable_thinking"] or not isinstance(self.engine, WritesJSON):
            return sampling
        return sampling.replace(extra={**self.engine.json_options(schema), **sampling.extra})


def _keep(runs: Sequence[Reconstruction], stop: tuple[str, ...]) -> Keep | None:
    """Say of a growing reconstruction whether it is worth going on; None when nothing could ever be given up."""
    if not any(run.prunable for run in runs):
        return Wanted(lambda index: not runs[index].pending.group.over) if any(run.stoppable for run in runs) else None

    def keep(partial: Partial) -> bool:
        return runs[partial.request_index].keep(partial, stop)

    return keep
