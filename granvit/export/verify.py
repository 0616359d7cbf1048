"""Whether an export gives what the model gave, on random images, questions and boxes."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from granvit.data.tasks import Templates
from granvit.export.region_head import load_region_head
from granvit.export.weights import ExportError
from granvit.geometry import format_box
from granvit.model.granvit import GranViT
from granvit.model.prompts import Prompts
from granvit.model.tower import grid_of, normalise, prefix_tokens, vision_tokens

# Of the largest value. In one dtype both sides run the same operations, so that nothing at all is expected; what is
# allowed is a few roundings, as between two builds of a library. A wrong weight costs as much as the values themselves.
ALLOWED = {"float32": 1e-5, "bfloat16": 2e-2}
_IMAGES = 2


@dataclass(frozen=True)
class Difference:
    """How far an export is from its model.

    Attributes:
        what: that was compared.
        largest: difference of two values.
        scale: the largest value there is.
        allowed: share of the scale that roundings may cost.
    """

    what: str
    largest: float
    scale: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether it is no more than rounding; not where anything is not finite."""
        return math.isfinite(self.largest) and self.largest <= self.allowed * self.scale

    def __str__(self) -> str:
        return f"{self.what}: largest difference {self.largest:.3g} of values up to {self.scale:.3g}"


def difference(what: str, before: Tensor, after: Tensor, allowed: float) -> Difference:
    """Compares two tensors.

    Raises:
        ExportError: they have another shape.
    """
    if before.shape != after.shape:
        raise ExportError(f"verify: {what}: expected shape {tuple(before.shape)}, got {tuple(after.shape)}")
    before, after = before.double(), after.double()
    return Difference(what, float((before - after).abs().max()), float(before.abs().max()), allowed)


@torch.no_grad()
def verify_llava(
    model: GranViT, tokenizer: PreTrainedTokenizerBase, image_size: int, dtype: str, folder: Path
) -> list[Difference]:
    """Tokens, pixels and logits of the export in plain transformers, beside those of the model in granvit.

    The pixels are those of images of the frame's size. Where the tower has register tokens, which plain LLaVA does not
    leave out, the model is run as plain LLaVA too.

    Args:
        model: with its parameters in `dtype`.
        tokenizer: its own.
        image_size: side of the square frame in pixels.
        dtype: ``"float32"`` or ``"bfloat16"``.
        folder: of the export.

    Raises:
        ExportError: the export cannot be run, or its tokens are others.
    """
    given = _inputs(model, image_size)
    after = _alone("llava", folder, given)
    _loaded(after, dtype)
    llava, prompts = model.llava.eval(), Prompts(tokenizer)
    registers = prefix_tokens(llava.model.vision_tower) > 1
    count = llava.config.image_seq_length if registers else _tokens_per_frame(model, image_size)
    before = []
    for i, ids in enumerate(prompts.encode_questions(given["questions"])):
        place = ids.index(prompts.image_id)
        row = torch.tensor(ids[:place] + [prompts.image_id] * count + ids[place + 1 :])
        if not torch.equal(row, after["ids"][i]):
            raise ExportError("verify: the processor of the export makes other tokens of a question than training did")
        pixels = given["pixels"][i : i + 1].to(llava.dtype)
        if registers:
            before.append(llava(input_ids=row[None], pixel_values=pixels).logits[0])
            continue
        seen = vision_tokens(llava.model.vision_tower, pixels, llava.config.vision_feature_layer)
        embeds = llava.get_input_embeddings()(row[None])
        places = (row == prompts.image_id)[None, :, None]
        embeds = embeds.masked_scatter(places, llava.model.multi_modal_projector(seen))
        before.append(llava(inputs_embeds=embeds).logits[0])
    return [
        difference("pixels", given["pixels"], torch.stack(after["pixels"]), ALLOWED["float32"]),
        difference("logits", torch.cat(before), torch.cat(after["logits"]), ALLOWED[dtype]),
    ]


