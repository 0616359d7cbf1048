"""One micro-batch of a stage on fake tensors: its FLOPs, and what autograd keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import initialization

from granvit.model.assemble import Empty
from granvit.nn import BoxEmbedding, RegionAttentionPool
from granvit.recipe import Model, Stage

NATIVE_SHARE = 0.15  # of a frame that a crop of its own size has, on average; assumed


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


class Shell(nn.Module):
    """The parts of a GranViT, which :func:`part_parameters` and :func:`freeze` look for by name."""

    def __init__(self, empty: Empty, prompt: str) -> None:
        super().__init__()
        self.llava = empty.llava
        vision, text = self.llava.config.vision_config, self.llava.config.text_config
        has_region, has_box = prompt in ("region", "mixed"), prompt in ("box", "mixed")
        heads = vision.num_attention_heads
        with initialization.no_init_weights():
            self.region_prompt = RegionAttentionPool(vision.hidden_size, heads) if has_region else None
            self.box_prompt = BoxEmbedding(text.hidden_size) if has_box else None


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


def count(shell: Shell, model: Model, stage: Stage, shapes: Layout) -> tuple[float, float, float, float]:
    """Runs a micro-batch; with fake tensors, nothing is computed.

    Returns:
        FLOPs of the forward pass, of the backward pass and of the teacher, and bytes that autograd keeps in between,
        parameters left out.
    """
    llava, dtype = shell.llava, getattr(torch, model.dtype)
    parameters = {p.untyped_storage()._cdata for p in shell.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def counter() -> FlopCounterMode:
        return FlopCounterMode(display=False, custom_mapping=_ATTENTION)

    side = model.image_size
    compute = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with counter() as ahead, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), compute:
        outputs = _forward(shell, stage, shapes, torch.zeros(shapes.frames, 3, side, side))
    with counter() as back:
        torch.autograd.backward([x.float().sum() for x in outputs])
    teacher = 0.0
    if shapes.crops:
        with counter() as other, torch.no_grad(), compute:
            llava.model.vision_tower(torch.zeros(shapes.crops, 3, side, side))
        assert stage.distillation is not None
        teacher = other.get_total_flops() * (NATIVE_SHARE if stage.distillation.crops == "native" else 1.0)
    for parameter in shell.parameters():
        parameter.grad = None
    return float(ahead.get_total_flops()), float(back.get_total_flops()), teacher, float(sum(kept.values()))


def _forward(shell: Shell, stage: Stage, shapes: Layout, pixels: Tensor) -> list[Tensor]:
    """What the losses are taken of."""
    llava, outputs = shell.llava, []
    config = llava.config
    with torch.set_grad_enabled("vision" in stage.train):
        tokens = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    patches = (pixels.shape[-1] // config.vision_config.patch_size) ** 2
    tokens = tokens[:, -patches:]
    if shell.region_prompt is not None and (stage.prompt in ("region", "mixed") or not shapes.rows):
        outputs += [shell.region_prompt.k_proj(tokens), shell.region_prompt.v_proj(tokens)]
    if not shapes.rows:
        return outputs
    image = llava.model.multi_modal_projector(tokens)
    text = llava.get_input_embeddings()(torch.zeros(shapes.rows * shapes.length, dtype=torch.long))
    image = image.flatten(0, 1).to(text.dtype)
    embeddings = torch.cat([image, text[len(image) :]])[: len(text)]
    hidden = llava.model.language_model(
        inputs_embeds=embeddings.view(shapes.rows, shapes.length, -1),
        attention_mask=torch.ones(shapes.rows, 1, shapes.length, shapes.length, dtype=torch.bool),
        position_ids=torch.zeros(shapes.rows, shapes.length, dtype=torch.long),
        use_cache=False,
    ).last_hidden_state
    # Logits are made for answers only, and in chunks that do not stay.
    return [*outputs, llava.lm_head(hidden.flatten(0, 1)[: shapes.supervised])]
