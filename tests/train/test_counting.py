"""FLOPs of a step: what torch's own counter sees in a real one, and what padding and masks leave of it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

from granvit.geometry import crop_boxes
from granvit.model.assemble import freeze
from granvit.model.attention import packed_mask
from granvit.model.packing import Sample, pack
from granvit.model.prompts import Prompts, add_special_tokens
from granvit.model.tower import normalise, vision_tokens
from granvit.recipe import Distillation, Model, Source, Stage
from granvit.train._counting import _ATTENTION, Costs, Work, costs_of, work_of
from granvit.train.devices import PEAKS, peak_flops
from granvit.train.objective import Objective
from tests.model.support import PATCH, SIZE, N, byte_level, random_sample, tiny

NOWHERE = Source(name="nowhere")
SETTINGS = Model(NOWHERE, NOWHERE, image_size=SIZE, dtype="float32")


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    return Prompts(tokenizer)


def of_stage(prompts: Prompts, train: tuple[Any, ...], prompt: str, **stage: Any) -> tuple[Objective, Costs]:
    model = tiny(prompts, prompt, dtype=torch.float32)
    settings = {"tasks": {"bbox_to_caption": 1.0}, "steps": 1, "batch_size": 4, "prompt": prompt, **stage}
    found = Stage("one", train, **settings)
    freeze(model, train)
    return Objective(model, found), costs_of(model, SETTINGS, found)


def samples(count: int, token: str = "") -> list[Sample]:
    rng = random.Random(int(torch.randint(1 << 40, ())))
    return [random_sample(rng, pairs=rng.randint(1, 4), token=token) for _ in range(count)]


def counted(run: Any) -> tuple[Any, int]:
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        result = run()
    return result, counter.get_total_flops()


STAGES = [
    (("vision", "projector"), "text", {}),
    (("projector", "language"), "text", {}),
    (("language",), "text", {}),
    (("vision", "projector", "language"), "text", {"distillation": Distillation(crops="resize")}),
    (("vision", "projector", "prompts"), "region", {}),
]


@pytest.mark.parametrize(("train", "prompt", "more"), STAGES)
def test_costs_are_what_the_counter_sees_in_a_real_step(prompts: Prompts, train: Any, prompt: str, more: Any) -> None:
    """Of rows with padding and dense attention, as a processor runs them: so padding and the whole square count."""
    objective, costs = of_stage(prompts, train, prompt, **more)
    token = {"text": "", "region": "<region>"}[prompt]
    batch = pack(samples(5, token), prompts, N, 200, pad_to_multiple_of=16)
    micro = objective.micro(batch)
    rows, length = batch.input_ids.shape
    dense = replace(work_of(objective, micro), language=rows * length, language_seen=rows * length**2)
    forward, backward, teacher = costs.run(dense)
    losses, ahead = counted(lambda: objective(micro))
    _, back = counted(losses.total.backward)
    query = 2 * 16 * 16 if prompt == "region" else 0  # of all pools, the same for any batch
    cut = 0  # crops are cut out by products, which are no part of a model
    if teacher:
        frames = normalise(batch.pixels, (0.5,) * 3, (0.5,) * 3, torch.float32)
        _, cut = counted(lambda: crop_boxes(frames, batch.boxes, batch.image_index, (SIZE, SIZE)))
    assert forward + teacher + query + cut == ahead
    assert backward + 2 * query == back
    assert bool(teacher) == bool(more)


def test_packed_work_is_what_the_mask_lets_through(prompts: Prompts) -> None:
    objective, costs = of_stage(prompts, ("vision", "projector"), "text")
    images = samples(7)
    batch = pack(images, prompts, N, 200, pad_to_multiple_of=64)
    work = work_of(objective, objective.micro(batch))
    mask = packed_mask(batch.image, batch.pair, "sdpa")
    assert isinstance(mask, torch.Tensor)
    real = batch.image >= 0
    assert not real.all()
    assert work.language == int(real.sum())
    assert work.language_seen == int((mask[:, 0] & real[:, :, None]).sum())
    assert work.answers == int((batch.labels >= 0).sum())
    assert (work.vision, work.vision_seen) == (7 * N, 7 * N * N)
    # Padding to any length needs nothing more.
    longer = pack(images, prompts, N, 200, pad_to_multiple_of=999)
    assert longer.input_ids.shape[1] > batch.input_ids.shape[1]
    assert costs.needed(work_of(objective, objective.micro(longer))) == costs.needed(work)


def test_native_crops_are_each_as_large_as_they_are(prompts: Prompts) -> None:
    objective, costs = of_stage(prompts, ("vision", "projector"), "text", distillation=Distillation(crops="native"))
    micro = objective.micro(pack(samples(5), prompts, N, 200))
    assert micro.crops is not None
    assert objective.teacher is not None
    alone = 0
    for rows, columns in micro.crops.grids.tolist():
        crop = torch.zeros(1, 3, rows * PATCH, columns * PATCH)
        with torch.no_grad():
            alone += counted(lambda x=crop: vision_tokens(objective.teacher.tower, x))[1]
    assert costs.run(work_of(objective, micro))[2] == alone


def test_a_contrastive_stage_runs_no_language_model(prompts: Prompts) -> None:
    objective, costs = of_stage(prompts, ("vision", "prompts"), "region", objective="contrastive", tasks={})
    micro = objective.micro(pack(samples(4, "<region>"), prompts, N, 200))
    work = work_of(objective, micro)
    assert work.language == work.projected == work.answers == 0
    _, ahead = counted(lambda: objective.model.regions(micro.batch))
    assert costs.run(work)[0] + 2 * 16 * 16 == ahead  # the query


def test_nothing_is_needed_twice(prompts: Prompts) -> None:
    """Attention ahead is two products, back four; where all trains, every other product ahead is two back."""
    objective, costs = of_stage(prompts, ("vision", "projector", "language"), "text")
    work = work_of(objective, objective.micro(pack(samples(3), prompts, N, 200)))
    forward, backward, _ = costs.run(work)
    pixels = 2 * work.vision * 3 * PATCH**2 * 16  # which get no gradient
    angles = 2 * work.language * 4  # of RoPE, which get none either
    assert costs.needed(work) == pytest.approx(3 * forward - pixels - 2 * angles, rel=1e-12)
    assert costs.needed(work) < forward + backward


def test_gradients_that_nothing_needs_are_not_counted(prompts: Prompts) -> None:
    work = Work(vision=9, vision_seen=81, projected=9, language=50, language_seen=900, answers=7)
    frozen_tower, all_train = (
        of_stage(prompts, train, "text")[1].needed(work)
        for train in (("projector", "language"), ("vision", "projector", "language"))
    )
    frozen_language, head_alone = (
        of_stage(prompts, train, "text")[1].needed(work) for train in (("vision", "projector"), ("language",))
    )
    assert head_alone < frozen_tower < all_train
    assert frozen_language < all_train


def test_peaks_are_found_by_the_whole_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") == 67e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32", tf32=True) == 495e12
    for name in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "a processor", ""):
        assert peak_flops(name, "bfloat16") is None
    for name, peak in PEAKS.items():
        assert peak.float32 <= peak.tf32 <= peak.bfloat16, name
