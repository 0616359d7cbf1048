"""The loss of a step: distillation as it is written down, and micro-batches that add up to a whole."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

pytest.importorskip("transformers")

from granvit.data.tasks import Pair
from granvit.model.granvit import GranViT
from granvit.model.packing import PackedBatch, Sample, pack
from granvit.model.prompts import Prompts, add_special_tokens
from granvit.recipe import Distillation, Stage
from granvit.train import objective as objective_module
from granvit.train.objective import Counts, Losses, Objective
from tests.model.support import PATCH, SIZE, N, byte_level, random_sample, stock_pixels, tiny, words

Crops = Literal["resize", "native"]
GRID = (SIZE // PATCH, SIZE // PATCH)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    return Prompts(tokenizer)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(int(torch.randint(1 << 40, ())))


def distilling(model: GranViT, crops: Crops = "resize", loss: Literal["mse", "cosine"] = "mse") -> Objective:
    """With a teacher in float64 that is not the student any more."""
    stage = Stage(
        "one",
        ("vision", "projector"),
        tasks={"bbox_to_caption": 1.0},
        steps=1,
        distillation=Distillation(weight=0.7, crops=crops, loss=loss),
    )
    objective = Objective(model, stage)
    assert objective.teacher is not None
    objective.teacher.double()
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return objective


def whole_pixel_boxes(count: int) -> Tensor:
    """For which a crop is a slice; some smaller than a patch, one of the whole frame."""
    # Sides of half a patch more than whole ones are left out: which way they are rounded is the last bit's choice.
    sides = [(a, b) for a in range(SIZE) for b in range(a + 1, SIZE + 1) if (b - a) % PATCH != PATCH // 2]
    chosen = torch.tensor(sides)[torch.randint(len(sides), (2 * count,))]
    boxes = chosen.view(count, 2, 2).transpose(1, 2).reshape(count, 4) / SIZE
    boxes[:1] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return boxes


def samples_of(rng: random.Random, count: int, token: str = "", most: int = 4) -> list[Sample]:
    """Images of one or two frames with up to so many regions, most of which are asked about."""
    found = []
    for _ in range(count):
        sample = random_sample(rng, pairs=rng.randint(1, most), frames=rng.randint(1, 2), token=token)
        boxes = whole_pixel_boxes(len(sample.boxes))
        found.append(Sample(sample.pixels, sample.pairs, boxes, sample.frame, sample.kind))
    return found


def packed(samples: Sequence[Sample], prompts: Prompts) -> PackedBatch:
    batch = pack(samples, prompts, N, 400)
    assert not batch.dropped
    return batch


def tower_gradients(total: Tensor, objective: Objective) -> list[Tensor]:
    parameters = list(objective.tower.parameters())
    found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Relative to the largest number of all: gradients of keys' biases are 0 but for rounding."""
    largest = max(float(e.detach().abs().max()) for e in expected)
    assert largest > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * largest, check_dtype=False)


# ---- distillation ---------------------------------------------------------------------------------------------------


def plain_distillation(objective: Objective, batch: PackedBatch, crops: Crops, loss: str) -> tuple[Tensor, Tensor]:
    """The mean over all elements, and that of each region: one crop and one region after the other, in float64."""
    assert objective.teacher is not None
    pixels = stock_pixels(batch.pixels)
    student: Any = objective.tower
    maps = student(pixels, output_hidden_states=True).hidden_states[-1]
    maps = maps.unflatten(1, GRID).permute(0, 3, 1, 2)
    values, regions = [], []
    for box, f in zip(batch.boxes.tolist(), batch.image_index.tolist(), strict=True):
        x0, y0, x1, y1 = (round(x * SIZE) for x in box)
        grid = GRID
        if crops == "native":
            grid = max(1, math.floor((y1 - y0) / PATCH + 0.5)), max(1, math.floor((x1 - x0) / PATCH + 0.5))
        size = [grid[0] * PATCH, grid[1] * PATCH]
        crop = torchvision.transforms.functional.resized_crop(pixels[f], y0, x0, y1 - y0, x1 - x0, size, antialias=True)
        with torch.no_grad():
            teacher: Any = objective.teacher.tower
            seen = teacher(crop[None], output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-1][0]
        corners = torch.tensor([[f, *box]], dtype=torch.float64)
        corners[:, 1:] *= torch.tensor([GRID[1], GRID[0]] * 2)
        aligned = torchvision.ops.roi_align(maps, corners, grid, 1.0, sampling_ratio=2, aligned=True)
        aligned = aligned[0].flatten(1).T
        own = 1 - F.cosine_similarity(aligned, seen, dim=1) if loss == "cosine" else (aligned - seen).square().flatten()
        values.append(own)
        regions.append(own.mean())
    return torch.cat(values).mean(), torch.stack(regions)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("crops", ["resize", "native"])
