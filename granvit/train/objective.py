"""What a step minimises: answers; regions that match their crops; for a cold encoder, regions that match captions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granvit.geometry import crop_boxes
from granvit.model.granvit import GranViT, Output
from granvit.model.native import native_grids, native_patches, packed_tokens
from granvit.model.packing import PackedBatch
from granvit.model.tower import grid_of, normalise, patch_of, vision_tokens
from granvit.ops import region_distill_loss
from granvit.recipe import Stage
from granvit.train.teacher import Teacher

_SAME = 1e-4  # of its length, the distance up to which a caption's mean embedding is another's: rounding, and no word


class NativeCrops(NamedTuple):
    """What the teacher is shown at its own size. Lengths follow from it, so it stays on the CPU with any device.

    Attributes:
        boxes: ``(R, 4)`` float32, relative to their frames.
        image_index: ``(R,)`` int64, the frame of each.
        grids: ``(R, 2)`` int64, the teacher's grid of each.
    """

    boxes: Tensor
    image_index: Tensor
    grids: Tensor


@dataclass
class Micro:
    """A micro-batch with what has to be known of it before it goes to a device.

    Attributes:
        batch: packed.
        crops: of every region; None where all are resized to the frame.
        tokens: supervised ones.
        cells: of the teacher's maps; of the contrastive objective, the regions that have a caption.
    """

    batch: PackedBatch
    crops: NativeCrops | None
    tokens: float
    cells: float

    def to(self, device: torch.device | str) -> Micro:
        """The same with the batch on a device; the crops stay on the CPU."""
        return replace(self, batch=self.batch.to(device, non_blocking=True))


class Counts(NamedTuple):
    """What the means of a step run over: the sums of all its micro-batches on all ranks."""

    tokens: float
    cells: float


@dataclass
class Losses:
    """The terms of a micro-batch, each divided by the step's count, so that they add up over micro-batches and ranks.

    Attributes:
        total: scalar, with a gradient: the weighted sum of the terms.
        caption: of the answers, scalar; None where the stage has none.
        distillation: of the regions, not weighted, scalar, or ``(R,)`` by region; likewise.
        contrastive: likewise.
        alignment: likewise.
        accuracy: of the contrastive objective: share of the regions whose nearest caption has their words; likewise.
        output: of the model; None for the contrastive objective.
    """

    total: Tensor
    caption: Tensor | None = None
    distillation: Tensor | None = None
    contrastive: Tensor | None = None
    alignment: Tensor | None = None
    accuracy: Tensor | None = None
    output: Output | None = None


class Objective(nn.Module):
    """The model of a stage with what its loss needs: a teacher, or the scale of a contrastive loss.

    Args:
        model: to train.
        stage: which terms there are.

    Attributes:
        teacher: of the self-distillation; None without.
        contrast: scale and bias of the sigmoid loss; None for captions.
    """

    teacher: Teacher | None
    contrast: Contrast | None

    def __init__(self, model: GranViT, stage: Stage) -> None:
        super().__init__()
        self.model = model
        self.contrastive = stage.objective == "contrastive"
        self.distillation = stage.distillation
        self.teacher = Teacher(self.tower, stage.distillation.decay) if stage.distillation else None
        regions = stage.regions * (stage.micro_batch or stage.batch_size)
        self.contrast = Contrast(regions) if self.contrastive else None

    @property
    def tower(self) -> nn.Module:
        """The student's vision tower."""
        return self.model.llava.model.vision_tower

    def micro(self, batch: PackedBatch) -> Micro:
        """Counts a batch that the data handed over, on the CPU."""
        tokens = float(len(batch.supervised))
        if self.contrastive:
            return Micro(batch, None, tokens, float(len(_captioned(batch))))
        if self.distillation is None:
            return Micro(batch, None, tokens, 0.0)
        size = (batch.pixels.shape[-2], batch.pixels.shape[-1])
        if self.distillation.crops == "resize":
            rows, columns = grid_of(self.tower, size)
            return Micro(batch, None, tokens, float(rows * columns * len(batch.boxes)))
        grids = native_grids(batch.boxes, batch.image_index, size, patch_of(self.tower))
        crops = NativeCrops(batch.boxes, batch.image_index, grids)
        return Micro(batch, crops, tokens, float(grids.prod(1).sum()))

    def forward(
        self, micro: Micro, counts: Counts | None = None, *, wrong_image: bool = False, by_region: bool = False
    ) -> Losses:
        """The losses of a micro-batch. Everything that is asked of the model goes through here, as sharding wants it.

        Args:
            micro: on the device of the model.
            counts: of the whole step; None where this is all of it.
            wrong_image: the answers with the images exchanged, as :class:`granvit.model.granvit.GranViT` has it, alone.
            by_region: the distillation as one value a region, for a report.
        """
        counts = counts or Counts(micro.tokens, micro.cells)
        share = micro.cells / max(counts.cells, 1.0)
        if self.contrast is not None:
            contrastive, alignment, hits = self.contrast(self.model, micro.batch)
            contrastive, alignment = contrastive * share, alignment * share
            return Losses(
                contrastive + alignment,
                contrastive=contrastive.detach(),
                alignment=alignment.detach(),
                accuracy=hits / max(counts.cells, 1.0),
            )
        output = self.model(micro.batch, wrong_image=wrong_image, items=max(counts.tokens, 1.0))
        losses = Losses(output.loss, caption=output.loss.detach(), output=output)
        if self.distillation is not None and not wrong_image:
            distilled = self.distill(micro, output.tokens, output.grid, "none" if by_region else "mean") * share
            losses.distillation = distilled.detach()
            if not by_region:
                losses.total = losses.total + self.distillation.weight * distilled
        # Only the total is differentiated: a sharded model would watch everything else that has a gradient, too.
        losses.output = replace(output, token_loss=output.token_loss.detach(), tokens=output.tokens.detach())
        return losses

    def distill(self, micro: Micro, tokens: Tensor, grid: tuple[int, int], reduction: str = "mean") -> Tensor:
        """Distance between the student's regions and the teacher's view of their crops.

        Args:
            micro: whose boxes are meant.
            tokens: ``(F, n, C)``, the student's.
            grid: rows and columns of them.
            reduction: as :func:`granvit.ops.region_distill_loss` has it.

        Returns:
            Scalar, or ``(R,)``.
        """
        if self.teacher is None or self.distillation is None:
            raise ValueError("distill: expected a stage with distillation")
        batch, tower, layer = micro.batch, self.teacher.tower, self.model.llava.config.vision_feature_layer
        with torch.no_grad():
            pixels = normalise(batch.pixels, self.model.mean, self.model.std, torch.float32)
            if not len(batch.boxes):
                # A stock tower takes no empty batch, and a sharded one has to run on every rank.
                seen = vision_tokens(tower, pixels.new_zeros(1, *pixels.shape[1:]), layer)[:0]
                seen = seen if micro.crops is None else seen.flatten(0, 1)
            elif micro.crops is None:
                crops = crop_boxes(pixels, batch.boxes, batch.image_index, (pixels.shape[-2], pixels.shape[-1]))
                seen = vision_tokens(tower, crops, layer)
            else:
                patches = native_patches(pixels, *micro.crops, patch_of(tower))
                seen = packed_tokens(tower, patches, micro.crops.grids, layer)
        return region_distill_loss(
            tokens,
            seen.to(tokens.dtype),
            batch.boxes,
            batch.image_index,
            grid,
            grid if micro.crops is None else micro.crops.grids,
            loss=self.distillation.loss,
            reduction=reduction,
        )


