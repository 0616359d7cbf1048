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
    """The tokens of one question and answer, or of a conversation.

    Attributes:
        ids: all tokens, with one image token whatever the size of the image, and none without one.
        image: place of the image token; None without one.
        spans: of each answer, the place of its first token, and the place after the token that ends the assistant's
            turn; what follows is the template's.
    """

    ids: list[int]
    image: int | None
    spans: tuple[tuple[int, int], ...]


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

    The user says ``<image>``, a line break and the question, the assistant says the answer, and so on without
    ``<image>``; a conversation without an image has none. The template is given these texts, or, where it wants lists
    of parts, an image and a text. The tokens are those of ``LlavaProcessor.apply_chat_template``, except that
    ``<image>`` stands once. A question may hold ``<box>`` or ``<region>`` in place of coordinates.

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
        if self._render(["a"]).count(IMAGE) != 1:
            self._parts = True
            if self._render(["a"]).count(IMAGE) != 1:
                raise PromptError(f"chat template: expected {IMAGE} once for a user who shows one image")
        one, two = self.encode([("what", "a"), ("1 2", "3 4")])
        self.prefix = one.ids[: shared_length([one, two], min(len(one.ids), len(two.ids)))]
        if len(self.prefix) >= min(one.spans[0][0], two.spans[0][0]):
            raise PromptError("chat template: expected it to show the user's question")
        self.end_id = one.ids[one.spans[0][1] - 1]
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad is None else pad

    def _id(self, token: str) -> int:
        added = _added_tokens(self.tokenizer)
        if token not in added:
            raise PromptError(
                f"tokenizer: expected {token} as a special token; granvit.model.prompts.add_special_tokens adds it"
            )
        return added[token]

    def _render(self, said: Sequence[str], image: bool = True) -> str:
        """The text of what user and assistant say in turns; up to where the assistant begins, where it is its turn."""
        messages: list[dict[str, Any]] = []
        for i, text in enumerate(said):
            shown = image and i == 0
            content: Any = f"{IMAGE}\n{text}" if shown else text
            if self._parts:
                content = [{"type": "image"}] * shown + [{"type": "text", "text": text}]
            messages.append({"role": ("user", "assistant")[i % 2], "content": content})
        rendered: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=len(said) % 2 == 1
        )
        return rendered

    def _tokenize(self, texts: list[str]) -> Any:
        # As ProcessorMixin.apply_chat_template: a template that writes the BOS token itself gets no second one.
        bos = self.tokenizer.bos_token
        added = bos is None or not texts[0].startswith(bos)
        return self.tokenizer(
            texts, add_special_tokens=added, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )

    def encode(self, conversations: Sequence[Sequence[str]], images: Sequence[bool] | None = None) -> list[Encoded]:
        """Tokens of questions and answers.

        Args:
            conversations: each a question and its answer, and so on in turns, none with ``<image>`` in it.
            images: of each, whether it is about an image; by default all are.

        Raises:
            PromptError: a chat template that begins or ends the assistant's turn in another way than expected, or
                writes earlier turns anew as a conversation goes on.
        """
        if not conversations:
            return []
        images = [True] * len(conversations) if images is None else images
        texts = [self._render(said, image) for said, image in zip(conversations, images, strict=True)]
        tokens = self._tokenize(texts)
        return [
            Encoded(ids, ids.index(self.image_id) if image else None, self._spans(said, image, text, ids, places))
            for said, image, text, ids, places in zip(
                conversations, images, texts, tokens["input_ids"], tokens["offset_mapping"], strict=True
            )
        ]

    def _spans(
        self, said: Sequence[str], image: bool, text: str, ids: list[int], places: list[tuple[int, int]]
    ) -> tuple[tuple[int, int], ...]:
        """Where among the tokens of a text each answer stands."""
        spans = []
        for turn in range(1, len(said), 2):
            begin, end = _answer_span(text, self._render(said[:turn], image), said[turn].strip())
            written = text if turn + 1 == len(said) else self._render(said[: turn + 1], image)
            if not text.startswith(written):
                raise PromptError(
                    "chat template: expected earlier turns to stay as they are in a longer conversation, "
                    f"got {text!r} after {written!r}"
                )
            start = next((i for i, (_, last) in enumerate(places) if last > begin), len(ids))
            # Of the template's text for this turn: the next one's would teach the model to go on by itself.
            turn_end = (
                i for i in range(start, len(ids)) if end <= places[i][0] < len(written) and ids[i] in self._ends
            )
            stop = next(turn_end, None)
            if stop is None:
                raise PromptError(
                    "chat template: expected a special token at the end of the assistant's turn, "
                    f"got {written[end:]!r}; a model could not learn where to stop"
                )
            spans.append((start, stop + 1))
        return tuple(spans)

    def encode_questions(self, questions: Sequence[str], images: Sequence[bool] | None = None) -> list[list[int]]:
        """Tokens up to where the assistant begins, for generation; one image token among them, but where `images` says
        that there is no image."""
        if not questions:
            return []
        images = [True] * len(questions) if images is None else images
        texts = [self._render([question], image) for question, image in zip(questions, images, strict=True)]
        ids: list[list[int]] = self._tokenize(texts)["input_ids"]
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
    """How many tokens at the start are the same in all, which have an image, at most `limit`; at least up to it.

    Raises:
        PromptError: they differ in front of the image.
    """
    first = encoded[0]
    shared = limit
    for other in encoded[1:]:
        pairs = zip(first.ids[:shared], other.ids[:shared], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(shared, len(first.ids), len(other.ids)))
    if first.image is None or shared <= first.image:
        raise PromptError("chat template: expected the same tokens in front of every image")
    return shared


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the tokens that are cut out of a text before anything else sees it."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
