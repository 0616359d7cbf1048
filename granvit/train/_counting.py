"""What a step costs: each part of a model counted once on fake tensors, and what a micro-batch holds for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlavaForConditionalGeneration, initialization

from granvit.model.assemble import freeze
from granvit.model.granvit import GranViT
from granvit.model.tower import prefix_tokens
from granvit.nn import BoxEmbedding, RegionAttentionPool
from granvit.recipe import Model, Stage
from granvit.train.objective import Micro, Objective

NATIVE_SHARE = 0.15  # of a frame that a crop of its own size has, on average; assumed


@dataclass(frozen=True)
class Work:
    """What a micro-batch holds of everything that the products of matrices are proportional to.

    Attributes:
        vision: tokens of the frames in the tower, class and register tokens with them.
        vision_seen: pairs of such tokens of which one attends to the other.
        keys: vision tokens that region prompts are pooled from.
        pooled: region prompts.
        projected: vision tokens that the language model sees.
        language: tokens of the language model.
        language_seen: pairs of such tokens of which one attends to the other.
        answers: tokens that the output layer runs for.
        teacher: tokens of the crops in the teacher.
        teacher_seen: pairs of such tokens.
    """

    vision: float = 0.0
    vision_seen: float = 0.0
    keys: float = 0.0
    pooled: float = 0.0
    projected: float = 0.0
    language: float = 0.0
    language_seen: float = 0.0
    answers: float = 0.0
    teacher: float = 0.0
    teacher_seen: float = 0.0


class Pass(NamedTuple):
    """FLOPs ahead and back; back only as far as gradients have to go."""

    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class Costs:
    """FLOPs of one unit of each kind of :class:`Work`, in a stage; those of the teacher are of the tower, forward."""

    of_one: dict[str, Pass]

    def run(self, work: Work) -> tuple[float, float, float]:
        """FLOPs forward, backward and of the teacher, as kernels run them: a fused attention computes its scores again
        for the gradient."""
        own = [(self.of_one.get(f.name, Pass()), getattr(work, f.name)) for f in fields(work)]
        forward, backward = (sum(one[i] * count for one, count in own) for i in (0, 1))
        return forward, backward, self._teacher(work)

    def needed(self, work: Work) -> float:
        """FLOPs of forward, backward and teacher by the mathematics: nothing is computed twice."""
        total = self._teacher(work)
        for f in fields(work):
            one = self.of_one.get(f.name, Pass())
            # Two products ahead have four derivatives.
            backward = min(one.backward, 2 * one.forward) if f.name.endswith("_seen") else one.backward
            total += (one.forward + backward) * getattr(work, f.name)
        return total

    def _teacher(self, work: Work) -> float:
        linear, seen = (self.of_one.get(name, Pass()).forward for name in ("vision", "vision_seen"))
        return linear * work.teacher + seen * work.teacher_seen


@dataclass(frozen=True)
class Layout:
    """The shapes of one micro-batch.

    Attributes:
        images: in it.
        frames: pictures that the tower sees.
        crops: that the teacher sees, each a frame.
        prefix: tokens of an image that all its pairs share, image tokens with them.
        pairs: lengths of question and answer, of an image.
        rows: of the packed sequences.
        length: of a row.
        supervised: answer tokens of the micro-batch.
    """

    images: int
    frames: int
    crops: int
    prefix: int
    pairs: tuple[tuple[float, float], ...]
    rows: int
    length: int
    supervised: int

    @property
    def dropped(self) -> float:
        """Share of the text of an image that its row has no room for."""
        text = sum(q + a for q, a in self.pairs)
        return max(0.0, (self.prefix + text - self.length) / text) if text else 0.0

    @property
    def density(self) -> float:
        """Share of a dense attention square that the mask of packed pairs lets through."""
        seen = self.prefix**2 / 2 + sum((q + a) * (self.prefix + (q + a) / 2) for q, a in self.pairs)
        return min(1.0, self.images * seen / (self.rows * self.length**2)) if self.rows else 1.0

    def work(self, patches: int, prefix: int, stage: Stage, *, skips: bool) -> Work:
        """What it holds.

        Args:
            patches: of a frame.
            prefix: class and register tokens of a frame.
            stage: for its prompts and crops.
            skips: whether attention skips what the mask of packed pairs forbids; else it is dense.
        """
        pooling = stage.objective == "contrastive" or stage.prompt in ("region", "mixed")
        share = NATIVE_SHARE if stage.distillation is not None and stage.distillation.crops == "native" else 1.0
        crop = share * patches + prefix
        return Work(
            vision=self.frames * (patches + prefix),
            vision_seen=self.frames * (patches + prefix) ** 2,
            keys=self.frames * patches if pooling else 0,
            pooled=self.images * stage.regions if pooling else 0,
            projected=self.frames * patches if self.rows else 0,
            language=self.rows * self.length,
            language_seen=self.rows * self.length**2 * (self.density if skips else 1.0),
            answers=self.supervised,
            teacher=self.crops * crop,
            teacher_seen=self.crops * crop**2,
        )


def work_of(objective: Objective, micro: Micro) -> Work:
    """What a micro-batch of a run holds: padding and what the mask forbids left out. Waits for nothing if the batch is
    on the CPU, as it comes."""
    batch, tower = micro.batch, objective.tower
    prefix = prefix_tokens(tower)
    frames, frame = batch.pixels.shape[0], batch.tokens_per_frame + prefix
    crops = torch.zeros(0)
    if objective.distillation is not None:
        native = micro.crops is not None
        crops = micro.crops.grids.prod(1) + prefix if micro.crops is not None else crops
        crops = crops if native else torch.full((len(batch.boxes),), frame)
    pooled = len(batch.boxes) if objective.contrastive else len(batch.prompt_region)
    pooling = objective.model.region_prompt is not None and (objective.contrastive or pooled > 0)
    seen = Work(
        vision=frames * frame,
        vision_seen=frames * frame**2,
        keys=frames * batch.tokens_per_frame if pooling else 0,
        pooled=pooled if pooling else 0,
        teacher=float(crops.sum()),
        teacher_seen=float(crops.double().square().sum()),
    )
    if objective.contrastive:
        return seen
    real = batch.image >= 0
    image, pair = batch.image[real], batch.pair[real]
    prefixes = torch.bincount(image[pair == 0], minlength=len(batch.frames))  # text alone has none
    pairs = torch.bincount(pair[pair > 0])
    triangles = sum(float((x * (x + 1)).sum()) / 2 for x in (prefixes, pairs))
    return replace(
        seen,
        projected=frames * batch.tokens_per_frame,
        language=float(len(image)),
        language_seen=triangles + float(prefixes[image[pair > 0]].sum()),
        answers=micro.tokens,
    )


class Shell(nn.Module):
    """The parts of a GranViT, which :func:`part_parameters` and :func:`freeze` look for by name."""

    def __init__(self, llava: LlavaForConditionalGeneration, prompt: str) -> None:
        super().__init__()
        self.llava = llava
        vision, text = self.llava.config.vision_config, self.llava.config.text_config
        has_region, has_box = prompt in ("region", "mixed"), prompt in ("box", "mixed")
        heads = vision.num_attention_heads
        with initialization.no_init_weights():
            self.region_prompt = RegionAttentionPool(vision.hidden_size, heads) if has_region else None
            self.box_prompt = BoxEmbedding(text.hidden_size) if has_box else None


def costs_of(model: GranViT, settings: Model, stage: Stage) -> Costs:
    """What a stage of a run costs; counted on a copy without weights.

    Args:
        model: that trains.
        settings: section of the recipe.
        stage: which parts train.
    """
    config = copy.deepcopy(model.llava.config)
    config._attn_implementation = "sdpa"
    shapes = Layout(1, 1, 0, 0, (), 0, 0, 0)
    if stage.objective == "caption":
        tokens = config.image_seq_length
        shapes = Layout(1, 1, 0, tokens, (), 1, tokens + 64, 64)
    with FakeTensorMode():
        with initialization.no_init_weights():
            shell = Shell(LlavaForConditionalGeneration(config), model.prompt)
        freeze(shell, stage.train, frozen_dtype=getattr(torch, settings.dtype))
        return count(shell, settings, stage, shapes)[0]


def _sdpa(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# The counter knows every attention kernel but the CPU's.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


def _split(counter: FlopCounterMode) -> tuple[float, float]:
    """FLOPs outside and inside of attention."""
    counts = counter.get_flop_counts().get("Global", {})
    seen = sum(flops for op, flops in counts.items() if "scaled_dot_product" in str(op))
    return float(sum(counts.values()) - seen), float(seen)


class _Parts:
    """Runs one part of a model after the other ahead, each cut off from the one before, and then all of them back."""

    def __init__(self, keep: Callable[[Tensor], Tensor], compute: Any) -> None:
        self._keep, self._compute = keep, compute
        self._ahead: dict[str, FlopCounterMode] = {}
        self._outputs: dict[str, Tensor] = {}

    def run(self, name: str, part: Callable[..., Tensor], *inputs: Tensor, trains: bool = True) -> Tensor:
        """The part's output. A gradient goes back to those of its inputs that want one."""
        cut = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        keeping = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)
        with _counter() as ahead, keeping, self._compute, torch.set_grad_enabled(trains):
            self._outputs[name] = part(*cut)
        self._ahead[name] = ahead
        return self._outputs[name]

    def back(self) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
        """FLOPs of each part, forward and backward, each outside and inside of attention."""
        found = {}
        for name, output in self._outputs.items():
            with _counter() as back:
                if output.requires_grad:
                    torch.autograd.backward(output, torch.ones_like(output))
            found[name] = (_split(self._ahead[name]), _split(back))
        return found


