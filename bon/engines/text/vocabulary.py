"""One tokenizer, seen as plain characters on one side and control tokens on the other.

A control token is any token added on top of the trained vocabulary (special or not: ``<|im_end|>``, ``<think>``,
``<tool_call>``), except runs of white space, which are harmless and belong to ordinary text.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer


class PlainEncoder:
    """Encodes text so that no control token can come out, and splits template text at its control tokens.

    Args:
        tokenizer: a transformers tokenizer, with or without a Rust back end.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
        control = {i: token for i, token in added.items() if token.special or str(token.content).strip(" \t\n\r▁")}
        self.special_ids: frozenset[int] = frozenset(tokenizer.all_special_ids) | {
            i for i, token in control.items() if token.special
        }
        self.control_ids: frozenset[int] = frozenset(control) | self.special_ids
        # An unknown character is no injection: the unknown token may come out of plain text.
        self._forbidden = self.control_ids - {tokenizer.unk_token_id}
        self._control = {str(token.content): (i, token) for i, token in control.items()}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend: Tokenizer | None = backend if isinstance(backend, Tokenizer) else None
        self._anchor = f"<bon-{secrets.token_hex(8)}>"  # cannot be guessed, so it cannot be injected
        self._clone, source = self._without_control_tokens()
        self.fingerprint = hashlib.blake2b(source.encode(), digest_size=12).hexdigest()
        self.start_ids: tuple[int, ...] = self._ids_put_first()
        self._adds_prefix = self._encode("a") != self._encode("\na")[len(self._encode("\n")) :]

    def encode(self, text: str, *, inner: bool = False) -> list[int]:
        """Plain text as token ids.

        Args:
            text: any text.
            inner: the text continues earlier plain text: no word-start mark that the tokenizer puts before a text.
        """
        if not text:
            return []
        if inner and self._adds_prefix:
            for neighbour in ("\n", "|"):  # the second where the text merges with the first
                base, ids = self._encode(neighbour), self._encode(neighbour + text)
                if ids[: len(base)] == base:
                    return ids[len(base) :]
        return self._encode(text)

    def split(self, text: str) -> list[int | str]:
        """Template text as control token ids and the plain text between them."""
        parts: list[int | str] = []
        at, rstrip = 0, False

        def plain(piece: str) -> None:
            piece = piece.lstrip() if rstrip else piece
            if piece:
                parts.append(piece)

        for match in self._pattern.finditer(text):
            token_id, token = self._control[match[0]]
            piece = text[at : match.start()]
            plain(piece.rstrip() if token.lstrip else piece)
            parts.append(token_id)
            at, rstrip = match.end(), token.rstrip
        plain(text[at:])
        return parts

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        if self._backend is not None:
            return self._backend.decode(list(ids), skip_special_tokens=True)
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str) -> list[int]:
        ids = self._raw(text)
        return ids if self._forbidden.isdisjoint(ids) else self._encode_apart(text)

    def _encode_apart(self, text: str) -> list[int]:
        """Encode a text whose own characters make a control token: that token's characters go one by one."""
        ids: list[int] = []
        at = 0
        for match in self._pattern.finditer(text):
            ids += self._allowed(text[at : match.start()])
            for char in match[0]:
                ids += self._allowed(char)
            at = match.end()
        return ids + self._allowed(text[at:])

    def _allowed(self, text: str) -> list[int]:
        """Encode; characters that still come out as control tokens are left out."""
        if not text:
            return []
        ids = self._raw(text)
        if self._forbidden.isdisjoint(ids):
            return ids
        return [i for char in text for i in self._raw(char) if i not in self._forbidden]

    def _raw(self, text: str) -> list[int]:
        if self._clone is not None:
            # Behind the anchor, as template text stands behind a control token: what a tokenizer does at the very
            # start of a text (a word-start mark) it does there or not, exactly as in the whole string.
            return list(self._clone.encode(self._anchor + text, add_special_tokens=False).ids)[1:]
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _without_control_tokens(self) -> tuple[Tokenizer | None, str]:
        if self._backend is None:
            return None, json.dumps(sorted(self._tokenizer.get_vocab().items()))
        layout = json.loads(self._backend.to_str())
        source = json.dumps([layout["model"], layout["added_tokens"]], sort_keys=True)
        layout["added_tokens"] = [t for t in layout["added_tokens"] if t["id"] not in self.control_ids]
        layout["truncation"] = layout["padding"] = layout["post_processor"] = None
        clone = Tokenizer.from_str(json.dumps(layout))
        clone.add_special_tokens([AddedToken(self._anchor, normalized=False, special=True)])
        return clone, source

    def _ids_put_first(self) -> tuple[int, ...]:
        """Ids that the tokenizer itself puts before a text (beginning of text), for prompts without a template."""
        bos = self._tokenizer.bos_token_id
        if bos is None:
            return ()
        ids = self._tokenizer("a", add_special_tokens=True)["input_ids"]
        return (int(bos),) if ids and ids[0] == bos else ()