@torch.no_grad()
def verify_vision(model: GranViT, image_size: int, dtype: str, folder: Path) -> list[Difference]:
    """Pixels and tokens of the exported tower in plain transformers, beside those of the model in granvit.

    Raises:
        ExportError: the export cannot be run.
    """
    given = _inputs(model, image_size)
    after = _alone("vision", folder, given)
    _loaded(after, dtype)
    tower = model.llava.model.vision_tower.eval()
    pixels = given["pixels"].to(tower.dtype)
    tokens = after["tokens"][:, prefix_tokens(tower) :]
    return [
        difference("pixels", given["pixels"], torch.stack(after["pixels"]), ALLOWED["float32"]),
        difference("tokens", vision_tokens(tower, pixels), tokens, ALLOWED[dtype]),
        difference("last_hidden_state", tower(pixels).last_hidden_state, after["normed"], ALLOWED[dtype]),
    ]


@torch.no_grad()
def verify_timm(model: GranViT, image_size: int, folder: Path) -> list[Difference]:
    """Tokens of the tower in timm, beside those of the model in granvit, both in float32 whatever the weights' dtype.

    Raises:
        ExportError: the export cannot be run.
    """
    given = _inputs(model, image_size)
    after = _alone("timm", folder, given)
    tower = copy.deepcopy(model.llava.model.vision_tower).float().eval()
    # timm adds up in another order than transformers does, in every layer.
    return [difference("timm's tokens", vision_tokens(tower, given["pixels"]), after["tokens"], 3e-5)]


@torch.no_grad()
def verify_region_head(model: GranViT, image_size: int, dtype: str, folder: Path) -> list[Difference]:
    """What the exported head makes of random tokens and boxes, beside what the model makes of them.

    Raises:
        ExportError: the export cannot be loaded.
    """
    head = load_region_head(folder)
    first, second = torch.rand(16, 2), torch.rand(16, 2)
    boxes = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], 1)
    index = torch.arange(16) % _IMAGES
    if model.box_prompt is not None:
        before, after = model.box_prompt(boxes), head(torch.empty(0), boxes, index)
        return [difference("box embeddings", before, after, ALLOWED[dtype])]
    assert model.region_prompt is not None
    tower = model.llava.model.vision_tower
    grid = grid_of(tower, (image_size, image_size))
    tokens = torch.randn(_IMAGES, grid[0] * grid[1], tower.config.hidden_size, dtype=getattr(torch, dtype))
    pooled = model.region_prompt(tokens, boxes, index, grid)[:, 0]
    before = model.llava.model.multi_modal_projector(pooled)
    return [difference("region tokens", before, head(tokens, boxes, index), ALLOWED[dtype])]


def _tokens_per_frame(model: GranViT, image_size: int) -> int:
    rows, columns = grid_of(model.llava.model.vision_tower, (image_size, image_size))
    return rows * columns


def _inputs(model: GranViT, image_size: int) -> dict[str, Any]:
    images = torch.randint(0, 256, (_IMAGES, 3, image_size, image_size), dtype=torch.uint8)
    corners = torch.rand(_IMAGES, 2, 2).sort(1).values.flatten(1).tolist()
    questions = [Templates.bbox_to_caption[0].format(box=format_box(box)) for box in corners]
    pixels = normalise(images, model.mean, model.std, torch.float32)
    return {"images": images, "pixels": pixels, "questions": questions, "threads": torch.get_num_threads()}


def _alone(kind: str, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What an interpreter without granvit makes of the inputs."""
    script = Path(__file__).with_name("_alone.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "in.pt", Path(place) / "out.pt"
        torch.save(given, source)
        command = [sys.executable, "-c", script, kind, str(folder.resolve()), str(source), str(target)]
        ran = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        if ran.returncode:
            last = (ran.stderr.strip() or f"exit code {ran.returncode}").splitlines()[-1]
            raise ExportError(f"verify: the export cannot be run without granvit: {last}")
        found: dict[str, Any] = torch.load(target, weights_only=True)
        return found


def _loaded(after: dict[str, Any], dtype: str) -> None:
    if after["loading"]:
        raise ExportError(f"verify: the export lacks weights, or has others than the model: {after['loading'][:3]}")
    if after["dtype"] != f"torch.{dtype}":
        raise ExportError(f"verify: expected the export to load as {dtype}, got {after['dtype']}")
