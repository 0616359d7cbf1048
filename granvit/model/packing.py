"""All questions about an image in one sequence behind one prefix, and several images in a row."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from granvit import packing
from granvit.data.record import Region
from granvit.data.tasks import Pair
from granvit.errors import UserError
from granvit.model.prompts import BOX, IMAGE, REGION, SPECIAL, Encoded, Prompts, shared_length

IGNORED = -100  # the label of a token after which nothing is supervised, as torch's cross entropy has it


class PackingError(UserError):
    """Images and questions that make no batch; the text says what to change."""


@dataclass(frozen=True)
class PairInfo:
    """One question and answer, or one conversation, of a batch, for reports.

    Attributes:
        task: what was asked: ``global_caption``, ``bbox_to_caption``, ``caption_to_bbox`` or ``chat``.
        size: :meth:`granvit.data.record.Region.size` of its box; None for the whole image.
        kind: of the record, ``natural`` or ``ocr``.
        region: row of :attr:`PackedBatch.boxes`; None for the whole image.
    """

    task: str
    size: str | None
    kind: str
    region: int | None


@dataclass(frozen=True)
class Sample:
    """One image as the model sees it, and what is asked about it.

    Attributes:
        pixels: uint8 ``(frames, 3, H, W)``. One frame, or also its tiles, which the language model sees one after the
            other: in a stock LLaVA that is ``<image>`` as many times. No frame is text alone.
        pairs: questions and answers, or conversations; :attr:`granvit.data.tasks.Pair.region` is a row of `boxes`.
        boxes: ``(R, 4)`` float32, ``x0 y0 x1 y1`` relative to the frame; also of regions that nothing is asked about.
        frame: ``(R,)`` integer, which of the frames each box is relative to; None is the first.
        kind: of the record, ``natural`` or ``ocr``.
    """

    pixels: Tensor
    pairs: Sequence[Pair]
    boxes: Tensor = field(default_factory=lambda: torch.empty(0, 4))
    frame: Tensor | None = None
    kind: str = "natural"


@dataclass
class PackedBatch:
    """Images and their questions in S rows of L tokens. Images are numbered in the order of their rows.

    Attributes:
        pixels: uint8 ``(F, 3, H, W)``, the frames in the order in which image tokens stand for them.
        input_ids: ``(S, L)`` int64; `tokens_per_frame` image tokens for each frame.
        position_ids: ``(S, L)`` int64, as if each pair were alone behind its image.
        image: ``(S, L)`` int64, which image a token belongs to; -1 in padding.
        pair: ``(S, L)`` int64, 0 in the prefix of an image, else 1 + the row of `pairs`; -1 in padding.
        labels: ``(S, L)`` int64, the token that follows, where it is supervised; -100 elsewhere.
        supervised: ``(N,)`` int64, the flat places in S*L that have a label, ascending.
        boxes: ``(R, 4)`` float32, relative to their frames.
        image_index: ``(R,)`` int64, the frame of each box.
        prompt_place: ``(P,)`` int64, flat place in S*L of each ``<box>`` or ``<region>`` token.
        prompt_region: ``(P,)`` int64, row of `boxes` that it stands for.
        pairs: of every question, in the order of the rows.
        frames: of each image, how many; 0 for text alone, which counts as an image and has no prefix.
        order: of each image, its position among the samples that were packed.
        tokens_per_frame: image tokens of a frame.
        prompt: what the places in `prompt_place` hold: ``"box"`` or ``"region"``; ``"text"`` where there are none.
        dropped: pairs that were left out, by reason.
    """

    pixels: Tensor
    input_ids: Tensor
    position_ids: Tensor
    image: Tensor
    pair: Tensor
    labels: Tensor
    supervised: Tensor
    boxes: Tensor
    image_index: Tensor
    prompt_place: Tensor
    prompt_region: Tensor
    pairs: list[PairInfo]
    frames: list[int]
    order: list[int]
    tokens_per_frame: int
    prompt: str = "text"
    dropped: Mapping[str, int] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with all tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; a ``DataLoader(pin_memory=True)`` calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {k: change(v) for k, v in values.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **changed)


@dataclass
class _Sequence:
    """One image's tokens: its prefix, and the pairs that found room behind it."""

    prefix: list[int]
    pairs: list[tuple[Pair, Encoded]]

    def length(self) -> int:
        return len(self.prefix) + sum(len(tokens.ids) for _, tokens in self.pairs)