def test_distillation_is_its_plain_form_with_gradients(
    prompts: Prompts, rng: random.Random, crops: Crops, loss: Literal["mse", "cosine"]
) -> None:
    objective = distilling(tiny(prompts), crops, loss)
    batch = packed(samples_of(rng, 4), prompts)
    micro = objective.micro(batch)
    losses = objective(micro)
    expected, by_region = plain_distillation(objective, batch, crops, loss)
    caption = objective.model(batch).loss
    tolerance = 1e-5  # pixels and crops are float32
    assert_close([losses.caption, losses.distillation], [caption, expected], tolerance)
    assert_close([losses.total], [caption + 0.7 * expected], tolerance)
    found = tower_gradients(losses.total - caption, objective)
    assert_close(found, tower_gradients(0.7 * expected, objective), tolerance)
    report = objective(micro, by_region=True)
    assert_close([report.distillation], [by_region], tolerance)
    assert float(expected.detach()) > 1e-3


def test_a_teacher_that_is_the_student_agrees_about_the_whole_frame(prompts: Prompts, rng: random.Random) -> None:
    model = tiny(prompts)
    objective = distilling(model)
    assert objective.teacher is not None
    objective.teacher.tower.load_state_dict(objective.tower.state_dict())
    sample = random_sample(rng, pairs=2)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(sample.boxes), 4)
    micro = objective.micro(packed([Sample(sample.pixels, sample.pairs, boxes)], prompts))
    tokens = objective.model(micro.batch).tokens
    # But for the samples within a cell, which blur the student's map a little.
    corners = torch.tensor([[0.0, 0.0, 0.0, *GRID[::-1]]], dtype=torch.float64)
    own = tokens.unflatten(1, GRID).permute(0, 3, 1, 2)
    blurred = torchvision.ops.roi_align(own, corners, GRID, 1.0, sampling_ratio=2, aligned=True)
    assert_close([objective.distill(micro, tokens, GRID)], [(own - blurred).square().mean()], 1e-4)


@pytest.mark.parametrize("crops", ["resize", "native"])
def test_micro_batches_add_up_to_the_whole_batch(prompts: Prompts, rng: random.Random, crops: Crops) -> None:
    objective = distilling(tiny(prompts), crops)
    samples = samples_of(rng, 4)
    pixels = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    samples.append(Sample(pixels, [Pair("global_caption", words(rng), words(rng))]))  # without regions
    shares = [objective.micro(packed(part, prompts)) for part in (samples[:1], samples[1:4], samples[4:])]
    counts = Counts(sum(m.tokens for m in shares), sum(m.cells for m in shares))
    whole = objective.micro(packed(samples, prompts))
    assert Counts(whole.tokens, whole.cells) == counts
    assert shares[2].cells == 0
    expected: Losses = objective(whole)
    parts: list[Losses] = [objective(micro, counts) for micro in shares]
    for name in ("total", "caption", "distillation"):
        values = [getattr(part, name) for part in parts]
        assert_close([sum(values, torch.zeros(()))], [getattr(expected, name)], 1e-6)
    gradients = [tower_gradients(part.total, objective) for part in parts]
    assert_close(
        [torch.stack(g).sum(0) for g in zip(*gradients, strict=True)], tower_gradients(expected.total, objective), 1e-6
    )


