"""Answers to questions against those of stock LLaVA, asked one by one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from granvit.model.packing import Sample, pack
from granvit.model.prompts import Prompts
from tests.model.support import (
    PATCH,
    SIZE,
    N,
    byte_level,
    processor,
    prompts_for,
    random_boxes,
    random_sample,
    stock_pixels,
    tiny,
    tiny_llava,
)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(int(torch.randint(2**31, ())))


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = byte_level()
    return prompts_for(tokenizer, tiny_llava(tokenizer))


def stock_generate(llava: LlavaForConditionalGeneration, prompts: Prompts, pixels: Tensor, question: str) -> str:
    text = prompts.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{question}"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor(processor(prompts.tokenizer, SIZE, PATCH)(text=text, images=[pixels])["input_ids"])
    ends = [prompts.end_id, prompts.tokenizer.eos_token_id]
    made = llava.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=stock_pixels(pixels[None]).to(llava.dtype),
        max_new_tokens=12,
        min_new_tokens=6,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=prompts.pad_id,
    )
    return prompts.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_generate_is_stock_generate(prompts: Prompts) -> None:
    model = tiny(prompts).eval()
    pixels = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    questions = [["what", "where is the red kite , and what is over it?"], [], ["a", "on the left of\n it", "Describe"]]
    calls: list[int] = []
    tower = model.llava.model.vision_tower
    hook = tower.get_submodule("embeddings.patch_embedding").register_forward_hook(lambda *a: calls.append(len(a[2])))
    for batch_size in (1, 2, 32):
        answers = model.generate(prompts, pixels, questions, batch_size=batch_size, max_new_tokens=12, min_new_tokens=6)
        expected = [
            [stock_generate(model.llava, prompts, image, question) for question in of_image]
            for image, of_image in zip(pixels, questions, strict=True)
        ]
        assert answers == expected
    assert any(text for of_image in expected for text in of_image)
    assert calls.count(3) == 3  # once a call
    hook.remove()
    assert model.generate(prompts, pixels[:1], [[]]) == [[]]


@pytest.mark.parametrize("prompt", ["box", "region"])
def test_generate_answers_as_the_loss_was_taught(prompts: Prompts, rng: random.Random, prompt: str) -> None:
    """What follows a question is what follows it in the packed form."""
    model = tiny(prompts, prompt).eval()
    sample = random_sample(rng, pairs=4, frames=2, token=f"<{prompt}>")
    other = random_sample(rng, pairs=2, token=f"<{prompt}>")
    samples = [sample, other]
    assert sample.frame is not None
    assert other.frame is not None
    questions = [[pair.question for pair in s.pairs] for s in samples]
    boxes = [[None if p.region is None else s.boxes[p.region].tolist() for p in s.pairs] for s in samples]
    frames = [[0 if p.region is None else int(s.frame[p.region]) for p in s.pairs] for s in samples]
    pixels = torch.cat([s.pixels for s in samples])
    made: list[Tensor] = []
    hook = model.llava.lm_head.register_forward_hook(lambda *a: made.append(a[2]))
    answers = model.generate(
        prompts, pixels, questions, boxes, frames=[2, 1], box_frames=frames, batch_size=4, max_new_tokens=1
    )
    after_questions = iter(torch.cat(made)[:, -1])
    for s, of_image in zip(samples, answers, strict=True):
        for pair, answer in zip(s.pairs, of_image, strict=True):
            made.clear()
            model(pack([Sample(s.pixels, [pair], s.boxes, s.frame)], prompts, N, 4096))
            first = made[0][0]
            torch.testing.assert_close(next(after_questions), first, rtol=1e-5, atol=1e-5)
            assert answer == prompts.tokenizer.decode([int(first.argmax())], skip_special_tokens=True).strip()
    hook.remove()


def test_generate_leaves_the_attention_as_it_was(prompts: Prompts) -> None:
    model = tiny(prompts, attention={"text_config": "flex_attention", "vision_config": "sdpa"}).eval()
    language = model.llava.model.language_model
    used: list[str] = []
    language.register_forward_pre_hook(lambda *a: used.append(language.config._attn_implementation))
    model.generate(prompts, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), [["what"]], max_new_tokens=2)
    assert set(used) == {"sdpa"}
    assert language.config._attn_implementation == "flex_attention"


def test_wrong_questions(prompts: Prompts) -> None:
    model = tiny(prompts, "box")
    pixels = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    box = random_boxes(1)[0].tolist()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("expected a list of questions for each image of 2 frames, got 1 lists", {"questions": [["a"]]}),
        ("for images of .1, 2. frames", {"questions": [["a"], []], "frames": [1, 2]}),
        ("boxes: expected one for each of the .1, 0. questions", {"questions": [["a"], []], "boxes": [[], []]}),
        ("expected one for the question 'a <box>', got none", {"questions": [["a <box>"], []]}),
        (
            "expected no <region> from a model with prompt='box'",
            {"questions": [["<region>"], []], "boxes": [[box], []]},
        ),
        ("expected no <image> in a question", {"questions": [["<image>"], []]}),
        ("expected one of 1 frames, got 1", {"questions": [["a"], []], "boxes": [[box], []], "box_frames": [[1], []]}),
    ]
    for message, options in wrong:
        with pytest.raises(ValueError, match=message):
            model.generate(prompts, pixels, **options)
