"""What is left out, and why, by name: the limits of Gran-29M (arXiv 2510.21501), each of them a setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from granvit.annotate.interfaces import AnnotationError, Box
from granvit.data.record import MAX_CAPTION, Region

# Names under which an image is counted that is dropped, and a box; the order is that in which they are asked.
IMAGE_REASONS = ("unreadable", "image_side", "image_ratio", "long_caption", "no_regions")
BOX_REASONS = (
    *("box_flat", "score", "box_side", "box_ratio", "box_area"),
    *("duplicate", "max_regions", "empty_caption", "long_caption"),
)


@dataclass(frozen=True)
class BoxRules:
    """Limits of a box in pixels; None switches one off.

    Attributes:
        ratio: the longer side may be this many times the shorter.
        area: smallest, itself left out.
        side: the shorter side at least.
    """

    ratio: float | None = 3.0
    area: float | None = 100.0**2
    side: float | None = None

    def reason(self, width: float, height: float) -> str | None:
        """Why a box of this size is left out, or None."""
        short, long = sorted((width, height))
        if self.side is not None and short < self.side:
            return "box_side"
        if self.ratio is not None and long > self.ratio * short:
            return "box_ratio"
        if self.area is not None and width * height <= self.area:
            return "box_area"
        return None


# A line of text is longer than 3:1 and lower than 100 pixels by its nature; what makes it useless is letters too low to
# be told apart.
TEXT_LINES = BoxRules(ratio=None, area=None, side=8.0)


@dataclass(frozen=True)
class Filters:
    """What stays. None switches a limit off.

    Attributes:
        image_side: the shorter side of an image must be longer, in pixels.
        image_ratio: the longer side of an image may be this many times the shorter.
        natural: limits of the boxes of natural images; the paper's.
        ocr: of the boxes of ocr images, which the paper's limits would leave almost without lines.
        score: least of a box; a box without a score stays.
        duplicate: a box is left out whose intersection over union with a better one is above this.
        empty_captions: whether a region may stay that nobody has a caption for.
        regions: an image with fewer is dropped.
        max_regions: the best ones stay.
    """

    image_side: float | None = 448.0
    image_ratio: float | None = 3.0
    natural: BoxRules = field(default_factory=BoxRules)
    ocr: BoxRules = TEXT_LINES
    score: float | None = 0.5
    duplicate: float | None = 0.9
    empty_captions: bool = False
    regions: int = 1
    max_regions: int | None = None

    def check(self) -> Filters:
        """The filters themselves.

        Raises:
            AnnotationError: a limit that nothing or everything would pass.
        """
        ratios = {"image_ratio": self.image_ratio, "natural.ratio": self.natural.ratio, "ocr.ratio": self.ocr.ratio}
        for name, ratio in ratios.items():
            if ratio is not None and not ratio >= 1:
                raise AnnotationError(f"filters: {name}: expected at least 1, got {ratio}")
        for name in ("score", "duplicate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise AnnotationError(f"filters: {name}: expected 0 to 1, got {value}")
        if self.max_regions is not None and self.max_regions < max(1, self.regions):
            raise AnnotationError(f"filters: max_regions: expected at least {max(1, self.regions)}")
        return self

    def image(self, width: int, height: int) -> str | None:
        """Why an image of this size is dropped, or None."""
        short, long = sorted((width, height))
        if self.image_side is not None and short <= self.image_side:
            return "image_side"
        if self.image_ratio is not None and long > self.image_ratio * short:
            return "image_ratio"
        return None

    def boxes(self, regions: Sequence[Region], width: int, height: int, kind: str) -> tuple[list[Region], Counter[str]]:
        """The regions that stay, in their order, and how many each limit took.

        Args:
            regions: of an image.
            width: of the image in pixels.
            height: likewise.
            kind: of the image, ``"natural"`` or ``"ocr"``.
        """
        rules = self.natural if kind == "natural" else self.ocr
        dropped: Counter[str] = Counter()
        left: list[Region] = []
        for region in regions:
            reason = self._reason(region, width, height, rules)
            if reason is None:
                left.append(region)
            else:
                dropped[reason] += 1
        # Best first; among equals the larger, then the earlier.
        order = sorted(range(len(left)), key=lambda i: (-_score(left[i]), -left[i].area(), i))
        chosen: list[int] = []
        for i in order:
            if self.duplicate is not None and any(box_iou(left[i].box, left[j].box) > self.duplicate for j in chosen):
                dropped["duplicate"] += 1
            elif self.max_regions is not None and len(chosen) == self.max_regions:
                dropped["max_regions"] += 1
            else:
                chosen.append(i)
        return [left[i] for i in sorted(chosen)], dropped

    def captions(self, regions: Sequence[Region]) -> tuple[list[Region], Counter[str]]:
        """The regions whose captions can stay, and how many cannot."""
        dropped: Counter[str] = Counter()
        left = []
        for region in regions:
            if not region.caption.strip() and not self.empty_captions:
                dropped["empty_caption"] += 1
            elif len(region.caption) > MAX_CAPTION:
                dropped["long_caption"] += 1
            else:
                left.append(region)
        return left, dropped

    def _reason(self, region: Region, width: int, height: int, rules: BoxRules) -> str | None:
        x0, y0, x1, y1 = region.box
        if not (x0 < x1 and y0 < y1):  # and so for NaN
            return "box_flat"
        if self.score is not None and region.score is not None and not region.score >= self.score:
            return "score"
        # To a millionth of a pixel: a box of 300 x 100 pixels is 3:1 whatever its division by the image's size lost.
        return rules.reason(round((x1 - x0) * width, 6), round((y1 - y0) * height, 6))


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where both are without area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def _score(region: Region) -> float:
    return -1.0 if region.score is None else region.score