def count(shell: Shell, model: Model, stage: Stage, shapes: Layout) -> tuple[Costs, float]:
    """Runs a micro-batch, a part at a time; with fake tensors, nothing is computed.

    Returns:
        The costs of the stage, and bytes that autograd keeps of this micro-batch, parameters left out.
    """
    dtype = getattr(torch, model.dtype)
    parameters = {p.untyped_storage()._cdata for p in shell.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    llava, parts = shell.llava, _Parts(keep, torch.autocast("cpu", dtype, enabled=dtype != torch.float32))
    pixels = torch.zeros(shapes.frames, 3, model.image_size, model.image_size)
    tokens = parts.run("vision", lambda x: _seen(llava, x), pixels, trains="vision" in stage.train)
    frame = tokens.shape[1]
    tokens = tokens[:, -((model.image_size // llava.config.vision_config.patch_size) ** 2) :]
    units = {"vision": (shapes.frames * frame, shapes.frames * frame**2)}
    project, region = llava.model.multi_modal_projector, shell.region_prompt
    if region is not None and (stage.prompt in ("region", "mixed") or not shapes.rows):
        parts.run("keys", lambda x: torch.cat([region.k_proj(x), region.v_proj(x)], -1), tokens)
        parts.run("pooled", lambda x, _: project(region.out_proj(x)), region.query[:1], tokens[0, :1])
        units |= {"keys": (tokens.shape[0] * tokens.shape[1], 0), "pooled": (1, 0)}
    if shapes.rows:
        image = parts.run("projected", project, tokens).flatten(0, 1)
        text = llava.get_input_embeddings()(torch.zeros(shapes.rows * shapes.length, dtype=torch.long))
        embeddings = torch.cat([image.to(text.dtype), text[len(image) :]])[: len(text)]
        hidden = parts.run("language", lambda x: _read(llava, x), embeddings.view(shapes.rows, shapes.length, -1))
        # Logits are made for answers only, and in chunks that do not stay.
        parts.run("answers", llava.lm_head, hidden.flatten(0, 1)[: shapes.supervised])
        units |= {
            "projected": (tokens.shape[0] * tokens.shape[1], 0),
            "language": (shapes.rows * shapes.length, shapes.rows * shapes.length**2),
            "answers": (shapes.supervised, 0),
        }
    of_one = {}
    for name, (ahead, back) in parts.back().items():
        tokens_of, pairs_of = units[name]
        of_one[name] = Pass(ahead[0] / max(tokens_of, 1), back[0] / max(tokens_of, 1))
        if pairs_of:
            of_one[f"{name}_seen"] = Pass(ahead[1] / pairs_of, back[1] / pairs_of)
    for parameter in shell.parameters():
        parameter.grad = None
    return Costs(of_one), float(sum(kept.values()))


def _seen(llava: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    found: Tensor = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    return found


def _read(llava: LlavaForConditionalGeneration, embeddings: Tensor) -> Tensor:
    rows, length = embeddings.shape[:2]
    hidden: Tensor = llava.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(rows, 1, length, length, dtype=torch.bool),
        position_ids=torch.zeros(rows, length, dtype=torch.long),
        use_cache=False,
    ).last_hidden_state
    return hidden
