"""Recipes: what a training run reads, builds and does, from YAML with overrides.

AdamW at a rate of 1e-5, 256 images a step, frames of 512 pixels, and the distillation's weight of 1 and decay of 0.9
are the paper's (arXiv 2510.21501). The other defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from granvit._recipe_reading import RecipeError, above, apply_overrides, at_least, convert, dump_yaml, load_yaml
from granvit.data.tasks import TASKS
from granvit.errors import UserError

MAX_BROKEN = 0.01  # of the samples, where nobody says how many
PARTS = ("vision", "projector", "language", "prompts")
Prompt = Literal["text", "box", "region", "mixed"]


@dataclass(frozen=True)
class Source:
    """Where a vision or language model comes from: one of `name`, `package` and `config`.

    Attributes:
        name: on the Hugging Face hub, or a local folder.
        revision: branch, tag or commit of a hub name.
        package: installed Python package that carries the weights.
        gguf_file: file in the folder or package that holds a language model in GGUF; it is unpacked when loaded.
        config: a transformers config with ``model_type``, for random weights.
        tokenizer: hub name or folder, where the language model brings none.
    """

    name: str | None = None
    revision: str | None = None
    package: str | None = None
    gguf_file: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        given = [key for key in ("name", "package", "config") if getattr(self, key) is not None]
        if len(given) != 1:
            raise RecipeError("", f"expected one of name, package and config, got {' and '.join(given) or 'none'}")
        if self.config is not None and "model_type" not in self.config:
            raise RecipeError("config.model_type", "expected a model type of transformers, got none")
        if self.revision is not None and self.name is None:
            raise RecipeError("revision", f"expected none without a name, got {self.revision!r}")
        if self.gguf_file is not None and self.config is not None:
            raise RecipeError("gguf_file", f"expected none beside a config, got {self.gguf_file!r}")


@dataclass(frozen=True)
class Model:
    """What is trained: a stock LLaVA of a vision tower, a new projector and a language model, and region prompts.

    Attributes:
        vision: the tower: SigLIP (SigLIP 2 of fixed resolution is one), CLIP, DINOv2, DINOv3 or AIMv2.
        language: a causal language model.
        image_size: side of the square frame in pixels, a multiple of the patch.
        prompt: how a question may name a region: as coordinates in text, as a ``<box>`` or ``<region>`` token, or all.
        dtype: of the arithmetic (autocast) and of frozen weights; trained weights are float32.
        attention: of the language model; ``auto`` is flex_attention on CUDA and sdpa elsewhere.
    """

    vision: Source
    language: Source
    image_size: int = 512
    prompt: Prompt = "text"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "sdpa", "flex_attention"] = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size")
        for key in ("gguf_file", "tokenizer"):
            if getattr(self.vision, key) is not None:
                raise RecipeError(f"vision.{key}", "expected none for a vision model")
        _check_language(self.language, "language")


def _check_language(source: Source, key: str) -> None:
    if source.config is not None and source.tokenizer is None:
        raise RecipeError(f"{key}.tokenizer", "expected a tokenizer beside a config, got none")


@dataclass(frozen=True)
class Scenes:
    """Scenes that are composed while training; see :class:`granvit.data.scenes.SceneComposer`.

    Attributes:
        count: scenes in an epoch.
        kind: what they show.
        split: which material they are made of.
        seed: other seeds give other scenes.
        names: the only pictograms to show; empty is all. With fewer things to name, a small model learns them sooner.
    """

    count: int
    kind: Literal["natural", "ocr", "mixed"] = "mixed"
    split: Literal["train", "heldout", "heldout-drawings"] = "train"
    seed: int = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least(self, 1, "count")


@dataclass(frozen=True)
class DataSource:
    """One source of images: one of `scenes`, `shards` and `llava`.

    Attributes:
        scenes: composed while training.
        shards: folder that ``granvit data`` wrote.
        llava: JSON file of conversations, as LLaVA has them; see :class:`granvit.data.conversations.Conversations`.
        images: folder that the paths in `llava` start from.
        weight: how often it is drawn from, relative to the others; left out everywhere, by number of samples.
    """

    scenes: Scenes | None = None
    shards: str | None = None
    llava: str | None = None
    images: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        given = [key for key in ("scenes", "shards", "llava") if getattr(self, key) is not None]
        if len(given) != 1:
            raise RecipeError("", f"expected one of scenes, shards and llava, got {' and '.join(given) or 'none'}")
        if (self.llava is None) != (self.images is None):
            raise RecipeError("images", "expected the folder of images beside llava, and only there")
        above(self, 0, "weight")


@dataclass(frozen=True)
class Data:
    """What is read.

    Attributes:
        train: sources to train on, mixed by weight.
        heldout: sources for the evaluation, each read whole.
        max_length: tokens of a sequence row; an image whose questions need more loses some, and they are counted.
        workers: processes that read and prepare, of each rank.
        flip: share of the images that are mirrored, boxes with them; not where there is text, and no conversations.
        tiles: most tiles beside the overview with which a large image is shown; 0 is the overview alone.
        max_broken: share of the samples that may be unreadable, of 1,000 or more. They are left out and counted; a run
            with more of them ends. 0 ends it at the first.
    """

    train: tuple[DataSource, ...]
    heldout: tuple[DataSource, ...] = ()
    max_length: int = 2048
    workers: int = 2
    flip: float = 0.0
    tiles: int = 0
    max_broken: float = MAX_BROKEN

    def __post_init__(self) -> None:
        if not self.train:
            raise RecipeError("train", "expected at least one source, got none")
        at_least(self, 1, "max_length")
        at_least(self, 0, "workers", "flip", "tiles", "max_broken")
        if self.max_broken >= 1:
            raise RecipeError("max_broken", f"expected a share of less than 1, got {self.max_broken}")
        if self.flip > 1:
            raise RecipeError("flip", f"expected a share of at most 1, got {self.flip}")
        weighted = [source.weight is not None for source in self.train]
        if any(weighted) and not all(weighted):
            raise RecipeError(f"train.{weighted.index(False)}.weight", "expected a weight, as other sources have one")
        for i, source in enumerate(self.heldout):
            if source.weight is not None:
                raise RecipeError(f"heldout.{i}.weight", "expected none: held-out sources are read whole")


@dataclass(frozen=True)
class Distillation:
    """Self-distillation: regions of the student's map against a moving average of the student that sees the crops.

    Attributes:
        weight: of the loss beside the caption loss; the paper's lambda.
        decay: of the teacher, which becomes ``decay * teacher + (1 - decay) * student`` after each step; the paper's a.
        crops: resized to the frame, as in the paper, or at their own size in one packed batch, which is faster.
        loss: between features.
    """

    weight: float = 1.0
    decay: float = 0.9
    crops: Literal["resize", "native"] = "resize"
    loss: Literal["mse", "cosine"] = "mse"

    def __post_init__(self) -> None:
        above(self, 0, "weight")
        if not 0 <= self.decay < 1:
            raise RecipeError("decay", f"expected at least 0 and less than 1, got {self.decay}")


@dataclass(frozen=True)
class Stage:
    """One stage of training with AdamW.

    Attributes:
        name: of the stage, unique in the recipe.
        train: the parts that train; all others are frozen.
        objective: captions and boxes as text (GranViT), or region features against their captions (a warm start for a
            tower that begins with random weights).
        tasks: how often each is asked, as in :class:`granvit.data.tasks.TaskSampler`; ``chat`` stands for
            conversations, which ask their own questions. Empty for the contrastive objective.
        style: how boxes are written in text.
        prompt: how Bbox2Caption names its region; must be among what the model has. ``mixed`` draws.
        regions: of an image that are asked about, and distilled, at most.
        language: another language model from this stage on.
        steps: optimizer steps; this or `epochs`.
        epochs: passes over the training sources.
        batch_size: images a step, of all ranks together.
        micro_batch: images that one rank takes at once, hence gradients accumulate; None is all of its share.
        learning_rate: the peak.
        rates: other peaks, by part.
        schedule: after the warm-up, down to 0 at the end of the stage unless constant.
        warmup: linear, in steps (1 or more) or as a share of the stage (less than 1).
        weight_decay: of matrices; vectors have none.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        distillation: None is without.
        gradient_checkpointing: keep only what enters each layer, and compute the rest again.
        compile: compile the tower and the language model.
        eval_every: steps between evaluations; None is at the end only.
        save_every: steps between checkpoints; None is at the end only.
        log_every: steps between lines of the log.
        wrong_image: log also the loss with the images exchanged; the gap shows whether the image is used.
    """

    name: str
    train: tuple[Literal["vision", "projector", "language", "prompts"], ...]
    objective: Literal["caption", "contrastive"] = "caption"
    tasks: dict[str, float] = field(default_factory=dict)
    style: Literal["relative", "thousandths", "pixels"] = "relative"
    prompt: Prompt = "text"
    regions: int = 8
    language: Source | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 256
    micro_batch: int | None = None
    learning_rate: float = 1e-5
    rates: dict[str, float] = field(default_factory=dict)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    distillation: Distillation | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    wrong_image: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size", "micro_batch", "eval_every", "save_every", "log_every")
        at_least(self, 0, "regions", "warmup", "weight_decay")
        above(self, 0, "epochs", "learning_rate", "max_grad_norm")
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError("steps", "expected either steps or epochs")
        if self.steps is not None and self.warmup >= max(self.steps, 1 + 1e-9):
            raise RecipeError("warmup", f"expected fewer steps than the stage has, {self.steps}, got {self.warmup:g}")
        if not self.train or len(set(self.train)) < len(self.train):
            raise RecipeError("train", f"expected one or more of {', '.join(PARTS)}, each once, got {list(self.train)}")
        self._check_parts()
        self._check_tasks()
        if self.language is not None:
            _check_language(self.language, "language")

    def _check_parts(self) -> None:
        for part, rate in self.rates.items():
            if part not in self.train:
                raise RecipeError(f"rates.{part}", f"expected a part that trains ({', '.join(self.train)})")
            if not 0 < rate < float("inf"):
                raise RecipeError(f"rates.{part}", f"expected a finite number above 0, got {rate}")
        if self.distillation is not None and "vision" not in self.train:
            raise RecipeError("distillation", "expected none where the vision tower is frozen")
        if self.objective == "contrastive" and "vision" not in self.train:
            raise RecipeError("train", "expected vision among the parts that a contrastive stage trains")

    def _check_tasks(self) -> None:
        known = (*TASKS, "chat")
        for task, weight in self.tasks.items():
            if task not in known:
                raise RecipeError(f"tasks.{task}", f"unknown task; known are {', '.join(known)}")
            if not 0 <= weight < float("inf"):
                raise RecipeError(f"tasks.{task}", f"expected a finite number of at least 0, got {weight}")
        asked = any(self.tasks.values())
        if self.objective == "contrastive" and asked:
            raise RecipeError("tasks", "expected none for the contrastive objective, which asks nothing")
        if self.objective == "caption" and not asked:
            raise RecipeError("tasks", f"expected at least one of {', '.join(known)} with a weight above 0")
        if self.tasks.get("chat") and any(self.tasks.get(task) for task in TASKS):
            raise RecipeError("tasks.chat", "expected no other task beside it: conversations ask their own questions")


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        name: of the run.
        output: folder for checkpoints, logs and this recipe as it was resolved.
        model: what is trained.
        data: what is read.
        stages: one after the other, each with the weights of the one before.
        start: checkpoint folder of another run whose weights the first stage begins with; its parts are those of
            `model`. None begins with the weights of the parts and a new projector.
        parallel: how several processes share the work: each with all weights (``ddp``), or each with a piece of them
            (``fsdp2``).
        seed: of new weights and of all draws.
    """

    name: str
    output: str
    model: Model
    data: Data
    stages: tuple[Stage, ...]
    start: str | None = None
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise RecipeError("stages", "expected at least one, got none")
        at_least(self, 0, "seed")
        has = {"text", "box", "region", "mixed"} if self.model.prompt == "mixed" else {"text", self.model.prompt}
        names: set[str] = set()
        for i, stage in enumerate(self.stages):
            if stage.name in names or "/" in stage.name or not stage.name.strip(". "):
                raise RecipeError(f"stages.{i}.name", f"expected a unique name for a folder, got {stage.name!r}")
            names.add(stage.name)
            if stage.prompt not in has:
                raise RecipeError(f"stages.{i}.prompt", f"{stage.prompt} needs model.prompt to be that or mixed")
            if "prompts" in stage.train and self.model.prompt == "text":
                raise RecipeError(f"stages.{i}.train", "prompts: model.prompt is text, which has no parameters")
            prompted = stage.prompt != "text" and stage.tasks.get("bbox_to_caption")
            if "prompts" in stage.train and stage.objective == "caption" and not prompted:
                raise RecipeError(
                    f"stages.{i}.train",
                    "expected no prompts where nothing is asked by a <box> or <region>; only bbox_to_caption is",
                )
            if stage.objective == "contrastive" and "region" not in has:
                raise RecipeError(f"stages.{i}.objective", "contrastive needs model.prompt to be region or mixed")
            self._check_data(i, bool(stage.tasks.get("chat")))

    def _check_data(self, stage: int, chat: bool) -> None:
        if any((source.llava is not None) != chat for source in self.data.train):
            raise RecipeError(
                f"stages.{stage}.tasks",
                "chat needs data.train to be conversations only (llava), and the other tasks none of them",
            )

    def dump(self, path: str | Path) -> None:
        """Writes the recipe with every default filled in; :func:`load` reads the same from it.

        Raises:
            UserError: it cannot be written.
        """
        try:
            Path(path).write_text(to_yaml(self), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot write the recipe: {error.strerror}") from error


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in."""
    return dump_yaml(_plain(asdict(recipe)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file.
        overrides: ``key=value`` with a dotted key and a value in YAML, such as ``stages.stage1.steps=10``; a list is
            entered by position or by the ``name`` of an entry.

    Raises:
        RecipeError: one sentence with the file, the dotted key and, for an unknown key, the nearest known one.
    """
    try:
        tree = apply_overrides(load_yaml(path), overrides)
        recipe = convert(tree, Recipe, "")
    except RecipeError as error:
        raise error.within(str(path)) from None
    assert isinstance(recipe, Recipe)
    return recipe
