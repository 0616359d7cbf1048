"""Packed batches against stock LLaVA run on each question alone."""

from __future__ import annotations

import copy
import logging
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from granvit.data.tasks import Pair
from granvit.model import loss as loss_module
from granvit.model.granvit import GranViT, Output
from granvit.model.loss import token_losses
from granvit.model.packing import PackedBatch, Sample, pack
from granvit.model.prompts import Prompts
from tests.model.support import (
    PATCH,
    SIZE,
    N,
    byte_level,
    processor,
    prompts_for,
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


def alone(model: GranViT, prompts: Prompts, sample: Sample, pair: Pair) -> Tensor:
    """Losses of one pair's supervised tokens from stock LLaVA, in a sequence of its own."""
    llava = model.llava
    stock = processor(prompts.tokenizer, sample.pixels.shape[-1], PATCH)
    messages = [
        {"role": "user", "content": f"<image>\n{pair.question}"},
        {"role": "assistant", "content": pair.answer},
    ]
    begin = prompts.tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = prompts.tokenizer.apply_chat_template(messages, tokenize=False)
    frames = len(sample.pixels)
    first, ids = (
        torch.tensor(stock(text=text.replace("<image>", "<image>" * frames), images=list(sample.pixels))["input_ids"])
        for text in (begin, whole)
    )
    start = first.shape[1]
    stop = start + int((ids[0, start:] == prompts.end_id).nonzero()[0]) + 1
    pixel_values = stock_pixels(sample.pixels)
    if pair.region is None or not ({prompts.box_id, prompts.region_id} & set(ids[0].tolist())):
        logits = llava(input_ids=ids, pixel_values=pixel_values).logits
    else:
        logits = llava(inputs_embeds=by_hand(model, prompts, sample, pair, ids, pixel_values)).logits
    return F.cross_entropy(logits[0, start - 1 : stop - 1], ids[0, start:stop], reduction="none")


def by_hand(model: GranViT, prompts: Prompts, sample: Sample, pair: Pair, ids: Tensor, pixel_values: Tensor) -> Tensor:
    """The input embeddings with the image's and the box's put in one by one."""
    inner = model.llava.model
    hidden = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]
    rows = list(inner.language_model.embed_tokens(ids)[0])
    features = iter(inner.multi_modal_projector(hidden).flatten(0, 1))
    side = pixel_values.shape[-1]
    box = sample.boxes[pair.region][None] * (side / (side // PATCH * PATCH))  # the grid may end before the frame does
    frame = int(sample.frame[pair.region]) if sample.frame is not None else 0
    for i, token in enumerate(ids[0].tolist()):
        if token == prompts.image_id:
            rows[i] = next(features)
        elif token == prompts.box_id:
            rows[i] = model.box_prompt(box)[0]
        elif token == prompts.region_id:
            pooled = model.region_prompt(hidden[frame][None], box, torch.zeros(1, dtype=torch.int64), (3, 3))
            rows[i] = inner.multi_modal_projector(pooled[0, 0])
    return torch.stack(rows)[None]


def gradients(model: GranViT) -> dict[str, Tensor | None]:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Up to the float32 in which transformers' RMSNorm and rotary embedding compute whatever the model's dtype."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None or not actual[name].any(), name
        else:
            error = (actual[name] - gradient).norm()
            assert error <= 1e-5 * gradient.norm() + 1e-9, (name, float(error), float(gradient.norm()))


def samples_for(rng: random.Random, token: str = "", frames: int = 1, size: int = SIZE) -> list[Sample]:
    counts = [(rng.randint(2, 5), rng.randint(1, frames)) for _ in range(8)]
    return [random_sample(rng, pairs=pairs, size=size, frames=own, token=token) for pairs, own in counts]


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("prompt", "token", "frames", "size"),
    [
        ("text", "", 1, 24),
        ("text", "", 3, 29),
        ("box", "<box>", 1, 24),
        ("region", "<region>", 2, 24),
        ("region", "<region>", 1, 29),
        ("mixed", "", 1, 24),
    ],
)
def test_a_packed_batch_is_every_pair_alone(
    prompts: Prompts, rng: random.Random, text: str, prompt: str, token: str, frames: int, size: int
) -> None:
    model = tiny(prompts, prompt, text=text, size=size)
    samples = samples_for(rng, token, frames, size)
    batch = pack(samples, prompts, N, 400, pad_to_multiple_of=7)
    assert not any(batch.dropped.values())
    assert len(batch.input_ids) > 1
    assert (batch.image < 0).any()
    assert batch.prompt == (prompt if token else "text")

    output = model(batch)
    output.loss.backward()
    actual = gradients(model)

    losses = [alone(model, prompts, samples[i], pair) for i in batch.order for pair in samples[i].pairs]
    expected = torch.cat(losses)
    (expected.sum() / len(expected)).backward()
    torch.testing.assert_close(output.token_loss, expected.detach(), rtol=1e-5, atol=1e-6, check_dtype=True)
    torch.testing.assert_close(output.loss, expected.detach().mean(), rtol=1e-6, atol=0)
    owner = [i for i, of_pair in enumerate(losses) for _ in of_pair]
    assert output.token_pair.tolist() == owner
    assert_same_gradients(actual, gradients(model))


def test_the_vision_tower_runs_once(prompts: Prompts, rng: random.Random) -> None:
    model = tiny(prompts, "region")
    batch = pack(samples_for(rng, "<region>", 2), prompts, N, 400)
    calls: list[Tensor] = []
    read: list[Tensor] = []
    tower = model.llava.model.vision_tower
    tower.get_submodule("embeddings.patch_embedding").register_forward_hook(lambda *a: calls.append(a[1][0]))
    model.llava.model.multi_modal_projector.register_forward_hook(lambda *a: read.append(a[1][0]))
    output = model(batch)
    assert len(calls) == 1
    assert calls[0].shape[0] == sum(batch.frames)
    assert read[0] is output.tokens  # for the distillation loss
    assert output.tokens.shape == (sum(batch.frames), N, 16)
    assert output.grid == (3, 3)


def test_no_pair_sees_another(prompts: Prompts, rng: random.Random) -> None:
    model = tiny(prompts, dtype=torch.float32)
    samples = samples_for(rng)
    samples[2] = random_sample(rng, pairs=3)
    before = pack(samples, prompts, N, 400)
    changed = copy.deepcopy(before)
    for pair in range(1, len(before.pairs) + 1):
        # Other tokens of the same number, so that not even the shapes of the matrix products differ.
        own = changed.pair == pair
        changed.input_ids[own] = torch.where(before.input_ids[own] == 5, 6, 5)
        first, second = model(before), model(changed)
        others = first.token_pair != pair - 1
        assert torch.equal(first.token_loss[others], second.token_loss[others])
        assert not torch.equal(first.token_loss[~others], second.token_loss[~others])
        changed = copy.deepcopy(before)


def test_wrong_image_shows_the_next_image_everywhere(prompts: Prompts, rng: random.Random) -> None:
    model = tiny(prompts, "region")
    frames = [1, 3, 2, 1, 2]
    samples = [random_sample(rng, pairs=3, frames=count, token="<region>") for count in frames]
    batch = pack(samples, prompts, N, 400)
    wrong = model(batch, wrong_image=True)
    right = model(batch)
    images = list(batch.pixels.split(batch.frames))
    replaced = []
    for own, other in zip(images, images[1:] + images[:1], strict=True):
        replaced += [other[i % len(other)] for i in range(len(own))]
    other = copy.deepcopy(batch)
    other.pixels = torch.stack(replaced)
    torch.testing.assert_close(wrong.token_loss, model(other).token_loss)
    assert torch.equal(wrong.tokens, right.tokens)  # what is distilled is of the frames themselves
    assert not torch.allclose(wrong.token_loss, right.token_loss)
    with pytest.raises(ValueError, match="expected at least two images in the batch, got one"):
        model(pack(samples[:1], prompts, N, 400), wrong_image=True)


def test_batches_without_answers_or_padding(prompts: Prompts, rng: random.Random) -> None:
    model = tiny(prompts, "region")
    bare = Sample(torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8), [])
    output = model(pack([bare, bare], prompts, N, 64))
    assert output.loss == 0
    assert output.token_loss.shape == output.token_pair.shape == (0,)
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    sample = random_sample(rng, pairs=2)
    batch = pack([sample], prompts, N, 200)
    whole = model(batch)
    torch.testing.assert_close(model(batch, items=7.0).loss, whole.token_loss.sum() / 7)
    torch.testing.assert_close(model(pack([sample], prompts, N, 200, pad_to_multiple_of=64)).loss, whole.loss)


