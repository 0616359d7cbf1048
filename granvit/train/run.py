"""A recipe from its first stage to its last, taken up wherever it stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from granvit.data.scenes import SceneComposer
from granvit.data.tasks import TASKS, TaskSampler
from granvit.errors import UserError
from granvit.model import checkpoint
from granvit.model.assemble import Assembled, assemble, freeze, swap_language
from granvit.model.granvit import GranViT
from granvit.model.prompts import Prompts
from granvit.model.tower import blocks_of, grid_of
from granvit.recipe import DataSource, Recipe, Stage, load
from granvit.train.data import Preparer, SceneSource, ShardSource, Source, TrainingData
from granvit.train.log import RunLog
from granvit.train.objective import Objective
from granvit.train.trainer import StageTrainer, checkpoint_step, last_checkpoint, remove_unfinished

RESOLVED, MODEL = "recipe.yaml", "model"
_PAD = 64  # rows of a batch get a multiple of this many tokens, so that compiled code meets few shapes


class RunError(UserError):
    """A run that cannot begin or go on; the text says why."""


@dataclass
class _Model:
    """The model at hand, and what goes with it."""

    granvit: GranViT
    assembled: Assembled


def run(recipe: Recipe, *, overwrite: bool = False, console: Console | None = None) -> int:
    """Trains every stage of a recipe that is not finished yet.

    In the recipe's output folder lie the recipe as it was resolved, the log (``metrics.jsonl``), and for each stage its
    checkpoints and, when it is finished, its model. The same call goes on from the last whole checkpoint.

    Args:
        recipe: what to do.
        overwrite: delete what the output folder holds; else a folder of another recipe is refused.
        console: where lines go; by default standard output, of the first rank only.

    Returns:
        0, or 128 + the signal that ended it early.

    Raises:
        UserError: what cannot be read, loaded, trained or written, in one sentence.
    """
    transformers_logging.set_verbosity_error()
    first = int(os.environ.get("RANK", "0")) == 0
    folder = Path(recipe.output)
    if first:
        _claim(recipe, folder, overwrite)
    log = RunLog(folder, (console or Console(width=None)) if first else None, tensorboard=_has_tensorboard())
    model: _Model | None = None
    for number, stage in enumerate(recipe.stages):
        finished = folder / stage.name / MODEL
        if finished.exists():
            log.note(f"{stage.name}: finished before, {finished}")
            continue
        model = model or _begin(recipe, number, folder, log)
        if stage.language is not None:
            model.assembled = swap_language(model.assembled, stage.language, recipe.model, seed=recipe.seed)
            model.granvit = _wrap(model.assembled, recipe, model.granvit)
        signal = _train(recipe, stage, model, folder, log, first)
        if signal:
            log.note(f"stopped by signal {signal} after a checkpoint; the same command goes on from there")
            return 128 + signal
    return 0


def _claim(recipe: Recipe, folder: Path, overwrite: bool) -> None:
    """Makes the folder this recipe's."""
    path = folder / RESOLVED
    if overwrite and folder.exists():
        if not path.exists() and any(folder.iterdir()):
            raise RunError(f"{folder}: holds other things than a run; it is not deleted")
        shutil.rmtree(folder)
    if path.exists():
        before = load(path)
        if before != recipe:
            raise RunError(
                f"{folder}: holds a run of another recipe, {path} says which; choose another output, or --overwrite"
            )
    folder.mkdir(parents=True, exist_ok=True)
    recipe.dump(path)


def _has_tensorboard() -> bool:
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None


def _begin(recipe: Recipe, stage: int, folder: Path, log: RunLog) -> _Model:
    """The model that a stage starts from: of the parts, of another run, or of the stage before."""
    start = folder / recipe.stages[stage - 1].name / MODEL if stage else recipe.start
    assembled = assemble(recipe.model, seed=recipe.seed)
    if start is None:
        for note in assembled.notes:
            log.note(note)
        return _Model(_wrap(assembled, recipe, None), assembled)
    loaded = checkpoint.load(start, attention=assembled.llava.model.language_model.config._attn_implementation)
    log.note(f"weights: {start}")
    assembled = replace(assembled, llava=loaded.model.llava, tokenizer=loaded.tokenizer)
    return _Model(loaded.model, assembled)


def _wrap(assembled: Assembled, recipe: Recipe, before: GranViT | None) -> GranViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = GranViT(assembled.llava, prompt=recipe.model.prompt, mean=assembled.mean, std=assembled.std)
    if before is not None:
        model.region_prompt = before.region_prompt  # of the tower's width, which a new language model does not change
    return model


