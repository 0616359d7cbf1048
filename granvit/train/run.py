"""A recipe from its first stage to its last, taken up wherever it stopped."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn

from granvit.data.conversations import Conversations
from granvit.data.sources import Scenes, Shards, Source
from granvit.data.tasks import TASKS, TaskSampler
from granvit.errors import UserError
from granvit.model import checkpoint
from granvit.model.assemble import Assembled, assemble, attention_of, freeze, swap_language
from granvit.model.granvit import GranViT
from granvit.model.prompts import Prompts
from granvit.model.tower import blocks_of, grid_of
from granvit.recipe import DataSource, Model, Recipe, Stage, load
from granvit.train._counting import costs_of
from granvit.train.checkpoints import MODEL, RESOLVED, checkpoint_step, last_checkpoint, remove_unfinished
from granvit.train.data import Preparer, TrainingData
from granvit.train.devices import peak_flops
from granvit.train.hooks import Arguments
from granvit.train.log import RunLog
from granvit.train.objective import Objective
from granvit.train.stopping import Stop
from granvit.train.trainer import StageTrainer

_PAD = 64  # rows of a batch get a multiple of this many tokens, so that compiled code meets few shapes


class RunError(UserError):
    """A run that cannot begin or go on; the text says why."""


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
    process = PartialState(cpu=not torch.cuda.is_available())
    folder = Path(recipe.output)
    if process.is_main_process:
        _claim(recipe, folder, overwrite)
    process.wait_for_everyone()  # before anyone looks for what may just have been deleted
    log = RunLog(
        folder,
        (console or Console(width=None)) if process.is_main_process else None,
        tensorboard=find_spec("tensorboard") is not None,
    )
    if _peak(recipe.model) is None:
        log.note("the log has tflops and no mfu: it is not known what this device reaches at best")
    for number, stage in enumerate(recipe.stages):
        finished = folder / stage.name / MODEL
        if finished.exists():
            log.note(f"{stage.name}: finished before, {finished}")
            continue
        signal = _train(recipe, number, folder, log)
        if signal:
            log.note(f"stopped by signal {signal}; the same command goes on from there")
            return 128 + signal
    return 0


def _peak(model: Model) -> float | None:
    """FLOP/s of this process's device at the best; None where it is not known, as for processors."""
    if not torch.cuda.is_available():
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(), model.dtype, tf32=tf32)


def _claim(recipe: Recipe, folder: Path, overwrite: bool) -> None:
    """Makes the folder this recipe's."""
    path = folder / RESOLVED
    try:
        if overwrite and folder.exists():
            if not path.exists() and any(folder.iterdir()):
                raise RunError(f"{folder}: holds other things than a run; it is not deleted")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            partial = path.with_suffix(".partial")
            recipe.dump(partial)
            partial.replace(path)
    except OSError as error:
        raise RunError(f"{folder}: cannot hold a run: {error.strerror}") from error
    if load(path) != recipe:
        raise RunError(
            f"{folder}: holds a run of another recipe, {path} says which; choose another output, or --overwrite"
        )


def _begin(recipe: Recipe, number: int, folder: Path, log: RunLog) -> tuple[GranViT, Assembled]:
    """The model that a stage starts from: of the parts, of another run, or of the stage before.

    Always read from its folder, so that a stage is the same whether the one before ended in this process or another.
    """
    stage = recipe.stages[number]
    start = folder / recipe.stages[number - 1].name / MODEL if number else recipe.start
    before = None
    if start is None:
        assembled = assemble(recipe.model, seed=recipe.seed)
        notes = assembled.notes
    else:
        loaded = checkpoint.load(start, attention=attention_of(recipe.model))
        before, size = loaded.model, loaded.image_size
        if size != recipe.model.image_size:
            raise RunError(
                f"start: {start} has frames of {size} pixels, expected model.image_size, {recipe.model.image_size}"
            )
        mean, std = ((x[0], x[1], x[2]) for x in (before.mean, before.std))
        assembled = Assembled(before.llava, loaded.tokenizer, mean, std, size)
        notes = (f"weights: {start}",)
    if stage.language is not None:
        key = f"stages.{number}.language"
        assembled = swap_language(assembled, stage.language, recipe.model, seed=recipe.seed, key=key)
        notes += assembled.notes
    for note in notes:
        log.note(note)
    return _wrap(assembled, recipe, before), assembled