class Contrast(nn.Module):
    """Regions against their captions: the sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343), and their distance.

    A region is what its ``<region>`` token would be: vision tokens pooled under its box, through the projector. A
    caption is the mean of its tokens' input embeddings in the language model. The sigmoid loss compares both less the
    mean caption of the batch, since input embeddings share a large common part; regions with the same words count as
    positives of each other, and negatives are those of the micro-batch of one rank. It sees directions only, so the
    second term, the mean squared distance between regions and their captions by the mean squared length of a caption,
    brings a region to the very place of its words, where a frozen language model reads it as it reads them.

    Args:
        regions: in a micro-batch, about. The bias starts where one positive among so many is the least surprise, as the
            paper's -10 is for its 32 thousand.
    """

    def __init__(self, regions: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(-torch.tensor(float(max(regions, 1))).log())

    def forward(self, model: GranViT, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The sigmoid loss and the distance, each a mean over the regions that have a caption, and how many of these
        are nearest to a caption with their words; 0 without any."""
        regions = model.regions(batch)  # [R, D]
        with torch.autocast(regions.device.type, enabled=False):  # cosines near 1 and logits near -10 need float32
            words = self._captions(model, batch)  # [n, D]
            rows = torch.tensor(_captioned(batch), dtype=torch.int64, device=regions.device)
            found, centre = regions.float()[rows], words.sum(0) / max(len(rows), 1)
            length, centred = words.norm(dim=-1, keepdim=True), words - centre
            # Captions that are all the same leave nothing but rounding, which must not become a direction.
            text = centred / centred.norm(dim=-1, keepdim=True).maximum(_SAME * length)
            apart = torch.cdist(words, words, compute_mode="donot_use_mm_for_euclid_dist")  # which would round 0 up
            same = (apart <= _SAME * length).float() * 2 - 1
            logits = F.normalize(found - centre, dim=-1) @ text.T * self.scale.exp() + self.bias
            distance = (found - words).square().sum() / length.square().sum().clamp(min=torch.finfo(length.dtype).tiny)
            return -F.logsigmoid(same * logits).sum() / max(len(rows), 1), distance, _hits(logits, same)

    @torch.no_grad()
    def _captions(self, model: GranViT, batch: PackedBatch) -> Tensor:
        """Mean word embedding ``(n, D)`` of each caption."""
        row_of = {region: row for row, region in enumerate(_captioned(batch))}
        rows = [len(row_of) if pair.region is None else row_of[pair.region] for pair in batch.pairs]
        labels = batch.labels.flatten()[batch.supervised]
        pair = batch.pair.flatten()[batch.supervised] - 1
        last = torch.ones_like(pair, dtype=torch.bool)
        last[:-1] = pair[:-1] != pair[1:]  # the end of the turn, which is no word
        embeddings = model.llava.get_input_embeddings()(labels[~last]).float()
        row = torch.tensor(rows, dtype=torch.int64, device=labels.device)[pair[~last]]
        total = embeddings.new_zeros(len(row_of) + 1, embeddings.shape[1]).index_add_(0, row, embeddings)
        count = torch.bincount(row, minlength=len(row_of) + 1)
        return (total / count.clamp(min=1)[:, None])[:-1]  # less what the captions of whole images made


@torch.no_grad()
def _hits(logits: Tensor, same: Tensor) -> Tensor:
    """Of how many rows the largest logit stands where `same` is positive."""
    if not len(logits):
        return logits.new_zeros(())
    return (same.gather(1, logits.argmax(1, keepdim=True)) > 0).sum()


def _captioned(batch: PackedBatch) -> list[int]:
    """Rows of the boxes that have a caption among the pairs."""
    return sorted({pair.region for pair in batch.pairs if pair.region is not None})
