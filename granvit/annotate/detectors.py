"""Boxes of objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from granvit.annotate.interfaces import AnnotationError, Box, Detection, loaded_once, running
from granvit.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

_NEARLY_EQUAL = 0.8  # intersection over union


@dataclass(frozen=True)
class TransformersDetector:
    """Any object detection model of transformers that has a fixed list of labels (DETR, RT-DETR, YOLOS, ...).

    Attributes:
        model: name or folder.
        threshold: least score; the rest is for the filters to count.
        revision: of the model on the hub.
        device: where it runs.
        dtype: of its weights.
    """

    model: str
    threshold: float = 0.05
    revision: str | None = None
    device: str = running("cpu")
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The model's."""
        return self.model

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """The boxes of each image, all images in one batch of the model.

        Raises:
            MissingDependencyError: transformers is not installed.
            AnnotationError: the model cannot be loaded, or does not detect objects.
        """
        import torch

        processor, model = _detection_model(self)
        inputs = processor(images=list(images), return_tensors="pt").to(self.device, model.dtype)
        with torch.inference_mode():
            outputs = model(**inputs)
        sizes = [(image.height, image.width) for image in images]
        results = processor.post_process_object_detection(outputs, threshold=self.threshold, target_sizes=sizes)
        return [_detections(result, size, model.config.id2label) for result, size in zip(results, sizes, strict=True)]


@loaded_once
def _detection_model(detector: TransformersDetector) -> tuple[Any, Any]:
    try:
        import torch
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
    except ImportError:
        raise MissingDependencyError("TransformersDetector needs transformers: pip install 'granvit[train]'") from None
    try:
        processor = AutoImageProcessor.from_pretrained(detector.model, revision=detector.revision)
        model = AutoModelForObjectDetection.from_pretrained(
            detector.model, revision=detector.revision, dtype=getattr(torch, detector.dtype)
        )
    except (OSError, ValueError) as error:
        raise AnnotationError(f"detector {detector.model}: cannot be loaded: {first_line(error)}") from error
    return processor, model.to(detector.device).eval()


def first_line(error: Exception) -> str:
    """Of its text; the libraries' errors of missing models run over many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _detections(result: dict[str, Any], size: tuple[int, int], labels: dict[int, str]) -> list[Detection]:
    height, width = size
    boxes = result["boxes"].double() / result["boxes"].new_tensor([width, height, width, height]).double()
    rows = zip(boxes.tolist(), result["scores"].tolist(), result["labels"].tolist(), strict=True)
    return [Detection((box[0], box[1], box[2], box[3]), score, labels[label]) for box, score, label in rows]


@dataclass(frozen=True)
class SelectiveSearchDetector:
    """OpenCV's selective search (Uijlings et al., 2013): regions of one look, without a model, scores or labels.

    The search itself gives hundreds of boxes, many around the same thing, in an order that is drawn by chance. Here the
    box comes first that most others nearly equal, and one is passed over that covers much the same as one before it.

    Attributes:
        side: the image's shorter side is made this long for the search, in pixels.
        overlap: intersection over union above which boxes count as much the same.
        boxes: of an image at most.
    """

    side: int = 240
    overlap: float = 0.5
    boxes: int = 32

    @property
    def name(self) -> str:
        """``"selective-search"``."""
        return "selective-search"

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """The boxes of each image, those first that most proposals agree on.

        Raises:
            MissingDependencyError: OpenCV's contributed modules are not installed.
        """
        return [[Detection(box) for box in self._search(image)] for image in images]

    def _search(self, image: Image) -> list[Box]:
        import numpy as np

        search = _selective_search()
        zoom = self.side / min(image.size)
        small = image.resize((max(1, round(image.width * zoom)), max(1, round(image.height * zoom))))
        search.setBaseImage(np.ascontiguousarray(np.asarray(small)[:, :, ::-1]))  # BGR
        search.switchToSelectiveSearchFast()
        corners = np.array([(x, y, x + w, y + h) for x, y, w, h in search.process()], dtype=np.float64)
        corners = corners.reshape(-1, 4)
        # Sorted, and each once, so that chance is gone.
        found = np.unique(corners, axis=0) / (small.size * 2)
        overlaps = _overlaps(found)
        left = np.argsort(-(overlaps > _NEARLY_EQUAL).sum(1), kind="stable")
        chosen: list[Box] = []
        while len(left) and len(chosen) < self.boxes:
            x0, y0, x1, y1 = found[left[0]].tolist()
            chosen.append((x0, y0, x1, y1))
            left = left[1:][overlaps[left[0], left[1:]] <= self.overlap]
        return chosen


def _overlaps(boxes: Any) -> Any:
    """Intersection over union of every two boxes ``(N, 4)``, as a numpy array ``(N, N)``."""
    import numpy as np

    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clip(0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (areas[:, None] + areas[None] - shared)


def _selective_search() -> Any:
    try:
        from cv2.ximgproc import segmentation
    except ImportError:
        raise MissingDependencyError(
            "SelectiveSearchDetector needs OpenCV with its contributed modules: "
            "pip install 'granvit[selective-search]'; where another OpenCV lies over it, "
            "pip install --force-reinstall --no-deps opencv-contrib-python-headless"
        ) from None
    return segmentation.createSelectiveSearchSegmentation()
