"""What a recipe will cost, before anything is loaded.

Nothing is estimated from formulas that can be counted: every stage runs one micro-batch, forward and backward, on fake
tensors (shapes without storage), where PyTorch's own counter counts the FLOPs and every tensor that autograd keeps for
the backward pass is summed up. Lengths of texts, the share of the peak that a device reaches and the size of regions
are assumed, and the plan says so.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from granvit.data.conversations import Conversations
from granvit.data.shards import INDEX, read_index
from granvit.data.tasks import TASKS
from granvit.errors import UserError
from granvit.model.assemble import assemble_empty, freeze, part_parameters
from granvit.model.tower import prefix_tokens
from granvit.recipe import PARTS, Data, Model, Recipe, Scenes, Stage
from granvit.train._counting import NATIVE_SHARE, Layout, Shell, count
from granvit.train.devices import Device

# Tokens of a question and its answer, with what a chat template puts around them; about what Qwen's and SmolLM2's
# tokenizers make of the paper's wordings, where a box has 27 tokens.
TEXT_TOKENS = {"global_caption": (20, 80), "bbox_to_caption": (60, 12), "caption_to_bbox": (35, 30), "chat": (180, 250)}
PREFIX_TOKENS = 25  # of a chat template, in front of the image


@dataclass(frozen=True)
class StagePlan:
    """The cost of a stage.

    Attributes:
        name: of the stage.
        trained: parameters that train, by part.
        frozen: parameters that do not, by part.
        layout: of a micro-batch of one rank.
        image_tokens: of a step of all ranks, as the language model sees them.
        text_tokens: likewise; an estimate.
        forward: FLOPs of the forward pass of a step, all ranks together.
        backward: FLOPs of the backward pass, with what gradient checkpointing computes again.
        teacher: FLOPs of the teacher.
        memory: bytes of one rank: weights, gradients, optimizer, teacher, activations.
        kept: bytes of the activations without gradient checkpointing.
        checkpointed: with it.
        steps: of the stage; None where the number of images is not known.
        seconds: of a step.
        fits: whether one rank's memory suffices; None where it is not known.
    """

    name: str
    trained: Mapping[str, int]
    frozen: Mapping[str, int]
    layout: Layout
    image_tokens: int
    text_tokens: int
    forward: float
    backward: float
    teacher: float
    memory: Mapping[str, float]
    kept: float
    checkpointed: float
    steps: int | None
    seconds: float
    fits: bool | None


@dataclass(frozen=True)
class Plan:
    """The cost of a recipe: its stages, on which device and how many, where the configs came from, and the frames that
    every image is taken to have."""

    recipe: str
    device: Device
    world_size: int
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]
    most_frames: int = 1


def plan(recipe: Recipe, device: Device, world_size: int = 1) -> Plan:
    """Counts what every stage costs; loads no weights and needs memory for shapes only.

    Args:
        recipe: what to count.
        device: of each rank.
        world_size: ranks.

    Raises:
        UserError: a part whose config cannot be had, or a batch that the ranks cannot share.
    """
    stages, notes, model = [], [], recipe.model
    fake = FakeTensorMode()
    shell: Shell | None = None
    for stage in recipe.stages:
        if shell is None or stage.language is not None:
            model = replace(model, language=stage.language or model.language)
            with fake:
                empty = assemble_empty(model, device="cpu")
                shell = Shell(empty.llava, model.prompt)
            notes += [f"{stage.name}: {note}" for note in empty.notes]
        with fake:
            stages.append(_stage_plan(recipe.data, model, stage, shell, device, world_size))
    return Plan(recipe.name, device, world_size, tuple(stages), tuple(notes), most_frames(recipe.data))


def layout(data: Data, stage: Stage, images: int, tokens: int) -> Layout:
    """The shapes of a micro-batch.

    Args:
        data: for the tiles and the length of a row.
        stage: for its tasks.
        images: of the micro-batch.
        tokens: of a frame, as the language model sees it.
    """
    each = most_frames(data)
    frames = images * each
    crops = images * stage.regions if stage.distillation is not None else 0
    if stage.objective == "contrastive":
        return Layout(images, frames, crops, 0, (), 0, 0, 0)
    pairs: list[tuple[float, float]] = []
    if stage.tasks.get("chat"):
        pairs = [TEXT_TOKENS["chat"]]
    else:
        about_regions = {task: stage.tasks.get(task, 0.0) for task in TASKS[1:]}
        total, regions = sum(about_regions.values()), stage.regions
        if total and regions:
            mean = [sum(w * TEXT_TOKENS[task][i] for task, w in about_regions.items()) / total for i in (0, 1)]
            pairs = [(mean[0], mean[1])] * regions
        weight = stage.tasks.get("global_caption", 0.0)
        share = min(1.0, weight / total * regions) if pairs else float(weight > 0)
        if share:
            pairs.append((share * TEXT_TOKENS["global_caption"][0], share * TEXT_TOKENS["global_caption"][1]))
    prefix = PREFIX_TOKENS + tokens * each
    length = math.ceil(prefix + sum(q + a for q, a in pairs))
    if prefix >= data.max_length:
        raise UserError(f"data.max_length: an image alone has about {prefix} tokens, got {data.max_length}")
    length = min(length, data.max_length)
    together = min(images, data.max_length // length)
    rows = math.ceil(images / together)
    answers = math.ceil(images * sum(a for _, a in pairs))
    return Layout(images, frames, crops, prefix, tuple(pairs), rows, together * length, min(answers, images * length))


def most_frames(data: Data) -> int:
    """Frames of a large image; composed scenes are as large as one frame, and one tile would be the overview again."""
    large = any(source.scenes is None for source in data.train)
    return 1 + data.tiles if data.tiles > 1 and large else 1


def _stage_plan(data: Data, model: Model, stage: Stage, shell: Shell, device: Device, world_size: int) -> StagePlan:
    share = stage.batch_size // world_size
    if stage.batch_size % world_size:
        raise UserError(
            f"stages.{stage.name}.batch_size: {stage.batch_size} images do not divide among {world_size} ranks"
        )
    micro = min(stage.micro_batch or share, share)
    if share % micro:
        raise UserError(f"stages.{stage.name}.micro_batch: {micro} does not divide the {share} images of a rank")
    config = shell.llava.config
    patches = (model.image_size // config.vision_config.patch_size) ** 2
    shapes = layout(data, stage, micro, patches)
    freeze(shell, stage.train, frozen_dtype=getattr(torch, model.dtype))
    costs, kept = count(shell, model, stage, shapes)
    flex = model.attention == "flex_attention" or (model.attention == "auto" and device.kind == "cuda")
    class_tokens = prefix_tokens(shell.llava.model.vision_tower)
    forward, backward, teacher = costs.run(shapes.work(patches, class_tokens, stage, skips=flex))
    # What a checkpointed layer keeps is its input; one layer at a time is whole.
    tower, text = config.vision_config, config.text_config
    size = 2 if model.dtype == "bfloat16" else 4
    inputs = size * shapes.rows * shapes.length * text.hidden_size * text.num_hidden_layers
    layers = text.num_hidden_layers
    if "vision" in stage.train:
        inputs += 4 * shapes.frames * patches * tower.hidden_size * tower.num_hidden_layers
        layers = max(layers, tower.num_hidden_layers) if shapes.rows else tower.num_hidden_layers
    checkpointed = min(kept, inputs + kept / layers)
    if stage.gradient_checkpointing:
        backward += forward
    counts = {part: list(parameters.values()) for part, parameters in part_parameters(shell).items()}
    trained = {part: sum(p.numel() for p in ps if p.requires_grad) for part, ps in counts.items()}
    frozen = {part: sum(p.numel() for p in ps if not p.requires_grad) for part, ps in counts.items()}
    everything = [p for ps in counts.values() for p in ps]
    count_trained = sum(trained.values())
    memory = {
        "weights": float(sum(p.numel() * p.element_size() for p in everything)),
        "gradients": 4.0 * count_trained,
        "optimizer": 8.0 * count_trained,
        "teacher": 4.0 * (trained["vision"] + frozen["vision"]) if stage.distillation is not None else 0.0,
        "activations": checkpointed if stage.gradient_checkpointing else kept,
    }
    steps = stage.steps
    if steps is None and (images := _images(data)) is not None:
        assert stage.epochs is not None
        steps = math.ceil(images * stage.epochs / stage.batch_size)
    micros = stage.batch_size / micro
    total = micros * (forward + backward + teacher)
    return StagePlan(
        stage.name,
        trained,
        frozen,
        shapes,
        round(micros * shapes.frames * patches) if shapes.rows else 0,
        round(micros * micro * (PREFIX_TOKENS + sum(q + a for q, a in shapes.pairs))) if shapes.rows else 0,
        micros * forward,
        micros * backward,
        micros * teacher,
        memory,
        kept,
        checkpointed,
        steps,
        total / world_size / (device.flops * device.utilisation),
        None if device.memory is None else sum(memory.values()) < device.memory,
    )


def _images(data: Data) -> int | None:
    """In an epoch; None where only reading the data would tell."""
    total = 0
    for source in data.train:
        if isinstance(source.scenes, Scenes):
            total += source.scenes.count
            continue
        if source.llava is not None and source.images is not None and Path(source.llava).is_file():
            total += len(Conversations(source.llava, source.images, progress=sys.stderr.isatty()))
            continue
        if source.shards is None or not (Path(source.shards) / INDEX).is_file():
            return None
        total += sum(shard.samples for shard in read_index(source.shards))
    return total


def render(planned: Plan, width: int = 110) -> str:
    """A plan as text: a table a stage, and what it rests on."""
    out = Console(file=io.StringIO(), width=width)
    device = planned.device
    for stage in planned.stages:
        table = Table(title=f"{planned.recipe}: {stage.name}", title_justify="left", show_header=False)
        table.add_column(justify="left")
        table.add_column(justify="left")
        for part in PARTS:
            if stage.trained[part] or stage.frozen[part]:
                table.add_row(part, f"{_count(stage.trained[part])} trained, {_count(stage.frozen[part])} frozen")
        shapes = stage.layout
        if shapes.rows:
            tokens = f"{_count(stage.image_tokens)} image tokens, about {_count(stage.text_tokens)} text tokens"
            table.add_row("a step", tokens)
            rows = f"{shapes.rows} x {shapes.length} of {shapes.images} images, in one micro-batch of a rank"
            table.add_row("sequences", rows)
        else:
            table.add_row("a step", "images only: the language model does not run")
        if shapes.dropped > 0.01:
            table.add_row(
                "", f"about {shapes.dropped:.0%} of the text does not fit into data.max_length and is dropped"
            )
        teacher = f", {_si(stage.teacher)} teacher" if stage.teacher else ""
        table.add_row("FLOPs a step", f"{_si(stage.forward)} forward, {_si(stage.backward)} backward{teacher}")
        memory = ", ".join(f"{name} {_si(size)}B" for name, size in stage.memory.items() if size)
        fits = {None: "", True: " (fits)", False: " (does not fit)"}[stage.fits]
        table.add_row("memory of a rank", f"{_si(sum(stage.memory.values()))}B{fits}: {memory}")
        kept = f"{_si(stage.kept)}B, with gradient checkpointing {_si(stage.checkpointed)}B"
        table.add_row("activations", kept)
        steps = "steps unknown before the data is read" if stage.steps is None else f"{stage.steps} steps"
        table.add_row("time", f"{stage.seconds:.2g} s a step; {steps}" + _total(stage))
        out.print(table)
    lines = [
        f"Device: {planned.world_size} x {device.name}, {_si(device.flops)}FLOP/s, and {device.utilisation:.0%} of it "
        "is assumed to be reached.",
        "FLOPs and activations: counted by running a micro-batch on fake tensors. Memory: weights (frozen ones in the "
        "compute dtype, trained ones 4 bytes a parameter), gradients 4, AdamW 8, teacher 4, none of it sharded among "
        "ranks; and activations. What the framework and fragmentation take comes on top.",
        f"Assumed: tokens of (question, answer): {TEXT_TOKENS}; all regions that a stage asks about are there; native "
        f"crops have {NATIVE_SHARE:.0%} of a frame.",
        *_tiled(planned.most_frames),
        *planned.notes,
    ]
    for line in lines:
        out.print(line, highlight=False, markup=False)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def _tiled(frames: int) -> list[str]:
    """What is assumed where images have tiles."""
    if frames == 1:
        return []
    return [
        f"Every image is counted with {frames} frames, itself and all its tiles, as memory has to hold them: the most "
        "that data.tiles allows. Images of other shapes and small ones have fewer, text alone has none; so much less "
        "time is needed."
    ]


def _total(stage: StagePlan) -> str:
    if stage.steps is None:
        return ""
    seconds = stage.steps * stage.seconds
    return f", {seconds / 3600:.1f} h" if seconds > 7200 else f", {seconds / 60:.1f} min"


def _count(x: float) -> str:
    return _si(x).strip()


def _si(x: float) -> str:
    for power, unit in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if x >= 10**power:
            return f"{x / 10**power:.3g} {unit}"
    return f"{x:.3g} "