def pack(
    samples: Sequence[Sample],
    prompts: Prompts,
    tokens_per_frame: int,
    max_length: int,
    *,
    pad_to_multiple_of: int = 1,
) -> PackedBatch:
    """Packs images with their questions into rows, the longest first, by :func:`granvit.packing.pack`.

    Left out and counted in :attr:`PackedBatch.dropped` are pairs that find no room in a row behind their image and the
    pairs before them, and pairs whose text holds a token that stands for something else: ``<image>`` anywhere,
    ``<box>`` or ``<region>`` in an answer, or in the question of a ``chat`` about no region. An image always stays, if
    need be without any pair. A conversation is one pair: it finds room whole or not at all.

    Args:
        samples: at least one; all frames of one size.
        prompts: makes the tokens.
        tokens_per_frame: image tokens that the vision tower makes of a frame.
        max_length: tokens in a row, at most.
        pad_to_multiple_of: rows are as long as the longest, rounded up to a multiple of this. With that of the row
            length's usual value, compiled code meets few shapes.

    Raises:
        PackingError: `max_length` is too short for an image, or both ``<box>`` and ``<region>`` stand in questions.
        ValueError, TypeError: wrong shapes or dtypes, frames of several sizes, or a pair that asks about a region that
            the sample does not have.
    """
    _check(samples, tokens_per_frame, max_length, pad_to_multiple_of)
    dropped: Counter[str] = Counter()
    asked = [[pair for pair in sample.pairs if not _reserved(pair, dropped)] for sample in samples]
    about = [len(sample.pixels) > 0 for sample, pairs in zip(samples, asked, strict=True) for _ in pairs]
    encoded = iter(prompts.encode([pair.said() for pairs in asked for pair in pairs], about))
    sequences = []
    for sample, pairs in zip(samples, asked, strict=True):
        tokens = [next(encoded) for _ in pairs]
        frames = len(sample.pixels)
        paired = list(zip(pairs, tokens, strict=True))
        sequences.append(_sequence(paired, prompts, frames, tokens_per_frame, max_length, dropped))
    lengths = [sequence.length() for sequence in sequences]
    rows = packing.pack(lengths, max_length)
    longest = max(1, *(sum(lengths[i] for i in row) for row in rows))  # of text alone that was left out, nothing stays
    shape = (len(rows), -(-longest // pad_to_multiple_of) * pad_to_multiple_of)
    order = [i for row in rows for i in row]
    filled = _Rows(shape, prompts)
    for row, members in enumerate(rows):
        filled.start_row(row)
        for i in members:
            filled.add_image(samples[i], sequences[i])
    ordered = [samples[i] for i in order]
    counts = [len(sample.pixels) for sample in ordered]
    offsets = np.cumsum([0, *counts])[:-1].tolist()
    return PackedBatch(
        pixels=torch.cat([sample.pixels for sample in ordered]),
        boxes=torch.cat([sample.boxes.to(torch.float32) for sample in ordered]),
        image_index=torch.cat([_frame(sample) + offset for sample, offset in zip(ordered, offsets, strict=True)]),
        frames=counts,
        order=order,
        tokens_per_frame=tokens_per_frame,
        dropped=dict(dropped),
        **filled.tensors(),
    )


def _reserved(pair: Pair, dropped: Counter[str]) -> bool:
    said = pair.said()
    foreign = pair.task == "chat" and pair.region is None  # nobody wrote its questions for these tokens
    found = any(token in text for text in said[1:] for token in SPECIAL)
    found = found or any(token in said[0] for token in (SPECIAL if foreign else (IMAGE,)))
    if found:
        dropped["special token in the text"] += 1
    return found


def _sequence(
    pairs: list[tuple[Pair, Encoded]],
    prompts: Prompts,
    frames: int,
    tokens_per_frame: int,
    max_length: int,
    dropped: Counter[str],
) -> _Sequence:
    """The prefix with its image tokens, none without an image, and of each pair what follows the prefix."""
    prefix: list[int] = []
    shared = 0
    if frames:
        ids, shared = prompts.prefix, len(prompts.prefix)
        if pairs:
            ids, shared = pairs[0][1].ids, shared_length([tokens for _, tokens in pairs], shared)
        place = ids.index(prompts.image_id)
        prefix = ids[:place] + [prompts.image_id] * (frames * tokens_per_frame) + ids[place + 1 : shared]
    if len(prefix) > max_length:
        tiled = f" with {frames} frames" if frames > 1 else ""
        raise PackingError(
            f"max_length: expected at least the {len(prefix)} tokens of an image's prefix{tiled}, got {max_length}"
        )
    kept = _Sequence(prefix, [])
    room = max_length - len(prefix)
    for pair, tokens in pairs:
        rest = Encoded(tokens.ids[shared:], None, tuple((a - shared, b - shared) for a, b in tokens.spans))
        if len(rest.ids) > room:
            dropped["longer than the row"] += 1
            continue
        room -= len(rest.ids)
        kept.pairs.append((pair, rest))
    return kept


class _Rows:
    """The rows of a batch while they are filled, image after image."""

    def __init__(self, shape: tuple[int, int], prompts: Prompts) -> None:
        self.input_ids = np.full(shape, prompts.pad_id)
        self.position_ids = np.zeros(shape, np.int64)
        self.image = np.full(shape, -1)
        self.pair = np.full(shape, -1)
        self.labels = np.full(shape, IGNORED)
        self.pairs: list[PairInfo] = []
        self.prompts: list[tuple[int, int]] = []  # place, row of the boxes
        self.kinds: set[str] = set()
        self._placeholders = {prompts.box_id: "box", prompts.region_id: "region"}
        self._row = self._used = self._images = self._boxes = 0

    def start_row(self, row: int) -> None:
        self._row, self._used = row, 0

    def add_image(self, sample: Sample, sequence: _Sequence) -> None:
        self._write(sequence.prefix, 0, 0)
        for pair, tokens in sequence.pairs:
            region = None if pair.region is None else self._boxes + pair.region
            size = None if pair.box is None else Region(pair.box).size()
            self.pairs.append(PairInfo(pair.task, size, sample.kind, region))
            begin = self._used
            self._write(tokens.ids, len(sequence.prefix), len(self.pairs))
            # The token before each token of an answer is the one that has to foretell it.
            for start, stop in tokens.spans:
                self.labels[self._row, begin + start - 1 : begin + stop - 1] = tokens.ids[start:stop]
            for i, token in enumerate(tokens.ids):
                if token in self._placeholders:
                    self._prompt(pair, token, begin + i, region)
        self._images += 1
        self._boxes += len(sample.boxes)

    def _write(self, ids: list[int], position: int, pair: int) -> None:
        span = (self._row, slice(self._used, self._used + len(ids)))
        self.input_ids[span] = ids
        self.position_ids[span] = np.arange(position, position + len(ids))
        self.image[span] = self._images
        self.pair[span] = pair
        self._used += len(ids)

    def _prompt(self, pair: Pair, token: int, column: int, region: int | None) -> None:
        if region is None:
            raise ValueError(f"pack: expected a pair with a region for the question {pair.question!r}, got none")
        self.kinds.add(self._placeholders[token])
        if len(self.kinds) > 1:
            raise PackingError(f"questions: expected {BOX} or {REGION} in all of a batch, got both")
        self.prompts.append((self._row * self.input_ids.shape[1] + column, region))

    def tensors(self) -> dict[str, Any]:
        """What the rows give to the fields of a :class:`PackedBatch`."""
        names = ("input_ids", "position_ids", "image", "pair", "labels")
        place, region = np.array(self.prompts, np.int64).reshape(-1, 2).T.copy()
        values: dict[str, Any] = {name: torch.from_numpy(getattr(self, name)) for name in names}
        return values | {
            "supervised": torch.from_numpy(np.flatnonzero(self.labels != IGNORED)),
            "prompt_place": torch.from_numpy(place),
            "prompt_region": torch.from_numpy(region),
            "pairs": self.pairs,
            "prompt": next(iter(self.kinds), "text"),
        }


def _frame(sample: Sample) -> Tensor:
    count = len(sample.boxes)
    return torch.zeros(count, dtype=torch.int64) if sample.frame is None else sample.frame.long()


def _check(samples: Sequence[Sample], tokens_per_frame: int, max_length: int, pad_to_multiple_of: int) -> None:
    if not samples:
        raise ValueError("pack: samples: expected at least one, got none")
    for name, value in (
        ("tokens_per_frame", tokens_per_frame),
        ("max_length", max_length),
        ("pad_to_multiple_of", pad_to_multiple_of),
    ):
        if value < 1:
            raise ValueError(f"pack: {name}: expected at least 1, got {value}")
    size = samples[0].pixels.shape[1:]
    for i, sample in enumerate(samples):
        pixels, boxes = sample.pixels, sample.boxes
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pack: samples[{i}].pixels: expected uint8, got {pixels.dtype}")
        if pixels.dim() != 4 or pixels.shape[1] != 3 or not min(pixels.shape[2:]):
            raise ValueError(f"pack: samples[{i}].pixels: expected (frames, 3, H, W), got {tuple(pixels.shape)}")
        if pixels.shape[1:] != size:
            raise ValueError(
                f"pack: samples[{i}].pixels: expected frames of {tuple(size)} as in samples[0], "
                f"got {tuple(pixels.shape[1:])}"
            )
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"pack: samples[{i}].boxes: expected (R, 4), got {tuple(boxes.shape)}")
        frame = _frame(sample)
        if frame.shape != boxes.shape[:1] or bool(((frame < 0) | (frame >= len(pixels))).any()):
            raise ValueError(
                f"pack: samples[{i}].frame: expected one of {len(pixels)} frames for each of {len(boxes)} boxes, "
                f"got {frame.tolist()}"
            )
        wrong = [p.region for p in sample.pairs if p.region is not None and not 0 <= p.region < len(boxes)]
        if wrong:
            raise ValueError(f"pack: samples[{i}].pairs: expected regions of {len(boxes)} boxes, got {wrong[0]}")
