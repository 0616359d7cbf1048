"""A LLaVA model that reads packed images and questions, and prompts of text, boxes or regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from granvit import geometry
from granvit.errors import MissingDependencyError
from granvit.model.attention import packed_mask
from granvit.model.loss import token_losses
from granvit.model.packing import PackedBatch
from granvit.model.prompts import Prompts
from granvit.model.tower import grid_of, normalise, patch_of, vision_tokens
from granvit.nn import BoxEmbedding, RegionAttentionPool

try:
    from transformers import LlavaForConditionalGeneration
except ImportError as error:
    raise MissingDependencyError("granvit.model needs transformers: pip install granvit[train]") from error

PROMPTS = ("text", "box", "region", "mixed")

_SIGLIP = (0.5, 0.5, 0.5)


@dataclass
class Output:
    """What a step gives.

    Attributes:
        loss: scalar, the sum of `token_loss` by the number of supervised tokens; 0 where there are none.
        token_loss: ``(N,)`` float32 (float64 for a model in float64), of every supervised token in row-major order.
        token_pair: ``(N,)`` int64, the row of :attr:`PackedBatch.pairs` that each belongs to.
        tokens: ``(F, n, C)``, the vision tokens of the frames that the projector read.
        grid: rows and columns of the vision tokens.
    """

    loss: Tensor
    token_loss: Tensor
    token_pair: Tensor
    tokens: Tensor
    grid: tuple[int, int]


class GranViT(nn.Module):
    """A stock LLaVA model on packed batches; in text mode its checkpoint is all there is to it.

    The attention of the language model is what it was loaded with: ``sdpa`` takes a dense mask, ``flex_attention``
    skips what no token sees and is the one to train with on a GPU
    (``attn_implementation={"text_config": "flex_attention", "vision_config": "sdpa"}``).

    Attributes:
        llava: the model.
        region_prompt: pools the vision tokens under a ``<region>``'s box to one of the same width, which then goes
            through the projector like the others; None unless `prompt` is ``"region"`` or ``"mixed"``.
        box_prompt: embeds a ``<box>`` at the width of the language model; None unless `prompt` is ``"box"``.

    Args:
        llava: with one vision feature layer, and attention over all earlier tokens in the language model.
        prompt: how questions name a box: ``"text"`` has coordinates only; ``"box"`` has ``<box>`` tokens, ``"region"``
            ``<region>`` tokens, and ``"mixed"`` ``<region>`` tokens in some batches. All three know text too.
        mean: of the image processor.
        std: likewise.
        fused_loss: whether the language model's output layer and the cross entropy are one operation of liger-kernel,
            which keeps no logits. None is: where it can run, that is on a GPU with liger-kernel 0.8.5 or newer, a plain
            output layer, and no float64. Without it logits are made a few tokens at a time, in memory as bounded.

    Raises:
        ValueError: an option that is none of these, or a model of another kind.
    """

    region_prompt: RegionAttentionPool | None
    box_prompt: BoxEmbedding | None

    def __init__(
        self,
        llava: LlavaForConditionalGeneration,
        *,
        prompt: str = "text",
        mean: Sequence[float] = _SIGLIP,
        std: Sequence[float] = _SIGLIP,
        fused_loss: bool | None = None,
    ) -> None:
        super().__init__()
        if prompt not in PROMPTS:
            raise ValueError(f"GranViT: prompt: expected one of {', '.join(PROMPTS)}, got {prompt!r}")
        if not isinstance(llava.config.vision_feature_layer, int):
            raise ValueError(
                f"GranViT: vision_feature_layer: expected one layer, got {llava.config.vision_feature_layer}"
            )
        layers = set(getattr(llava.config.text_config, "layer_types", None) or ["full_attention"])
        if layers != {"full_attention"}:
            raise ValueError(
                f"GranViT: language model: expected full attention in every layer, got {', '.join(sorted(layers))}"
            )
        self.llava = llava
        self.prompt = prompt
        self.mean, self.std = tuple(mean), tuple(std)
        self.fused_loss = fused_loss
        vision, weight = llava.config.vision_config, llava.model.multi_modal_projector.linear_1.weight
        options = {"device": weight.device, "dtype": weight.dtype}
        self.region_prompt = self.box_prompt = None
        if prompt in ("region", "mixed"):
            self.region_prompt = RegionAttentionPool(vision.hidden_size, vision.num_attention_heads, **options)
        if prompt == "box":
            self.box_prompt = BoxEmbedding(llava.config.text_config.hidden_size, **options)

    def forward(self, batch: PackedBatch, *, wrong_image: bool = False, items: Tensor | float | None = None) -> Output:
        """The loss of every answer in a batch.

        Args:
            batch: on the device of the model.
            wrong_image: every question sees the next image of the batch in place of its own, in the prefix and under
                its ``<region>``. What that costs is the proof that images are used. Where the next image has fewer
                frames they are repeated, where it has more the last ones are left out. Text alone stays as it is.
            items: what to divide the sum of the losses by, in place of the number of supervised tokens in this batch.

        Raises:
            ValueError: the batch has prompts that the model was not made for, or another number of image tokens than
                the vision tower gives, or one image where `wrong_image` wants two.
        """
        self._check_prompt(batch.prompt)
        tokens, grid = self._see(batch.pixels)
        if tokens.shape[1] != batch.tokens_per_frame:
            raise ValueError(
                f"GranViT: tokens_per_frame: expected the {tokens.shape[1]} that the vision tower gives for frames of "
                f"{tuple(batch.pixels.shape[-2:])}, got a batch with {batch.tokens_per_frame}"
            )
        shown = tokens[_next_frames(batch.frames, tokens.device)] if wrong_image else tokens
        size = (batch.pixels.shape[-2], batch.pixels.shape[-1])
        boxes, index = batch.boxes[batch.prompt_region], batch.image_index[batch.prompt_region]
        embeds = self._embed(batch.input_ids, self.llava.model.multi_modal_projector(shown))
        embeds = self._insert(embeds, batch.prompt_place, shown, boxes, index, size)
        language = self.llava.model.language_model
        hidden = language(
            inputs_embeds=embeds,
            attention_mask=packed_mask(batch.image, batch.pair, language.config._attn_implementation),
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        labels = batch.labels.flatten()[batch.supervised]
        token_loss = token_losses(
            self.llava.lm_head, hidden.flatten(0, 1)[batch.supervised], labels, fused=self.fused_loss
        )
        total = max(len(token_loss), 1) if items is None else items
        return Output(
            loss=token_loss.sum() / total,
            token_loss=token_loss,
            token_pair=batch.pair.flatten()[batch.supervised] - 1,
            tokens=tokens,
            grid=grid,
        )

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        pixels: Tensor,
        questions: Sequence[Sequence[str]],
        boxes: Sequence[Sequence[Sequence[float] | None]] | None = None,
        *,
        frames: Sequence[int] | None = None,
        box_frames: Sequence[Sequence[int]] | None = None,
        batch_size: int = 32,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        **options: Any,
    ) -> list[list[str]]:
        """Answers questions about images by the model's own ``generate``; each image is looked at once.

        Runs in the mode that the model is in: call ``eval()`` before it.

        Args:
            prompts: the tokens of the questions.
            pixels: uint8 ``(F, 3, H, W)``, on the device of the model; of an image with tiles the overview first, as
                :func:`granvit.data.images.frames` makes them.
            questions: of each image, any number; each holds at most one kind of ``<box>`` and ``<region>``.
            boxes: of each question, ``x0 y0 x1 y1`` relative to its frame; None for a question without ``<box>`` and
                ``<region>``. Left out, none has one.
            frames: of each image, how many, 0 for questions without an image; by default one.
            box_frames: of each question, which of its image's frames its box is relative to; by default the first.
            batch_size: questions at a time.
            max_new_tokens: of an answer, at most.
            do_sample: whether answers are drawn; otherwise each token is the likeliest.
            options: for ``generate`` of transformers, for example `temperature` or `num_beams`.

        Returns:
            For each image its answers, without special tokens and white space around them.

        Raises:
            ValueError: numbers of images, questions and boxes that differ, a ``<box>`` or ``<region>`` without a box,
                or prompts that the model was not made for.
        """
        asked = _questions(questions, boxes, frames, box_frames, len(pixels))
        ids = prompts.encode_questions(
            [question.text for question in asked], [len(question.frames) > 0 for question in asked]
        )
        for question, tokens in zip(asked, ids, strict=True):
            self._check_question(question, tokens, prompts)
        seen, _ = self._see(pixels)
        features = self.llava.model.multi_modal_projector(seen)
        size = (pixels.shape[-2], pixels.shape[-1])
        ends = sorted({prompts.end_id, prompts.tokenizer.eos_token_id} - {None})
        answers: list[str] = []
        with self._attention("sdpa"):
            for begin in range(0, len(asked), batch_size):
                part = slice(begin, begin + batch_size)
                embeds, mask = self._ask(prompts, asked[part], ids[part], seen, features, size)
                made = self.llava.generate(
                    inputs_embeds=embeds,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    do_sample=do_sample,
                    eos_token_id=ends,
                    pad_token_id=prompts.pad_id,
                    **options,
                )
                answers += [text.strip() for text in prompts.tokenizer.batch_decode(made, skip_special_tokens=True)]
        rest = iter(answers)
        return [[next(rest) for _ in of_image] for of_image in questions]

    def regions(self, batch: PackedBatch) -> Tensor:
        """What the ``<region>`` tokens of all regions of a batch would be, ``(R, D)``, at the language model's width.

        Raises:
            ValueError: the model has no region prompts.
        """
        tokens, _ = self._see(batch.pixels)
        size = (batch.pixels.shape[-2], batch.pixels.shape[-1])
        return self._region_prompts(tokens, batch.boxes, batch.image_index, size)

    def _region_prompts(self, tokens: Tensor, boxes: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
        if self.region_prompt is None:
            raise ValueError(f"GranViT: expected region prompts, got a model with prompt={self.prompt!r}")
        tower = self.llava.model.vision_tower
        grid, patch = grid_of(tower, size), patch_of(tower)
        boxes = geometry.rescale(boxes, size, (grid[0] * patch[0], grid[1] * patch[1]))
        pooled: Tensor = self.llava.model.multi_modal_projector(self.region_prompt(tokens, boxes, index, grid)[:, 0])
        return pooled

    def _see(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The vision tokens of frames, and their grid.

        Without a frame the tower runs on a black one, of which nothing is kept: a stock tower takes no empty batch, a
        sharded one runs on every rank, and DDP waits for a gradient of everything that trains.
        """
        tower = self.llava.model.vision_tower
        shown = pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:])
        normal = normalise(shown, self.mean, self.std, tower.dtype)
        tokens = vision_tokens(tower, normal, self.llava.config.vision_feature_layer)[: len(pixels)]
        return tokens, grid_of(tower, (pixels.shape[-2], pixels.shape[-1]))

    def _embed(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """The language model's input, with the projected vision tokens in the places of image tokens."""
        embeds = self.llava.get_input_embeddings()(input_ids)
        places = (input_ids == self.llava.config.image_token_id)[..., None]
        return embeds.masked_scatter(places, features.to(embeds.dtype))

    def _insert(
        self, embeds: Tensor, places: Tensor, tokens: Tensor, boxes: Tensor, index: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """The same with the embeddings of boxes in their places; the heads run for no box too, so that no rank of a
        distributed run lacks their gradient."""
        if self.region_prompt is not None:
            prompt = self._region_prompts(tokens, boxes, index, size)
        elif self.box_prompt is not None:
            prompt = self.box_prompt(boxes)
        else:
            return embeds
        return embeds.flatten(0, 1).index_copy(0, places, prompt.to(embeds.dtype)).unflatten(0, embeds.shape[:2])

    def _ask(
        self,
        prompts: Prompts,
        asked: Sequence[_Question],
        ids: Sequence[list[int]],
        seen: Tensor,
        features: Tensor,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Embeddings ``(B, L, D)`` and attention mask of questions, with padding in front."""
        rows = []
        for question, tokens in zip(asked, ids, strict=True):
            # <image> stands once, or not at all.
            images = [prompts.image_id] * (len(question.frames) * seen.shape[1])
            rows.append([i for token in tokens for i in (images if token == prompts.image_id else [token])])
        length = max(map(len, rows))
        padded = torch.tensor([[prompts.pad_id] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        flat = padded.flatten()
        places = ((flat == prompts.box_id) | (flat == prompts.region_id)).nonzero()[:, 0]
        of_place = [asked[int(place) // length] for place in places]
        boxes = torch.tensor([question.box for question in of_place], dtype=torch.float32).reshape(-1, 4)
        index = torch.tensor([question.frames[question.box_frame] for question in of_place], dtype=torch.int64)
        device = seen.device
        frames = torch.tensor(
            [frame for question in asked for frame in question.frames], dtype=torch.int64, device=device
        )
        embeds = self._embed(padded.to(device), features[frames])
        embeds = self._insert(embeds, places.to(device), seen, boxes.to(device), index.to(device), size)
        return embeds, mask.to(device)

    def _check_prompt(self, kind: str) -> None:
        head = {"text": True, "box": self.box_prompt, "region": self.region_prompt}[kind]
        if head is None:
            raise ValueError(f"GranViT: expected no <{kind}> from a model with prompt={self.prompt!r}, got one")

    def _check_question(self, question: _Question, ids: list[int], prompts: Prompts) -> None:
        if ids.count(prompts.image_id) != min(len(question.frames), 1):
            raise ValueError(f"generate: questions: expected no <image> in a question, got {question.text!r}")
        for kind, token in (("box", prompts.box_id), ("region", prompts.region_id)):
            if token in ids:
                self._check_prompt(kind)
                if question.box is None or not question.frames:
                    raise ValueError(f"generate: boxes: expected one for the question {question.text!r}, got none")

    @contextmanager
    def _attention(self, implementation: str) -> Iterator[None]:
        """Another attention of the language model for a while: flex_attention compiles anew as answers grow."""
        language = self.llava.model.language_model
        before = language.config._attn_implementation
        language.set_attn_implementation(implementation)
        try:
            yield
        finally:
            language.set_attn_implementation(before)


class _Question(NamedTuple):
    """One question to generate an answer for: its text, the frames of its image, its box and the box's frame."""

    text: str
    frames: range
    box: Sequence[float] | None
    box_frame: int


def _questions(
    questions: Sequence[Sequence[str]],
    boxes: Sequence[Sequence[Sequence[float] | None]] | None,
    frames: Sequence[int] | None,
    box_frames: Sequence[Sequence[int]] | None,
    count: int,
) -> list[_Question]:
    """All questions one after the other, each with what belongs to it."""
    frames = [1] * len(questions) if frames is None else frames
    if len(frames) != len(questions) or sum(frames) != count or min(frames, default=0) < 0:
        raise ValueError(
            f"generate: questions, frames: expected a list of questions for each image of {count} frames, "
            f"got {len(questions)} lists for images of {list(frames)} frames"
        )
    shape = [len(of_image) for of_image in questions]
    boxes = [[None] * n for n in shape] if boxes is None else boxes
    box_frames = [[0] * n for n in shape] if box_frames is None else box_frames
    for name, given in (("boxes", boxes), ("box_frames", box_frames)):
        if [len(of_image) for of_image in given] != shape:
            raise ValueError(f"generate: {name}: expected one for each of the {shape} questions of the images")
    found = []
    begin = 0
    for texts, own, own_frames, many in zip(questions, boxes, box_frames, frames, strict=True):
        for text, box, frame in zip(texts, own, own_frames, strict=True):
            if not 0 <= frame < max(many, 1):
                raise ValueError(f"generate: box_frames: expected one of {many} frames, got {frame}")
            found.append(_Question(text, range(begin, begin + many), box, frame))
        begin += many
    return found


def _next_frames(frames: Sequence[int], device: torch.device) -> Tensor:
    """For each frame the one of the next image that takes its place."""
    shown = [count for count in frames if count]
    if len(shown) == 1:
        raise ValueError("GranViT: wrong_image: expected at least two images in the batch, got one")
    starts = [sum(shown[:i]) for i in range(len(shown))]
    source = []
    for i, count in enumerate(shown):
        other = (i + 1) % len(shown)
        source += [starts[other] + j % shown[other] for j in range(count)]
    return torch.tensor(source, dtype=torch.int64, device=device)
