"""A stage-1 step in stock transformers and torchvision, and its losses one sequence and one crop at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import roi_align
from torchvision.transforms.v2.functional import resized_crop

IGNORED = -100
Done = Callable[[str], None]  # is told the name of each part of a step as it ends


@dataclass(frozen=True)
class Scene:
    """One image, its boxes and what is asked about it.

    Attributes:
        pixels: uint8 (3, S, S).
        boxes: x0 y0 x1 y1 in whole pixels.
        asked: question and answer of the image, then of each box.
    """

    pixels: Tensor
    boxes: list[list[int]]
    asked: list[tuple[str, str]]


@dataclass(frozen=True)
class Losses:
    """What a step minimises.

    Attributes:
        total: scalar, with a gradient: the caption loss and, with a weight of 1, the distillation loss.
        caption: scalar, without one.
        tokens: the loss of each answer token, in the order of images, questions and tokens.
    """

    total: Tensor
    caption: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Models:
    """What every form of the step shares."""

    llava: Any
    teacher: Any
    decay: float
    tokenizer: Any

    @property
    def tower(self) -> Any:
        return self.llava.model.vision_tower

    @property
    def device(self) -> torch.device:
        return self.llava.lm_head.weight.device

    @property
    def grid(self) -> tuple[int, int]:
        side = self.tower.config.image_size // self.tower.config.patch_size
        return side, side


def see(tower: Any, pixels: Tensor) -> Tensor:
    """What LLaVA's projector reads: the last block's output, before the final norm."""
    size = tower.config.image_size
    embeddings = tower.embeddings(pixels, interpolate_pos_encoding=tuple(pixels.shape[-2:]) != (size, size))
    return tower.encoder(inputs_embeds=embeddings).last_hidden_state


def align(tokens: Tensor, grid: tuple[int, int], rois: Tensor, output: tuple[int, int]) -> Tensor:
    """Regions (R, h*w, C) of tokens (B, H*W, C); rois as torchvision has them, in cells of the grid."""
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    return roi_align(maps, rois, output, sampling_ratio=2, aligned=True).flatten(2).transpose(1, 2)


def _encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of the question up to where the answer begins, and those of the answer up to the end of the turn."""
    turn = [{"role": "user", "content": f"<image>\n{question}"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": answer}], tokenize=False)
    end = whole.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
    return tokenizer(prompt).input_ids, tokenizer(whole[len(prompt) : end]).input_ids


class _Step:
    """What the stock forms have in common: normalised pixels, crops, distillation and the teacher's average."""

    def __init__(self, models: Models, scenes: Sequence[Scene]) -> None:
        self.models = models
        # The image processor works in the data loader, outside the clock.
        self.pixels = (torch.stack([scene.pixels for scene in scenes]).float() / 255 - 0.5) / 0.5
        self.pixels = self.pixels.to(models.device)
        self.boxes = [(i, box) for i, scene in enumerate(scenes) for box in scene.boxes]
        patch = models.tower.config.patch_size
        rows = [[float(i), *(edge / patch for edge in box)] for i, box in self.boxes]
        self.rois = torch.tensor(rows, device=models.device)

    def distillation(self, tokens: Tensor, seen: Tensor) -> Tensor:
        return F.mse_loss(align(tokens, self.models.grid, self.rois, self.models.grid), seen.to(tokens.dtype))

    @torch.no_grad()
    def teach(self) -> Tensor:
        size = self.pixels.shape[-2:]
        crops = [self.crop(i, box, list(size)) for i, box in self.boxes]
        return see(self.models.teacher, torch.stack(crops))

    def crop(self, image: int, box: list[int], size: list[int]) -> Tensor:
        x0, y0, x1, y1 = box
        return resized_crop(self.pixels[image], y0, x0, y1 - y0, x1 - x0, size, antialias=True)

    @torch.no_grad()
    def move_teacher(self) -> None:
        decay = self.models.decay
        for average, current in zip(self.models.teacher.parameters(), self.models.tower.parameters(), strict=True):
            average.mul_(decay).add_(current, alpha=1 - decay)


class Stock(_Step):
    """One sequence an image, in which a dense mask keeps the answers apart; logits of the answers only."""

    def __init__(self, models: Models, scenes: Sequence[Scene]) -> None:
        super().__init__(models, scenes)
        rows = [self._row(scene) for scene in scenes]
        ids, labels, place, pair = (
            pad_sequence([torch.tensor(row[k]) for row in rows], batch_first=True, padding_value=padding)
            for k, padding in enumerate((models.tokenizer.pad_token_id, IGNORED, 0, -1))
        )
        length = ids.shape[1]
        apart = (pair[:, None] == 0) | (pair[:, None] == pair[:, :, None])  # [image, query, key]
        mask = apart & torch.ones(length, length, dtype=torch.bool).tril()
        self.ids, self.place, self.mask = (x.to(models.device) for x in (ids, place, mask[:, None]))
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        self.answers = (following != IGNORED).flatten().nonzero()[:, 0].to(models.device)
        self.labels = following[following != IGNORED].to(models.device)

    def _row(self, scene: Scene) -> tuple[list[int], list[int], list[int], list[int]]:
        """Tokens, labels, positions and the number of the pair of each token, 0 in front of the questions."""
        image, count = self.models.llava.config.image_token_id, self.models.grid[0] * self.models.grid[1]
        ids: list[int] = []
        labels: list[int] = []
        place: list[int] = []
        pair: list[int] = []
        for number, (question, answer) in enumerate(scene.asked, 1):
            prompt, rest = _encode(self.models.tokenizer, question, answer)
            at = prompt.index(image)
            if number == 1:
                ids = prompt[:at] + [image] * count
                labels, place, pair = [IGNORED] * len(ids), list(range(len(ids))), [0] * len(ids)
            own = prompt[at + 1 :] + rest
            ids = ids + own
            labels = labels + [IGNORED] * (len(prompt) - at - 1) + rest
            place = place + list(range(at + count, at + count + len(own)))
            pair = pair + [number] * len(own)
        return ids, labels, place, pair

    def losses(self, done: Done) -> Losses:
        llava = self.models.llava
        tokens = see(self.models.tower, self.pixels)
        done("student forward")
        embeds = llava.get_input_embeddings()(self.ids)
        image = (self.ids == llava.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(image, llava.model.multi_modal_projector(tokens).to(embeds.dtype))
        hidden = llava.model.language_model(
            inputs_embeds=embeds, attention_mask=self.mask, position_ids=self.place, use_cache=False
        ).last_hidden_state
        logits = llava.lm_head(hidden.flatten(0, 1)[self.answers])
        answers = F.cross_entropy(logits.float(), self.labels, reduction="none")
        done("LLM forward")
        seen = self.teach()
        done("teacher crops")
        distillation = self.distillation(tokens, seen)
        done("distillation loss")
        caption = answers.mean()
        return Losses(caption + distillation, caption.detach(), answers.detach())


class Plain(_Step):
    """One sequence a question, each with its image; logits of all tokens, as LLaVA's own forward makes them."""

    def __init__(self, models: Models, scenes: Sequence[Scene]) -> None:
        super().__init__(models, scenes)
        self.batch = sequences(models, scenes)
        self.shown = torch.tensor([i for i, scene in enumerate(scenes) for _ in scene.asked], device=models.device)

    def losses(self, done: Done) -> Losses:
        tokens = see(self.models.tower, self.pixels)
        done("student forward")
        out = self.models.llava(pixel_values=self.pixels[self.shown], use_cache=False, **self.batch)
        done("LLM forward")
        seen = self.teach()
        done("teacher crops")
        distillation = self.distillation(tokens, seen)
        done("distillation loss")
        answers = answer_losses(out.logits, self.batch["labels"])
        return Losses(out.loss + distillation, out.loss.detach(), answers)


def sequences(models: Models, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Tokens, mask and labels of one sequence a question, padded behind."""
    image, count = models.llava.config.image_token_id, models.grid[0] * models.grid[1]
    rows = []
    for question, answer in (pair for scene in scenes for pair in scene.asked):
        prompt, rest = _encode(models.tokenizer, question, answer)
        at = prompt.index(image)
        shown = prompt[:at] + [image] * count + prompt[at + 1 :]
        rows.append((shown + rest, [IGNORED] * len(shown) + rest, [1] * (len(shown) + len(rest))))
    ids, labels, mask = (
        pad_sequence([torch.tensor(row[k]) for row in rows], batch_first=True, padding_value=padding)
        for k, padding in enumerate((models.tokenizer.pad_token_id, IGNORED, 0))
    )
    device = models.device
    return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def answer_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each answer token, row by row."""
    answers = labels[:, 1:] != IGNORED
    return F.cross_entropy(logits[:, :-1][answers].float(), labels[:, 1:][answers], reduction="none")


@torch.no_grad()
def exact(models: Models, scenes: Sequence[Scene], *, native: bool) -> tuple[Tensor, float]:
    """The loss of each answer token and the distillation loss, one sequence and one crop at a time.

    Args:
        models: in the dtype to compute in.
        scenes: what the step learns from.
        native: whether crops keep their size, rounded to whole patches, or are resized to the frame.
    """
    answers, squares, count = [], 0.0, 0
    for scene in scenes:
        step = _Step(models, [scene])
        whole = sequences(models, [scene])
        for row in range(len(scene.asked)):
            one = {name: tensor[row : row + 1] for name, tensor in whole.items()}
            logits = models.llava(pixel_values=step.pixels, use_cache=False, **one).logits
            answers.append(answer_losses(logits, one["labels"]))
        tokens = see(models.tower, step.pixels)
        patch = models.tower.config.patch_size
        for (_, box), roi in zip(step.boxes, step.rois, strict=True):
            x0, y0, x1, y1 = box
            grid = models.grid
            if native:
                grid = max(1, int((y1 - y0) / patch + 0.5)), max(1, int((x1 - x0) / patch + 0.5))
            seen = see(models.teacher, step.crop(0, box, [grid[0] * patch, grid[1] * patch])[None])
            aligned = align(tokens, models.grid, roi[None], grid)
            squares += float((aligned - seen).double().square().sum())
            count += seen.numel()
    return torch.cat(answers), squares / count


def wide(module: nn.Module) -> Any:
    """A copy in float32."""
    return copy.deepcopy(module).float()
