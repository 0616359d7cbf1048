"""Answers of a trained model about held-out images, beside the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from granvit.data.tasks import Pair
from granvit.eval.metrics import Box
from granvit.geometry import parse_boxes
from granvit.model.granvit import GranViT
from granvit.model.packing import Sample
from granvit.model.prompts import Prompts


@dataclass(frozen=True)
class Prediction:
    """One question, its true answer, and the model's.

    Attributes:
        pair: the question and its answer; the region is a row of the image's boxes.
        answer: what the model wrote.
        box: that it meant, relative to the frame, where it was asked for one; None where none can be read.
    """

    pair: Pair
    answer: str
    box: Box | None = None


@dataclass(frozen=True)
class Answered:
    """An image and what was asked about it.

    Attributes:
        pixels: uint8 ``(3, H, W)``, the first frame.
        predictions: in the order of the questions.
    """

    pixels: Tensor
    predictions: tuple[Prediction, ...]


@torch.no_grad()
def predict(
    model: GranViT,
    prompts: Prompts,
    samples: Sequence[Sample],
    *,
    style: str = "relative",
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> list[Answered]:
    """Asks a model the questions of samples, whose answers it does not see.

    Args:
        model: left in the mode that it was in.
        prompts: the tokens of its language model.
        samples: of one frame each, or with its tiles, but not of text alone.
        style: in which boxes are written, see :data:`granvit.geometry.BOX_STYLES`.
        max_new_tokens: of an answer, at most.
        batch_size: questions at a time.
    """
    if not samples:
        return []
    device = next(model.parameters()).device
    pixels = torch.cat([sample.pixels for sample in samples])
    size = (pixels.shape[-2], pixels.shape[-1])
    was_training = model.training
    model.eval()
    try:
        answers = model.generate(
            prompts,
            pixels.to(device),
            [[pair.question for pair in sample.pairs] for sample in samples],
            [[pair.box for pair in sample.pairs] for sample in samples],
            frames=[len(sample.pixels) for sample in samples],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
    finally:
        model.train(was_training)
    found = []
    for sample, texts in zip(samples, answers, strict=True):
        predictions = []
        for pair, text in zip(sample.pairs, texts, strict=True):
            boxes = parse_boxes(text, style, size) if pair.task == "caption_to_bbox" else []
            predictions.append(Prediction(pair, text, boxes[0] if boxes else None))
        found.append(Answered(sample.pixels[0], tuple(predictions)))
    return found