def test_flex_attention_gives_the_loss_of_the_dense_mask(prompts: Prompts, rng: random.Random) -> None:
    model = tiny(prompts, dtype=torch.float32)
    batch = pack(samples_for(rng), prompts, N, 400)
    with torch.no_grad():
        dense = model(batch)
        model.llava.model.language_model.set_attn_implementation("flex_attention")
        blocks = model(batch)
    torch.testing.assert_close(blocks.token_loss, dense.token_loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", ["text", "box", "region"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(prompts: Prompts, rng: random.Random, prompt: str, autocast: bool) -> None:
    model = tiny(prompts, prompt, dtype=torch.float32)
    batch = pack(samples_for(rng, "" if prompt == "text" else f"<{prompt}>"), prompts, N, 400)
    exact = model(batch).loss
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch)
    else:
        output = model.bfloat16()(batch)
    assert output.token_loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact, rtol=0.05, atol=0.05)
    output.loss.backward()
    trained = [p.grad for name, p in model.named_parameters() if "post_layernorm" not in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in trained)


def test_with_a_frozen_language_model_only_the_rest_gets_gradients(prompts: Prompts, rng: random.Random) -> None:
    model = tiny(prompts, "region")
    batch = pack(samples_for(rng, "<region>"), prompts, N, 400)
    model(batch).loss.backward()
    whole = gradients(model)
    frozen = [name for name, _ in model.named_parameters() if "language_model" in name or "lm_head" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    model(batch).loss.backward()
    rest = gradients(model)
    assert all(rest[name] is None for name in frozen)
    assert_same_gradients(rest, {name: None if name in frozen else gradient for name, gradient in whole.items()})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(prompts: Prompts, rng: random.Random) -> None:
    """Blocks in place of the dense mask, and the fused loss where it is installed, with gradients."""
    model = tiny(prompts, "mixed", dtype=torch.float32, width=32).cuda()
    batch = pack(samples_for(rng, "<region>"), prompts, N, 400, pad_to_multiple_of=128).to("cuda")
    model.fused_loss = False
    dense = model(batch)
    dense.loss.backward()
    expected = gradients(model)
    model.fused_loss = None
    model.llava.model.language_model.set_attn_implementation("flex_attention")
    blocks = model(batch)
    blocks.loss.backward()
    torch.testing.assert_close(blocks.token_loss, dense.token_loss, rtol=1e-3, atol=1e-3)
    for name, gradient in gradients(model).items():
        if gradient is not None and expected[name] is not None:
            assert (gradient - expected[name]).norm() <= 1e-2 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_losses_in_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = torch.nn.Linear(8, 50, bias=False).double()
    hidden = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, (17,))
    weights = torch.rand(17, dtype=torch.float64)
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", rows * 50)
    most: list[int] = []
    head.register_forward_hook(lambda *a: most.append(len(a[2])))
    losses = token_losses(head, hidden, labels)
    actual = torch.autograd.grad((losses * weights).sum(), [hidden, head.weight])
    expected = F.cross_entropy(hidden @ head.weight.T, labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    for a, b in zip(actual, torch.autograd.grad((expected * weights).sum(), [hidden, head.weight]), strict=True):
        torch.testing.assert_close(a, b)
    assert max(most) == min(rows, 17)
    assert token_losses(head.bfloat16(), hidden.bfloat16(), labels).dtype == torch.float32


def test_the_fused_loss_says_why_it_cannot_run(prompts: Prompts, rng: random.Random, caplog: Any) -> None:
    loss_module._announce.cache_clear()
    model = tiny(prompts)
    batch = pack([random_sample(rng, pairs=1)], prompts, N, 200)
    with caplog.at_level(logging.INFO, logger="granvit.model.loss"):
        model(batch)
        model(batch)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["cross entropy: torch, a few tokens at a time (the model is not on a GPU)"]
    model.fused_loss = True
    with pytest.raises(
        ValueError, match="fused_loss: expected what liger-kernel can run, but the model is not on a GPU"
    ):
        model(batch)


def test_wrong_input(prompts: Prompts, rng: random.Random) -> None:
    model = tiny(prompts)
    regions = pack([random_sample(rng, pairs=4, token="<region>")], prompts, N, 400)
    with pytest.raises(ValueError, match="expected no <region> from a model with prompt='text', got one"):
        model(regions)
    with pytest.raises(ValueError, match="prompt: expected one of text, box, region, mixed, got 'boxes'"):
        GranViT(model.llava, prompt="boxes")
    with pytest.raises(ValueError, match="expected the 9 that the vision tower gives for frames of .* with 4"):
        model(pack([random_sample(rng, pairs=1)], prompts, 4, 400))
    eager = tiny(prompts, attention="eager")
    with pytest.raises(ValueError, match="expected sdpa or flex_attention, got 'eager'"):
        eager(pack([random_sample(rng, pairs=1)], prompts, N, 400))
    sliding = tiny_llava(prompts.tokenizer, text="qwen2")
    sliding.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(
        ValueError, match="expected full attention in every layer, got full_attention, sliding_attention"
    ):
        GranViT(sliding)
    several = tiny_llava(prompts.tokenizer)
    several.config.vision_feature_layer = [-2, -1]
    with pytest.raises(ValueError, match="vision_feature_layer: expected one layer"):
        GranViT(several)


def test_a_batch_and_an_output_are_plain_data(prompts: Prompts, rng: random.Random) -> None:
    batch = pack([random_sample(rng, pairs=2)], prompts, N, 400)
    assert isinstance(copy.deepcopy(batch), PackedBatch)
    assert isinstance(tiny(prompts)(batch), Output)