def _train(recipe: Recipe, stage: Stage, model: _Model, folder: Path, log: RunLog, first: bool) -> int:
    """One stage; the signal that ended it early, or 0."""
    place = folder / stage.name
    sharded = recipe.parallel == "fsdp2"  # which wants one dtype in all of a unit's weights
    dtype = getattr(torch, recipe.model.dtype)
    freeze(model.granvit, stage.train, frozen_dtype=None if sharded else dtype)
    objective = Objective(model.granvit, stage)
    data, heldout = _data(recipe, stage, model)
    steps = _steps(stage, data)
    _prepare(stage, model.granvit, objective)
    layers = sorted({type(block).__name__ for block in _blocks(model.granvit)})
    args = _arguments(recipe, stage, steps, place, data, layers)
    trainer = StageTrainer(objective, stage, args, data, heldout, workers=recipe.data.workers, log=log)
    if first:
        for half in remove_unfinished(place):
            log.note(f"{half}: was not whole, and is deleted")
    if args.world_size > 1:
        trainer.accelerator.wait_for_everyone()
    last = last_checkpoint(place)
    log.start(stage.name, steps, checkpoint_step(last) if last else 0)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    log.note(
        f"{stage.name}: {steps} steps of {stage.batch_size} images, {trained / 1e6:.1f} M parameters train"
        + (f"; goes on after step {checkpoint_step(last)}" if last else "")
    )
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.interrupted:
        return trainer.interrupted
    trainer.evaluate()
    if first:
        checkpoint.save(model.granvit, model.assembled.tokenizer, recipe.model.image_size, place / MODEL)
    if args.world_size > 1:
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return 0


def _blocks(model: GranViT) -> list[nn.Module]:
    """The transformer layers of the tower and the language model: what is checkpointed, compiled and sharded."""
    llava = model.llava.model
    return [*blocks_of(llava.vision_tower), *llava.language_model.layers]


def _prepare(stage: Stage, model: GranViT, objective: Objective) -> None:
    """What a stage says of how its layers run."""
    towers = [model.llava.model.vision_tower, model.llava.model.language_model]
    for part in towers:
        if stage.gradient_checkpointing:
            part.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            part.gradient_checkpointing_disable()
    if stage.compile:
        teacher = [] if objective.teacher is None else list(blocks_of(objective.teacher.tower))
        for block in _blocks(model) + teacher:
            block.compile(dynamic=None)


def _data(recipe: Recipe, stage: Stage, model: _Model) -> tuple[TrainingData, TrainingData | None]:
    """What a stage trains on, and what it is evaluated on."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    size = recipe.model.image_size
    rows, columns = grid_of(model.granvit.llava.model.vision_tower, (size, size))
    micro = stage.micro_batch or -(-stage.batch_size // world)
    prompts = Prompts(model.assembled.tokenizer)
    weights = {task: stage.tasks.get(task, 0.0) for task in TASKS} if stage.tasks else {"bbox_to_caption": 1.0}

    def stream(sources: tuple[DataSource, ...], seed: int, training: bool) -> TrainingData:
        sampler = TaskSampler(weights, regions=stage.regions, seed=seed, style=stage.style)
        flip = recipe.data.flip if training else 0.0
        opened = list(_opened(sources, size))
        return TrainingData(
            opened,
            [s.weight for s in sources if s.weight is not None] or None,
            Preparer(sampler, size, stage.prompt, flip, seed),
            prompts,
            tokens_per_frame=rows * columns,
            max_length=recipe.data.max_length,
            micro_batch=micro,
            rank=rank,
            world_size=world,
            seed=seed,
            length=None if training else sum(len(source) for source in opened),
            pad_to_multiple_of=_PAD,
        )

    data = stream(recipe.data.train, recipe.seed, True)
    return data, stream(recipe.data.heldout, recipe.seed + 1, False) if recipe.data.heldout else None


def _opened(sources: tuple[DataSource, ...], size: int) -> Iterator[Source]:
    for source in sources:
        if source.scenes is not None:
            scenes = source.scenes
            composer = SceneComposer(scenes.seed, scenes.split, size=size, kind=scenes.kind, names=scenes.names or None)
            yield SceneSource(composer, scenes.count)
        elif source.shards is not None:
            yield ShardSource(source.shards)
        else:
            raise RunError("data: conversations (llava) cannot be trained on yet")


def _steps(stage: Stage, data: TrainingData) -> int:
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return max(1, round(stage.epochs * len(data.mixture) / stage.batch_size))


def _arguments(
    recipe: Recipe, stage: Stage, steps: int, place: Path, data: TrainingData, layers: list[str]
) -> TrainingArguments:
    world = data.world_size
    share = data.micro_batch * data.world_size
    if stage.batch_size % share:
        raise RunError(
            f"stages.{stage.name}.batch_size: expected a multiple of micro_batch times ranks, {share}, "
            f"got {stage.batch_size}"
        )
    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    return TrainingArguments(
        output_dir=str(place),
        max_steps=steps,
        per_device_train_batch_size=data.micro_batch,
        gradient_accumulation_steps=stage.batch_size // share,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=schedules[stage.schedule],
        warmup_steps=stage.warmup,
        max_grad_norm=stage.max_grad_norm or 0.0,
        bf16=recipe.model.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if stage.eval_every and recipe.data.heldout else "no",
        eval_steps=stage.eval_every,
        save_strategy="steps" if stage.save_every else "no",
        save_steps=stage.save_every or 500,
        save_total_limit=2,
        ignore_data_skip=True,
        report_to="none",
        disable_tqdm=True,
        seed=recipe.seed,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        fsdp=recipe.parallel == "fsdp2" and world > 1,
        fsdp_config={"transformer_layer_cls_to_wrap": layers},
    )
