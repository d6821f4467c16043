"""A real (tiny, random) model behind the fake server: what the HTTP engine asks for is really computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import torch
from fake_openai import FakeServer, Reply, Seen, send, send_event, start_stream
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from bon.engines.torch.rows import cache_argument


class ModelServer(FakeServer):
    """Serves ``/v1/completions`` for token ids: sampling with seeds, stop strings, streams, and echo for rating."""

    def __init__(self, folder: Any, context: int) -> None:
        super().__init__()
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._context = context
        self.models[0]["max_model_len"] = context

    def __enter__(self) -> ModelServer:
        super().__enter__()
        self._loop.call_soon_threadsafe(torch.set_num_threads, 1)  # 16 times as fast here on two busy cores
        return self

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.method == "GET":
            return await super().answer(seen, writer)
        ids = seen.body["prompt"]
        if seen.body.get("echo"):
            values = self._logits(ids, DynamicCache())[0].log_softmax(-1)
            own = values[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            choice = {"text": "", "logprobs": {"token_logprobs": [None, *own.tolist()]}, "finish_reason": "length"}
            return await send(writer, Reply(200, {"choices": [choice]}))
        if seen.body.get("stream"):
            start_stream(writer)
            count = 0
            async for choice in self._sample(ids, seen.body):
                count += len(choice["token_ids"])
                usage = {"prompt_tokens": len(ids), "completion_tokens": count}
                await send_event(writer, choices=[choice], usage=usage)
            return False
        pieces = [choice async for choice in self._sample(ids, seen.body)]
        choice = {
            "text": "".join(piece["text"] for piece in pieces),
            "token_ids": [i for piece in pieces for i in piece["token_ids"]],
            "logprobs": {"token_logprobs": [v for p in pieces for v in p["logprobs"]["token_logprobs"]]},
            "finish_reason": pieces[-1]["finish_reason"],
        }
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(choice["token_ids"])}
        return await send(writer, Reply(200, {"choices": [choice], "usage": usage}))

    def _logits(self, ids: list[int], cache: DynamicCache) -> Any:
        with torch.no_grad():
            kept = {"use_cache": True, cache_argument(self._model): cache}
            return self._model(torch.tensor([ids]), **kept).logits

    async def _sample(self, prompt: list[int], body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """One choice for each token; the last has the finish_reason. Text cut by a stop string is taken back unsent."""
        random = torch.Generator()
        random.manual_seed(body["seed"]) if "seed" in body else random.seed()
        ids, text, cache, fed = list[int](), "", DynamicCache(), prompt
        while True:
            await asyncio.sleep(0)
            logprobs = self._logits(fed, cache)[0, -1].log_softmax(-1)
            if temperature := body.get("temperature", 1.0):
                token = int(torch.multinomial((logprobs / temperature).softmax(-1), 1, generator=random))
            else:
                token = int(logprobs.argmax())
            ids.append(token)
            fed = [token]
            whole = self._tokenizer.decode(ids, skip_special_tokens=True)
            stops = [whole.index(stop) for stop in body.get("stop", ()) if stop in whole]
            ended = token == self._tokenizer.eos_token_id or bool(stops)
            full = len(ids) >= body["max_tokens"] or len(prompt) + len(ids) >= self._context
            whole = whole[: min(stops)] if stops else whole
            sure = len(whole) if ended or full else max(len(text), len(whole) - self._held_back(body))
            yield {
                "index": 0,
                "text": whole[len(text) : sure],
                "token_ids": [token],
                "logprobs": {"token_logprobs": [float(logprobs[token])]},
                "finish_reason": "stop" if ended else "length" if full else None,
            }
            text = whole[:sure]
            if ended or full:
                return

    @staticmethod
    def _held_back(body: dict[str, Any]) -> int:
        return max((len(stop) - 1 for stop in body.get("stop", ())), default=0)
