"""The contrastive objective: a loop over pairs of regions and captions."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from granvit.data.tasks import Pair
from granvit.model.granvit import GranViT
from granvit.model.packing import PackedBatch, Sample
from granvit.model.prompts import Prompts, add_special_tokens
from granvit.recipe import Stage
from granvit.train.objective import Counts, Objective
from tests.model.support import SIZE, byte_level, tiny, words
from tests.train.test_objective import assert_close, packed, whole_pixel_boxes


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    return Prompts(tokenizer)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(int(torch.randint(1 << 40, ())))


def contrasting(model: GranViT, regions: int = 8) -> Objective:
    stage = Stage("warm", ("vision", "prompts"), objective="contrastive", regions=regions, batch_size=2, steps=1)
    return Objective(model, stage)


def captioned(rng: random.Random, answers: Sequence[str | None]) -> list[Sample]:
    """Two images whose regions have these captions between them; those of None are not asked about."""
    samples = []
    for half in (answers[0::2], answers[1::2]):
        pixels = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
        pairs = [Pair("bbox_to_caption", words(rng), text, i) for i, text in enumerate(half) if text is not None]
        rng.shuffle(pairs)
        samples.append(Sample(pixels, pairs, whole_pixel_boxes(len(half))))
    return samples


def caption_rows(batch: PackedBatch, samples: Sequence[Sample]) -> dict[int, str]:
    """The caption of each region of a batch."""
    found, begin = {}, 0
    for number in batch.order:
        found |= {begin + pair.region: pair.answer for pair in samples[number].pairs if pair.region is not None}
        begin += len(samples[number].boxes)
    return found


def mean_words(objective: Objective, prompts: Prompts, captions: dict[int, str]) -> dict[int, Tensor]:
    """Of each caption, the mean embedding of its tokens, float64."""
    table = objective.model.llava.get_input_embeddings().weight.detach().double()
    found = {}
    for row, caption in captions.items():
        encoded = prompts.encode([("what", caption)])[0]
        ((start, stop),) = encoded.spans
        found[row] = table[torch.tensor(encoded.ids[start : stop - 1])].mean(0)
    return found


def plain_contrast(objective: Objective, prompts: Prompts, regions: Tensor, captions: dict[int, str]) -> list[Tensor]:
    """Pair by pair in float64: the sigmoid loss, and the distance."""
    assert objective.contrast is not None
    texts = mean_words(objective, prompts, captions)
    centre = sum(texts.values()) / len(texts)
    scale, bias = objective.contrast.scale.double().exp(), objective.contrast.bias.double()
    total = torch.zeros((), dtype=torch.float64)
    for i in captions:
        for j in captions:
            image, text = regions[i].double() - centre, (texts[j] - centre).detach()
            cosine = image @ text / image.norm() / text.norm()
            sign = 1 if captions[i] == captions[j] else -1
            total = total - torch.log(torch.sigmoid(sign * (scale * cosine + bias)))
    apart = sum(((regions[i].double() - texts[i]) ** 2).sum() for i in captions)
    return [total / len(captions), apart / sum((text**2).sum() for text in texts.values())]


def different(rng: random.Random, count: int) -> list[str]:
    """Captions of which no two have the same words."""
    found: dict[tuple[str, ...], str] = {}
    while len(found) < count:
        caption = words(rng)
        found.setdefault(tuple(sorted(caption.split())), caption)
    return list(found.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_contrast_is_a_loop_over_pairs(prompts: Prompts, rng: random.Random, dtype: torch.dtype) -> None:
    objective = contrasting(tiny(prompts, "region", dtype=dtype))
    assert objective.contrast is not None
    with torch.no_grad():
        objective.contrast.scale.add_(torch.randn(()) * 0.2)
        objective.contrast.bias.add_(torch.randn(()) * 0.2)
    a, b, c, d, e = different(rng, 5)
    # Captions that come again, in the same image and in the other, and regions that nothing is asked about.
    samples = captioned(rng, [a, a, b, None, None, c, a, d, b, e])
    batch = packed(samples, prompts)
    captions = caption_rows(batch, samples)
    assert len(captions) == 8
    micro = objective.micro(batch)
    losses = objective(micro)
    expected = plain_contrast(objective, prompts, objective.model.regions(batch), captions)
    assert_close([losses.total, losses.contrastive, losses.alignment], [sum(expected), *expected], 1e-5)
    parameters = [*objective.contrast.parameters(), *objective.tower.encoder.parameters()]
    found, wanted = (torch.autograd.grad(total, parameters) for total in (losses.total, sum(expected)))
    assert_close(found, wanted, 1e-4)


def test_accuracy_is_the_share_of_regions_nearest_to_their_words(prompts: Prompts, rng: random.Random) -> None:
    """By cosines in float64, one region after the other."""
    objective = contrasting(tiny(prompts, "region", dtype=torch.float64))
    a, b, c, d = different(rng, 4)
    samples = captioned(rng, [a, b, a, None, c, d, b, a])
    batch = packed(samples, prompts)
    captions = caption_rows(batch, samples)
    micro = objective.micro(batch)
    regions = objective.model.regions(batch).detach()
    texts = mean_words(objective, prompts, captions)
    centre = sum(texts.values()) / len(texts)
    hits = 0
    for row in captions:
        own = regions[row] - centre
        cosines = {other: float(F.cosine_similarity(own, text - centre, dim=0)) for other, text in texts.items()}
        nearest = max(cosines, key=cosines.__getitem__)
        hits += captions[nearest] == captions[row]
    assert float(objective(micro).accuracy) == pytest.approx(hits / len(captions))
    half = Counts(micro.tokens, 2 * micro.cells)  # the other half of a step adds its own share
    assert float(objective(micro, half).accuracy) == pytest.approx(hits / len(captions) / 2)


def test_regions_that_are_their_captions_are_all_hits(
    prompts: Prompts, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = contrasting(tiny(prompts, "region", dtype=torch.float32))
    assert objective.contrast is not None
    micro = objective.micro(packed(captioned(rng, different(rng, 7)), prompts))
    words_of = objective.contrast._captions(objective.model, micro.batch)
    for sign, share in ((1, 1.0), (-1, 0.0)):
        regions = words_of.mean(0) + sign * (words_of - words_of.mean(0))
        monkeypatch.setattr(GranViT, "regions", lambda self, batch, value=regions: value)
        assert float(objective(micro).accuracy) == share


@pytest.mark.parametrize("count", [1, 3, 4])
def test_regions_with_one_caption_are_all_positives(prompts: Prompts, rng: random.Random, count: int) -> None:
    """Less their mean nothing is left of them but rounding, so the bias alone decides."""
    objective = contrasting(tiny(prompts, "region", dtype=torch.float32))
    assert objective.contrast is not None
    caption = words(rng)
    samples = captioned(rng, [caption] * count)
    loss = objective(objective.micro(packed(samples, prompts))).contrastive
    expected = -count * F.logsigmoid(objective.contrast.bias)
    assert_close([loss], [expected], 1e-2)


def test_no_region_without_a_caption_counts(prompts: Prompts, rng: random.Random) -> None:
    model = tiny(prompts, "region", dtype=torch.float32)
    objective = contrasting(model)
    a, b, c = different(rng, 3)
    few = captioned(rng, [a, b, c])
    more = [Sample(s.pixels, s.pairs, torch.cat([s.boxes, whole_pixel_boxes(4)])) for s in few]
    one, other = (objective.micro(packed(samples, prompts)) for samples in (few, more))
    assert one.cells == other.cells == 3
    assert_close([objective(other).total], [objective(one).total], 1e-5)


def test_shares_of_contrast_are_weighed_by_their_regions(prompts: Prompts, rng: random.Random) -> None:
    objective = contrasting(tiny(prompts, "region", dtype=torch.float32))
    answers = different(rng, 9)
    shares = [
        objective.micro(packed(captioned(rng, part), prompts))
        for part in (answers[:2], [*answers[2:7], None, None, None], answers[7:])
    ]
    counts = Counts(sum(m.tokens for m in shares), sum(m.cells for m in shares))
    assert counts.cells == 9
    expected = sum((objective(micro).total * n for micro, n in zip(shares, (2, 5, 2), strict=True)), torch.zeros(()))
    assert_close([sum((objective(m, counts).total for m in shares), torch.zeros(()))], [expected / 9], 1e-5)


def test_without_any_caption_the_contrast_is_zero_with_a_zero_gradient(prompts: Prompts, rng: random.Random) -> None:
    objective = contrasting(tiny(prompts, "region", dtype=torch.float32))
    losses = objective(objective.micro(packed(captioned(rng, [None, None, None]), prompts)))
    assert float(losses.contrastive) == float(losses.alignment) == float(losses.accuracy) == 0
    losses.total.backward()
    grads = [p.grad for p in objective.parameters() if p.grad is not None]
    assert grads
    assert not any(bool(g.any()) for g in grads)


def test_autocast_rounds_the_tower_and_not_the_contrast(prompts: Prompts, rng: random.Random) -> None:
    objective = contrasting(tiny(prompts, "region", dtype=torch.float32))
    samples = captioned(rng, different(rng, 8))
    batch = packed(samples, prompts)
    micro = objective.micro(batch)
    with torch.autocast("cpu", torch.bfloat16):
        regions = objective.model.regions(batch)
        loss = objective(micro).total
    assert regions.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    expected = plain_contrast(objective, prompts, regions, caption_rows(batch, samples))
    assert_close([loss], [sum(expected)], 1e-5)


def test_a_model_without_region_prompts_has_no_contrast(prompts: Prompts, rng: random.Random) -> None:
    objective = contrasting(tiny(prompts, "text"))
    with pytest.raises(ValueError, match="expected region prompts, got a model with prompt='text'"):
        objective(objective.micro(packed(captioned(rng, [words(rng)] * 2), prompts)))