def test_the_tensor_that_is_distilled_is_the_one_the_projector_read(
    prompts: Prompts, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    for crops in ("resize", "native"):
        objective = distilling(tiny(prompts), crops)
        read: list[Tensor] = []
        runs: list[int] = []
        distilled: list[Tensor] = []
        model = objective.model.llava.model
        model.multi_modal_projector.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        model.vision_tower.embeddings.register_forward_pre_hook(lambda _, args, runs=runs: runs.append(len(args[0])))
        plain = objective_module.region_distill_loss

        def spied(tokens: Tensor, *args: Any, distilled: Any = distilled, plain: Any = plain, **options: Any) -> Tensor:
            distilled.append(tokens)
            return plain(tokens, *args, **options)

        monkeypatch.setattr(objective_module, "region_distill_loss", spied)
        batch = packed(samples_of(rng, 3), prompts)
        losses = objective(objective.micro(batch))
        monkeypatch.undo()
        assert len(read) == len(distilled) == 1
        assert read[0] is distilled[0]
        assert losses.output.tokens.data_ptr() == read[0].data_ptr()
        assert runs == [len(batch.pixels)]  # the student, once, on all frames


def test_only_the_student_gets_a_gradient(prompts: Prompts, rng: random.Random) -> None:
    for crops in ("resize", "native"):
        objective = distilling(tiny(prompts), crops).train()
        assert objective.teacher is not None
        before = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
        losses = objective(objective.micro(packed(samples_of(rng, 2), prompts)))
        losses.total.backward()
        assert all(p.grad is None for p in objective.teacher.parameters())
        assert all(torch.equal(value, before[name]) for name, value in objective.teacher.state_dict().items())
        assert not objective.teacher.tower.training
        grads = [p.grad for p in objective.tower.parameters() if p.grad is not None]
        assert any(bool(g.any()) for g in grads)


def test_a_wrong_image_is_not_distilled(prompts: Prompts, rng: random.Random) -> None:
    objective = distilling(tiny(prompts))
    micro = objective.micro(packed(samples_of(rng, 3), prompts))
    losses = objective(micro, wrong_image=True)
    assert losses.distillation is None
    assert torch.equal(losses.total, objective.model(micro.batch, wrong_image=True).loss)
    assert not torch.equal(losses.total, objective.model(micro.batch).loss)


def test_a_stage_without_distillation_has_captions_only(prompts: Prompts, rng: random.Random) -> None:
    stage = Stage("two", ("projector",), tasks={"caption_to_bbox": 1.0}, steps=1)
    objective = Objective(tiny(prompts), stage)
    assert objective.teacher is objective.contrast is None
    micro = objective.micro(packed(samples_of(rng, 2), prompts))
    assert micro.cells == 0
    losses = objective(micro)
    assert losses.distillation is losses.contrastive is None
    assert torch.equal(losses.total, objective.model(micro.batch).loss)
    with pytest.raises(ValueError, match="distill: expected a stage with distillation"):
        objective.distill(micro, losses.output.tokens, GRID)


@pytest.mark.parametrize("crops", ["resize", "native"])
def test_what_decides_shapes_stays_on_the_cpu(prompts: Prompts, rng: random.Random, crops: Crops) -> None:
    """Crops are laid out where the batch was made; a device is not waited for."""
    objective = distilling(tiny(prompts), crops)
    micro = objective.micro(packed(samples_of(rng, 2), prompts)).to("meta")
    assert micro.batch.boxes.device.type == "meta"
    assert (micro.crops is None) == (crops == "resize")
    if micro.crops is not None:
        assert {tensor.device.type for tensor in micro.crops} == {"cpu"}
