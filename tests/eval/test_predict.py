"""What a model answers to samples."""

from __future__ import annotations

import pytest
import torch

from granvit.data.tasks import Pair
from granvit.eval.predict import predict
from granvit.model.packing import Sample
from tests.model.support import SIZE, byte_level, prompts_for, random_boxes, tiny, tiny_llava


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
    assert predict(model, prompts, []) == []
