"""From conversations to token ids and back: the only place where a chat template is applied.

What the template writes may be control tokens; what people and models wrote is always plain text,
even where it spells a control token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from srlm_fast.data.records import Message, Prompt, user
from srlm_fast.errors import UserError


def template_names() -> list[str]:
    """Names of the chat templates that ship with the package."""
    folder = resources.files("srlm_fast.data") / "chat_templates"
    return sorted(
        p.name.removesuffix(".jinja") for p in folder.iterdir() if p.name.endswith(".jinja")
    )


class ChatTemplate:
    """Encodes prompts and responses with one chat template, and decodes what was sampled.

    tokenizer: a HF tokenizer. With `name` other than "auto" its `chat_template` is set to the named
        template, so that a saved model folder carries the one it was trained with.
    eos_ids: ids that end a response beside the tokenizer's EOS (those of the generation config).

    Attributes: `eos_ids`, every id that ends a response: those above and the control token that the
    template writes behind a reply. `pad_id`, the EOS where the tokenizer has no pad token; padding
    must therefore be masked by length, never by id.

    Raises UserError when there is no template, no EOS, or the template rewrites its prompts.
    """

    def __init__(self, tokenizer: Any, name: str = "auto", eos_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.name = name
        if name != "auto":
            tokenizer.chat_template = _shipped(name)
        elif not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer has no chat template; name one with --template: {_names()}"
            )
        added = tokenizer.added_tokens_decoder
        known = {int(i) for i in eos_ids} | {tokenizer.eos_token_id} - {None}
        control = {token.content: i for i, token in added.items() if token.special or i in known}
        control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        # <unk> may stand for any text, so it controls nothing.
        self._control_ids = frozenset(control.values()) - {tokenizer.unk_token_id}
        self.eos_ids = frozenset(known | self._turn_end())
        if not self.eos_ids:
            raise UserError("the tokenizer has no EOS token; set eos_token in its configuration")
        first = min(self.eos_ids) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self._eos_id = int(first)
        self.pad_id = self._eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.encode_response(user("question"), "answer")  # a template that cannot serve fails here

    def encode_prompt(self, prompt: Prompt, prefill: str = "") -> list[int]:
        """Ids of the conversation, the model's turn opened, and `prefill` as its first words."""
        mark = self._unused_character(prompt, prefill)
        head = self._render(prompt, mark, open_turn=True)
        if not prefill:
            return self._ids(head, mark)
        ids, prefilled = self._split(head, head + self._quote(prefill, mark), mark)
        return ids + prefilled

    def encode_response(self, prompt: Prompt, response: str) -> list[int]:
        """Ids that follow `encode_prompt(prompt)` when the model answers `response`.

        They end with exactly one EOS: what the template writes behind it is cut off, and one is
        appended where the template writes none. Raises UserError if the template renders the prompt
        differently once it is answered: training would then see another prompt than sampling.
        """
        mark = self._unused_character(prompt, response)
        head = self._render(prompt, mark, open_turn=True)
        whole = self._render((*prompt, Message("assistant", response)), mark)
        if not whole.startswith(head):
            raise UserError(
                f"chat template {self.name!r} rewrites the prompt once it is answered: what is "
                f"trained on is not what is sampled; name another with --template: {_names()}"
            )
        _, ids = self._split(head, whole, mark)
        for length, token in enumerate(ids, start=1):
            if token in self.eos_ids:
                return ids[:length]
        return [*ids, self._eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without EOS and other control tokens."""
        kept = [i for i in ids if i not in self.eos_ids]
        text: str = self.tokenizer.decode(
            kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _turn_end(self) -> set[int]:
        """The control token behind a reply, which ends responses even if it is not called EOS."""
        reply = "reply"
        text = self._render((*user("question"), Message("assistant", reply)), mark="")
        tail = text.rpartition(reply)[2]
        found = next((i for i in self._encode(tail) if i in self._control_ids), None)
        if found is None and tail.strip() and self.name != "auto":
            raise UserError(
                f"chat template {self.name!r} ends a turn with {tail.strip()!r}, which is no "
                f"special token of this tokenizer; name another with --template: {_names()}"
            )
        return set() if found is None else {found}

    def _render(self, messages: Prompt, mark: str, open_turn: bool = False) -> str:
        """The conversation as text, control-token strings of its contents between two marks."""
        quoted = [{"role": m.role, "content": self._quote(m.content, mark)} for m in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                quoted, tokenize=False, add_generation_prompt=open_turn
            )
        except Exception as error:  # a template is a program: besides jinja2's own, any kind
            why = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"chat template {self.name!r} refuses a conversation of "
                f"{', '.join(m.role for m in messages)} turns: {why}; mend it, or name another "
                f"with --template: {_names()}"
            ) from error
        return text

    def _quote(self, content: str, mark: str) -> str:
        return self._control.sub(lambda match: mark + match[0] + mark, content)

    def _unused_character(self, prompt: Prompt, text: str) -> str:
        """A character that neither the template nor the contents hold, to mark places with."""
        contents = (m.content for m in prompt)
        taken = set(str(self.tokenizer.chat_template)).union(text, *contents)
        return next(c for c in map(chr, range(0xE000, 0x110000)) if c not in taken)

    def _ids(self, text: str, mark: str) -> list[int]:
        pieces = text.split(mark)
        encoded = [self._spell(p) if i % 2 else self._encode(p) for i, p in enumerate(pieces)]
        return [i for ids in encoded for i in ids]

    def _split(self, head: str, whole: str, mark: str) -> tuple[list[int], list[int]]:
        """Ids of `head`, and ids of what `whole` says after it."""
        head_ids, ids = self._ids(head, mark), self._ids(whole, mark)
        if ids[: len(head_ids)] == head_ids:
            return head_ids, ids[len(head_ids) :]
        # A token reaches across the border. Sampling starts behind the prompt's own last token.
        return head_ids, self._ids(whole[len(head) :], mark)

    def _encode(self, text: str, as_text: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=as_text, verbose=False
        )
        return ids

    def _spell(self, token: str) -> list[int]:
        """Ids of a control token's string as plain text."""
        ids = self._encode(token, as_text=True)
        if self._control_ids.isdisjoint(ids):
            return ids
        # A word-level vocabulary knows the string as a word: only single characters are safe.
        letters = [i for c in token for i in self._encode(c, as_text=True)]
        return [i for i in letters if i not in self._control_ids]


def _shipped(name: str) -> str:
    if name not in template_names():
        raise UserError(f"unknown chat template {name!r}; known are auto, {_names()}")
    file = resources.files("srlm_fast.data") / "chat_templates" / f"{name}.jinja"
    return file.read_text("utf-8")


def _names() -> str:
    return ", ".join(template_names())