def save_start(recipe: Recipe, folder: Path) -> None:
    """Writes the model that the first stage begins with, to compare with."""
    model, assembled = _begin(recipe, 0, Path(recipe.output), RunLog(Path(recipe.output), None))
    checkpoint.save(model, assembled.tokenizer, recipe.model.image_size, folder)


def _wrap(assembled: Assembled, recipe: Recipe, before: GranViT | None) -> GranViT:
    """The model with the heads that it had before, where it had such and the width is still theirs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = GranViT(assembled.llava, prompt=recipe.model.prompt, mean=assembled.mean, std=assembled.std)
    for name in ("region_prompt", "box_prompt"):
        old, new = getattr(before, name, None), getattr(model, name)
        if old is not None and new is not None and _shapes(old) == _shapes(new):
            setattr(model, name, old)
    return model


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in module.parameters()]


def _train(recipe: Recipe, number: int, folder: Path, log: RunLog) -> int:
    """One stage; the signal that ended the run in it, or 0."""
    stage = recipe.stages[number]
    place = folder / stage.name
    model, assembled = _begin(recipe, number, folder, log)
    sharded = recipe.parallel == "fsdp2"  # which wants one dtype in all of a unit's weights
    freeze(model, stage.train, frozen_dtype=None if sharded else getattr(torch, recipe.model.dtype))
    objective = Objective(model, stage)
    data, heldout = _data(recipe, stage, model, assembled)
    steps = _steps(stage, data)
    _prepare(stage, model, objective)
    layers = sorted({type(block).__name__ for block in _blocks(model)})
    args = _arguments(recipe, stage, steps, place, data, layers)
    costs, peak = costs_of(model, recipe.model, stage), _peak(recipe.model)
    with Stop() as stop:
        trainer = StageTrainer(
            objective,
            stage,
            args,
            data,
            heldout,
            workers=recipe.data.workers,
            max_broken=recipe.data.max_broken,
            log=log,
            stop=stop,
            costs=costs,
            peak=peak,
        )
        if sharded and data.world_size > 1 and not trainer.is_fsdp_enabled:
            # accelerate leaves the plugin aside in silence.
            raise RunError("parallel: fsdp2 needs GPUs, since accelerate does not shard on the CPU; ddp works on both")
        first = trainer.accelerator.is_main_process
        if first:
            for half in remove_unfinished(place):
                log.note(f"{half}: was not whole, and is deleted")
        trainer.accelerator.wait_for_everyone()
        last = last_checkpoint(place)
        args.eval_on_start = heldout is not None and last is None  # what the stage starts from, to compare with
        log.start(stage.name, steps, checkpoint_step(last) if last else 0)
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        log.note(
            f"{stage.name}: {steps} steps of {stage.batch_size} images, {trained / 1e6:.3g} M parameters train"
            + (f"; goes on after step {checkpoint_step(last)}" if last else "")
        )
        if stage.wrong_image and data.micro_batch == 1 and stage.objective == "caption":
            log.note(f"{stage.name}: no loss with a wrong image, since a micro-batch of 1 has no other image to show")
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        if not trainer.finished:
            return trainer.should_stop()
        weights = trainer.full_weights()
        if first:
            checkpoint.save(model, assembled.tokenizer, recipe.model.image_size, place / MODEL, weights)
        trainer.accelerator.wait_for_everyone()
        return trainer.should_stop()


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
        # Dynamo counts how often a layer's code was compiled in this process, and past a limit runs it uncompiled.
        torch._dynamo.reset()
        teacher = [] if objective.teacher is None else list(blocks_of(objective.teacher.tower))
        for block in _blocks(model) + teacher:
            block.compile(dynamic=None)


def _data(
    recipe: Recipe, stage: Stage, model: GranViT, assembled: Assembled
) -> tuple[TrainingData, TrainingData | None]:
    """What a stage trains on, and what it is evaluated on."""
    process = PartialState()
    world, rank = process.num_processes, process.process_index
    size = recipe.model.image_size
    rows, columns = grid_of(model.llava.model.vision_tower, (size, size))
    micro = stage.micro_batch or -(-stage.batch_size // world)
    prompts = Prompts(assembled.tokenizer)
    _check_sources(recipe, stage, len(prompts.prefix) - 1, rows * columns)

    def stream(sources: tuple[DataSource, ...], seed: int, training: bool) -> TrainingData:
        opened = list(_opened(sources, size))
        return TrainingData(
            opened,
            [s.weight for s in sources if s.weight is not None] or None,
            _preparer(recipe, stage, seed, recipe.data.flip if training else 0.0),
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


def _check_sources(recipe: Recipe, stage: Stage, prefix: int, tokens_per_frame: int) -> None:
    """Before the first image with all its tiles, or the first held-out one, ends a run that was hours under way."""
    data = recipe.data
    longest = prefix + (1 + data.tiles) * tokens_per_frame
    if data.tiles > 1 and longest > data.max_length:
        raise RunError(
            f"data.max_length: expected at least {longest}, for an image with {data.tiles} tiles beside the overview, "
            f"got {data.max_length}"
        )
    if stage.tasks.get("chat") and any(source.llava is None for source in data.heldout):
        raise RunError("data.heldout: expected conversations (llava) only, since chat asks nothing about other images")


def _preparer(recipe: Recipe, stage: Stage, seed: int, flip: float) -> Preparer:
    # The contrastive objective takes captions from where they are asked for; conversations ask for themselves.
    weights = {task: stage.tasks.get(task, 0.0) for task in TASKS}
    weights = weights if any(weights.values()) else {"bbox_to_caption": 1.0}
    sampler = TaskSampler(weights, regions=stage.regions, seed=seed, style=stage.style)
    return Preparer(sampler, recipe.model.image_size, stage.prompt, flip, seed, recipe.data.tiles)


def _opened(sources: tuple[DataSource, ...], size: int) -> Iterator[Source | Conversations]:
    for source in sources:
        if source.scenes is not None:
            scenes = source.scenes
            yield Scenes(
                scenes.count, kind=scenes.kind, split=scenes.split, seed=scenes.seed, size=size, names=scenes.names
            )
        elif source.shards is not None:
            yield Shards(source.shards)
        else:
            assert source.llava is not None
            assert source.images is not None
            # Tells nobody but who looks on: a bar for each rank would be none.
            watched = PartialState().is_main_process and sys.stderr.isatty()
            yield Conversations(source.llava, source.images, progress=watched)


def _steps(stage: Stage, data: TrainingData) -> int:
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return max(1, round(stage.epochs * len(data.mixture) / stage.batch_size))


def _arguments(
    recipe: Recipe, stage: Stage, steps: int, place: Path, data: TrainingData, layers: list[str]
) -> Arguments:
    world = data.world_size
    share = data.micro_batch * data.world_size
    if stage.batch_size % share:
        raise RunError(
            f"stages.{stage.name}.batch_size: expected a multiple of micro_batch times ranks, {share}, "
            f"got {stage.batch_size}"
        )
    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    return Arguments(
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
        eval_strategy="steps" if recipe.data.heldout else "no",
        eval_steps=stage.eval_every or steps,  # and at the end in any case
        save_strategy="steps" if stage.save_every else "no",
        save_steps=stage.save_every or 500,
        ignore_data_skip=True,
        report_to="none",
        disable_tqdm=True,
        seed=recipe.seed,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        fsdp=recipe.parallel == "fsdp2" and world > 1,
        # Each rank with files of its own: no rank has to hold all of it, and accelerate's whole ones hang when loaded.
        fsdp_config={"transformer_layer_cls_to_wrap": layers, "state_dict_type": "SHARDED_STATE_DICT"},
    )
