"""FLIP: infer the instruction back from each response; agreement with the original one is the reward.

Source: "Small Reward Models via Backward Inference", arXiv 2602.13551. All items of a call become one batch of the
engine. A reconstruction is given up as soon as the best reward it can still reach lies strictly below one that another
candidate of the same task has; the bound holds for whatever the parser could finally return, so the winner is the same.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from bon.engines.base import Batches, Engine, Keep, Loglikelihood, WritesJSON
from bon.errors import InputError, PromptTooLongError, UnknownNameError
from bon.prompts import Style, load_style
from bon.scorers.base import Item, Scored, no_response
from bon.scorers.drafting import Drafting
from bon.scorers.lazy import LazyEngine
from bon.scorers.parsing import Parser, response_piece
from bon.scorers.reconstruction import Reconstruction
from bon.similarity import Similarity, as_similarity
from bon.types import Sampling

TieBreak = Literal["logprob", "likelihood", "none"]
TIE_BREAKS: tuple[TieBreak, ...] = ("logprob", "likelihood", "none")
MAX_TOKENS = 512
"""Tokens of a reconstruction, as in the paper."""
RETRY_TEMPERATURE = 0.7


class Flip:
    """Scores candidates by backward inference.

    Args:
        model: what infers instructions: a model name or folder, an ``Engine``, or None for the policy's own model
            (by itself, without a policy: the embedded mini model). A model given by name is loaded on first use and
            freed by ``aclose``; an engine stays its owner's.
        prompt: "direct" (the bare instruction), "json" (reasoning first, as in the paper), or a ``Style``
            (``bon.prompts.from_files``).
        parser: "robust", or "reference" for the paper's released code with its quirks.
        similarity: a name in ``bon.similarity.SIMILARITIES``, or a ``Similarity``.
        samples: reconstructions per candidate; the reward is the mean over those that could be parsed.
        sampling: how reconstructions are sampled. Greedy for one sample, temperature 1 for several, 512 tokens.
        tie_break: between equal rewards, "logprob" prefers the likelier reconstruction, "likelihood" the higher mean
            log p(instruction | response), which costs one more prefill. "none" leaves it to the number of tokens and
            the index, and asks for no log-probabilities: they cost up to a tenth of the time where vLLM's batch is
            full (``benchmarks/throughput.py --engine vllm``).
        retries: how often candidates none of whose reconstructions could be parsed are tried again, at temperature 0.7
            at least.
        thinking: whether the model may think before it answers. Off, templates that know ``enable_thinking`` are told
            so, and an answer that closes a thinking block it did not open has failed.
        draft: whether the instruction is handed to the engine as a guess at a greedy "direct" reconstruction, for as
            long as that pays (``bon.scorers.drafting``); it changes the cost and no reward, up to rounding of the
            model's arithmetic.
        options: passed on when a model is loaded by name, ``engine="torch"`` among them.

    Raises:
        UnknownNameError: a prompt, parser, similarity or tie-break that does not exist.
        InputError: samples < 1, retries < 0, options for an engine that is already there.
    """

    def __init__(
        self,
        model: str | Path | Engine | None = None,
        *,
        prompt: str | Style = "direct",
        parser: str = "robust",
        similarity: str | Similarity = "word_f1",
        samples: int = 1,
        sampling: Sampling | None = None,
        tie_break: TieBreak = "logprob",
        retries: int = 0,
        thinking: bool = False,
        draft: bool = True,
        **options: Any,
    ) -> None:
        if tie_break not in TIE_BREAKS:
            raise UnknownNameError("tie-break", tie_break, TIE_BREAKS)
        self.samples, self.retries = _whole("samples", samples, 1), _whole("retries", retries, 0)
        self.style = load_style(prompt)
        self.parser = Parser(parser, self.style.output, thinking)
        self.similarity = as_similarity(similarity)
        sampling = sampling or Sampling(temperature=0.0 if samples == 1 else 1.0, max_tokens=MAX_TOKENS)
        self.sampling = sampling.replace(logprobs=sampling.logprobs or tie_break == "logprob")
        self.tie_break: TieBreak = tie_break
        self.template = {"enable_thinking": thinking}
        greedy = self.samples == 1 and self.sampling.temperature == 0
        self._drafting = Drafting(draft and greedy and self.style.output == "text")
        self._model = LazyEngine(model, options)

    @property
    def name(self) -> str:
        """Style and model."""
        return f"flip-{self.style.name}({self._model.name})"

    @property
    def engine(self) -> Engine | None:
        """The engine, loaded now if it was not; None as long as no model was named (see ``on``)."""
        return self._model.named

    def on(self, engine: Engine) -> Flip:
        """Return the same scorer on another engine, which stays its owner's."""
        other = self._model.moved(self, engine)
        other._drafting = self._drafting.anew()
        return other

    @property
    def overlaps(self) -> bool:
        """Whether calls may run at the same time."""
        return self._model.engine.overlaps

    async def score(self, items: Sequence[Item]) -> AsyncIterator[Scored]:
        """Score every item once; scores come as they are known, rewards reach the boards at once."""
        runs = []
        engine = self._model.engine
        full = isinstance(engine, Batches) and engine.full
        for index, item in enumerate(items):
            response = response_piece(item.candidate)
            if response is None:
                yield no_response(index, item)
            else:
                prompt = self.style.prompt(item.task, response, self.template)
                if not full and self._drafting.pays():
                    prompt = replace(prompt, draft=item.task.instruction.strip())
                runs.append(Reconstruction(index, item, prompt, self.parser, self.similarity, self.samples))
        finished: list[Reconstruction] = []
        for attempt in range(self.retries + 1):
            again: list[Reconstruction] = []
            async with aclosing(self._reconstruct(runs, _retry(self.sampling, attempt))) as ended:
                async for run in ended:
                    if run.status == "failed" and attempt < self.retries and not run.too_long:
                        again.append(run.restarted())
                    elif self.tie_break == "likelihood" and run.reward is not None:
                        finished.append(run)
                    else:
                        yield run.scored(run.mean_logprob if self.tie_break == "logprob" else None)
            runs = again
            if not runs:
                break
        for run, likelihood in await self._likelihoods(finished):
            yield run.scored(likelihood.mean if likelihood else None, likelihood)

    async def _reconstruct(
        self, runs: list[Reconstruction], sampling: Sampling
    ) -> AsyncGenerator[Reconstruction, None]:
        """Run all reconstructions as one batch and yield each run when its last one ends."""
        fitting = runs
        while fitting:
            try:
                prompts, keep = [run.prompt for run in fitting], _keep(fitting, sampling.stop)
                stream = self._model.engine.generate(prompts, self._held(sampling), self.samples, keep=keep)
                async with aclosing(stream) as completions:  # type: ignore[type-var]
                    async for completion in completions:
                        run = fitting[completion.prompt_index]
                        if run.prompt.draft:
                            self._drafting.learn(completion)
                        if run.finish(completion):
                            run.item.board.post(run.reward)
                            yield run
                return
            except PromptTooLongError as error:
                if not error.indices:
                    raise
                for index in error.indices:
                    fitting[index].too_long = str(error)
                    yield fitting[index]
                fitting = [run for run in fitting if not run.too_long]

    def _held(self, sampling: Sampling) -> Sampling:
        """Hold the engine to the style's JSON schema where it can be held, and need not think first."""
        engine, schema = self._model.engine, self.style.schema
        if schema is None or self.template["enable_thinking"] or not isinstance(engine, WritesJSON):
            return sampling
        return sampling.replace(extra={**engine.json_options(schema), **sampling.extra})

    async def _likelihoods(self, runs: list[Reconstruction]) -> list[tuple[Reconstruction, Loglikelihood | None]]:
        """Rate the original instruction after each response; None where it does not fit the context."""
        style = self.style if self.style.output == "text" else load_style("direct")
        prompts = {
            i: style.prompt(run.item.task, response_piece(run.item.candidate) or "", self.template)
            for i, run in enumerate(runs)
        }
        rated: dict[int, Loglikelihood] = {}
        while prompts:
            order = list(prompts)
            try:
                values = await self._model.engine.loglikelihood(
                    list(prompts.values()), [runs[i].item.task.instruction.strip() for i in order]
                )
            except PromptTooLongError as error:
                if not error.indices:
                    raise
                for position in error.indices:
                    del prompts[order[position]]
            else:
                rated = dict(zip(order, values, strict=True))
                break
        return [(run, rated.get(i)) for i, run in enumerate(runs)]

    async def aclose(self) -> None:
        """Free the model if it was loaded here."""
        await self._model.aclose()


def _retry(sampling: Sampling, attempt: int) -> Sampling:
    if attempt == 0:
        return sampling
    seed = None if sampling.seed is None else sampling.seed + attempt
    return sampling.replace(temperature=max(sampling.temperature, RETRY_TEMPERATURE), seed=seed)


def _keep(runs: list[Reconstruction], stop: tuple[str, ...]) -> Keep | None:
    """Say of a growing reconstruction whether it is worth going on; None when nothing could ever be given up."""
    if not any(run.prunable for run in runs):
        return None
    return lambda partial: runs[partial.prompt_index].keep(partial, stop)


def _whole(name: str, value: int, least: int) -> int:
    """Check a whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}, got {value!r}.")
    return value
