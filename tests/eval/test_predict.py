"""Answers beside the truth: what counts as right, and what a picture of them holds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from granvit.data.tasks import Pair
from granvit.eval.picture import draw_curves, draw_predictions, read_metrics
from granvit.eval.predict import Answered, Prediction, predict, share_right
from granvit.model.packing import Sample
from tests.model.support import SIZE, byte_level, prompts_for, random_boxes, tiny, tiny_llava

BOX = (0.1, 0.2, 0.5, 0.6)


def asked(task: str, answer: str = "a red fox") -> Pair:
    return Pair(task, "where is: a red fox", answer, 0, BOX)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("a red fox", True), ("  A  red fox ", True), ("a red", False), ("a red fox.", True), ("", False)],
)
def test_a_caption_is_right_where_its_words_are(answer: str, right: bool) -> None:
    assert Prediction(asked("bbox_to_caption"), answer).right is right


@pytest.mark.parametrize(
    ("box", "right"),
    [(BOX, True), ((0.1, 0.2, 0.5, 0.41), True), ((0.1, 0.2, 0.5, 0.39), False), ((0.6, 0.7, 0.9, 0.9), False)],
)
def test_a_box_is_right_from_half_the_overlap_on(box: tuple, right: bool) -> None:
    assert Prediction(asked("caption_to_bbox"), "text", box).right is right
    assert not Prediction(asked("caption_to_bbox"), "text").right


def test_a_model_is_asked_what_it_has_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    prompts = prompts_for(tokenizer, tiny_llava(tokenizer))
    model = tiny(prompts, "region").float().train()
    samples = []
    for _ in range(3):
        boxes = random_boxes(2)
        box = tuple(boxes[1].tolist())
        pairs = [
            Pair("bbox_to_caption", "what is <region>", "fox", 1, box),
            Pair("caption_to_bbox", "where is: fox", "[0.1, 0.2, 0.3, 0.4]", 1, box),
        ]
        samples.append(Sample(torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8), pairs, boxes))
    plain = model.eval().generate(
        prompts,
        torch.cat([s.pixels for s in samples]),
        [[p.question for p in s.pairs] for s in samples],
        [[p.box for p in s.pairs] for s in samples],
        max_new_tokens=5,
    )
    model.train()
    answered = predict(model, prompts, samples, max_new_tokens=5, batch_size=4)
    assert model.training
    assert [[p.answer for p in image.predictions] for image in answered] == plain
    monkeypatch.setattr(type(model), "generate", lambda *a, **k: [["FOX", "[0.1, 0.2, 0.3, 0.4]"]] * 3)
    answered = predict(model, prompts, samples)
    assert [p.box for p in answered[0].predictions] == [None, (0.1, 0.2, 0.3, 0.4)]
    assert share_right(answered, "bbox_to_caption") == (1.0, 3)
    assert share_right(answered, "global_caption") == (0.0, 0)
    assert predict(model, prompts, []) == []


def test_pictures(tmp_path: Path) -> None:
    rng = random.Random(3)
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    captions = [Answered(pixels, (Prediction(asked("bbox_to_caption"), "a $red fox"),)) for _ in range(2)]
    boxes = [Answered(pixels, (Prediction(asked("caption_to_bbox"), "none"),)), captions[0]]
    draw_predictions({"captions": captions, "boxes": boxes}, tmp_path / "new" / "predictions.png", title="all")
    lines = [{"stage": "one", "step": i, "caption": rng.random(), "distillation": 1.0} for i in range(1, 5)]
    lines += [{"stage": "one", "step": 0, "heldout/caption": 2.0}, {"stage": "two", "step": 1, "contrastive": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(read_metrics(tmp_path / "metrics.jsonl"), tmp_path / "curves.png")
    for name in ("new/predictions.png", "curves.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert min(picture.size) > 200
            assert len(set(picture.convert("L").tobytes())) > 50  # something is drawn
