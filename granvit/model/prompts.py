"""Questions and answers as tokens, with the chat template of any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from granvit.errors import MissingDependencyError, UserError

try:
    from transformers import AddedToken, LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase
except ImportError as error:
    raise MissingDependencyError("granvit.model needs transformers: pip install granvit[train]") from error

IMAGE, BOX, REGION = "<image>", "<box>", "<region>"
SPECIAL = (IMAGE, BOX, REGION)

# Resized embeddings get a multiple of this many rows: a matrix product of an odd width is slow on tensor cores.
_ROWS = 64


class PromptError(UserError):
    """A tokenizer or a chat template that makes no prompt; the text says what it lacks."""


class Encoded(NamedTuple):
    """The tokens of one question and answer.

    Attributes:
        ids: all tokens, with one image token whatever the size of the image.
        image: place of the image token.
        start: place of the first token of the answer.
        stop: place after the token that ends the assistant's turn; what follows is the template's.
    """

    ids: list[int]
    image: int
    start: int
    stop: int


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> None:
    """Makes ``<image>``, ``<box>`` and ``<region>`` tokens of their own, and gives the model room for them.

    Their embeddings are never read, since what they stand for takes their places. So no embedding grows where its
    matrix has rows that the tokenizer does not use, as Qwen's has; only where it has not, it grows to :func:`rows`, and
    the output layer with it, by the mean of what was there: such rows are as unlikely an answer as any. Tokens that are
    there already stay as they are.

    Args:
        tokenizer: changed in place.
        model: a language model, or a LLaVA, which is also told which token stands for an image; changed in place.
    """
    known = _added_tokens(tokenizer)
    # Added one way for all tokenizers: as special tokens they are cut out of the text before anything else sees it.
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL if t not in known], True)
    if model is None:
        return
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    old = model.get_input_embeddings().num_embeddings
    if rows(old, max(ids) + 1) > old:
        model.resize_token_embeddings(rows(old, max(ids) + 1), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[old:] = layer.weight[:old].mean(0)
    if isinstance(model, LlavaForConditionalGeneration):
        model.config.image_token_id = ids[0]


def rows(has: int, tokens: int) -> int:
    """Rows of an embedding that has room for so many tokens: those that it has, or a multiple of 64."""
    return has if tokens <= has else -(-tokens // _ROWS) * _ROWS


class Prompts:
    """Turns questions and answers into tokens as the model's own chat template has them.

    The conversation is one turn: the user says ``<image>``, a line break and the question, the assistant says the
    answer. The template is given that text, or, where it wants a list of parts, an image and a text. The tokens are
    those of ``LlavaProcessor.apply_chat_template``, except that ``<image>`` stands once. A question may hold ``<box>``
    or ``<region>`` in place of coordinates.

    Attributes:
        tokenizer: the tokenizer.
        image_id, box_id, region_id: of the special tokens.
        pad_id: what to fill up with.
        end_id: of the token that ends the assistant's turn.
        prefix: the tokens in front of every question, one image token among them.

    Args:
        tokenizer: with a chat template and the special tokens of :func:`add_special_tokens`. Only one that
            ``tokenizers`` runs knows which characters a token stands for.

    Raises:
        PromptError: the tokenizer lacks one of these, or its chat template shows no image, or does not end a turn of
            the assistant with a special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise PromptError(
                f"tokenizer: expected one that the tokenizers library runs, got {type(tokenizer).__name__}"
            )
        if tokenizer.chat_template is None:
            raise PromptError("tokenizer: expected a chat template, got none; set tokenizer.chat_template")
        self.tokenizer = tokenizer
        self.image_id, self.box_id, self.region_id = (self._id(token) for token in SPECIAL)
        ends = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ends = ends.union(tokenizer.all_special_ids) - {self.image_id, self.box_id, self.region_id}
        self._parts = False
        if self._render("a", None).count(IMAGE) != 1:
            self._parts = True
            if self._render("a", None).count(IMAGE) != 1:
                raise PromptError(f"chat template: expected {IMAGE} once for a user who shows one image")
        one, two = self.encode([("what", "a"), ("1 2", "3 4")])
        self.prefix = one.ids[: shared_length([one, two], one.image + 1 + min(len(one.ids), len(two.ids)))]
        if len(self.prefix) >= min(one.start, two.start):
            raise PromptError("chat template: expected it to show the user's question")
        self.end_id = one.ids[one.stop - 1]
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad is None else pad

    def _id(self, token: str) -> int:
        added = _added_tokens(self.tokenizer)
        if token not in added:
            raise PromptError(
                f"tokenizer: expected {token} as a special token; granvit.model.prompts.add_special_tokens adds it"
            )
        return added[token]

    def _render(self, question: str, answer: str | None) -> str:
        """The text of the conversation; up to where the assistant begins, where there is no answer."""
        said: list[tuple[str, Any]] = [("user", f"{IMAGE}\n{question}")]
        if answer is not None:
            said.append(("assistant", answer))
        if self._parts:
            text = {"type": "text", "text": question}
            said[0] = ("user", [{"type": "image"}, text])
            said[1:] = [(role, [{"type": "text", "text": text}]) for role, text in said[1:]]
        messages = [{"role": role, "content": content} for role, content in said]
        rendered: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None
        )
        return rendered

    def _tokenize(self, texts: list[str]) -> Any:
        # As ProcessorMixin.apply_chat_template: a template that writes the BOS token itself gets no second one.
        bos = self.tokenizer.bos_token
        added = bos is None or not texts[0].startswith(bos)
        return self.tokenizer(
            texts, add_special_tokens=added, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Tokens of questions and answers.

        Args:
            pairs: of question and answer, neither with ``<image>`` in it.

        Raises:
            PromptError: a chat template that begins or ends the assistant's turn in another way than expected.
        """
        if not pairs:
            return []
        texts = [self._render(question, answer) for question, answer in pairs]
        tokens = self._tokenize(texts)
        encoded = []
        for (question, answer), text, ids, spans in zip(
            pairs, texts, tokens["input_ids"], tokens["offset_mapping"], strict=True
        ):
            begin, end = _answer_span(text, self._render(question, None), answer.strip())
            start = next((i for i, (_, last) in enumerate(spans) if last > begin), len(ids))
            turn_end = (i for i in range(start, len(ids)) if spans[i][0] >= end and ids[i] in self._ends)
            stop = next(turn_end, None)
            if stop is None:
                raise PromptError(
                    "chat template: expected a special token at the end of the assistant's turn, "
                    f"got {text[end:]!r}; a model could not learn where to stop"
                )
            encoded.append(Encoded(ids, ids.index(self.image_id), start, stop + 1))
        return encoded

    def encode_questions(self, questions: Sequence[str]) -> list[list[int]]:
        """Tokens up to where the assistant begins, one image token among them, for generation."""
        if not questions:
            return []
        ids: list[list[int]] = self._tokenize([self._render(question, None) for question in questions])["input_ids"]
        return ids


def _answer_span(text: str, prompt: str, answer: str) -> tuple[int, int]:
    """Where in the text the answer begins (with the white space before it), and where it ends."""
    found = text.find(answer, len(prompt))
    if not text.startswith(prompt) or found < 0 or text[len(prompt) : found].strip():
        raise PromptError(
            "chat template: expected the generation prompt, then the answer as it is, "
            f"got {text!r} after the generation prompt {prompt!r}"
        )
    return len(prompt), found + len(answer)


def shared_length(encoded: Sequence[Encoded], limit: int) -> int:
    """How many tokens at the start are the same in all, at most `limit`; at least up to the image.

    Raises:
        PromptError: they differ in front of the image.
    """
    first = encoded[0]
    shared = limit
    for other in encoded[1:]:
        pairs = zip(first.ids[:shared], other.ids[:shared], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(shared, len(first.ids), len(other.ids)))
    if shared <= first.image:
        raise PromptError("chat template: expected the same tokens in front of every image")
    return shared


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the tokens that are cut out of a text before anything else sees it."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
