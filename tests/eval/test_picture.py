"""Which predictions a picture shows."""

from __future__ import annotations

import torch

from granvit.data.tasks import Pair
from granvit.eval.picture import draw_predictions, sorted_columns
from granvit.eval.predict import Answered, Prediction

BOX = (0.1, 0.1, 0.5, 0.5)


def image(*predictions: Prediction) -> Answered:
    return Answered(torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8), predictions)


def located(x1: float | None) -> Prediction:
    return Prediction(Pair("caption_to_bbox", "where: fox", "[]", 0, BOX), "", x1 and (0.1, 0.1, x1, 0.5))


def named(answer: str) -> Prediction:
    return Prediction(Pair("bbox_to_caption", "what?", "a red fox", 0, BOX), answer)


def test_the_best_the_typical_and_the_worst(tmp_path):
    answered = [
        image(located(0.5), named("a red fox"), located(None)),
        image(named("a dog"), located(0.3)),
        image(named("whale"), located(0.45), located(0.2)),
    ]
    boxes = sorted_columns(answered, "caption_to_bbox", 1)
    assert [x.predictions[0].box for column in boxes.values() for x in column] == [BOX, (0.1, 0.1, 0.3, 0.5), None]
    captions = sorted_columns(answered, "bbox_to_caption", 5)
    said = {name: [x.predictions[0].answer for x in column] for name, column in captions.items()}
    assert said == {"best": ["a red fox"], "typical": ["a dog"], "worst": ["whale"]}
    assert captions["worst"][0].pixels is answered[2].pixels
    assert sorted_columns(answered, "global_caption") == {}
    draw_predictions(boxes, tmp_path / "boxes.png")
    assert (tmp_path / "boxes.png").stat().st_size > 5_000
