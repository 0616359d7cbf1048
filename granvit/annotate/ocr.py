"""Text boxes and what is written in them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from granvit.annotate.interfaces import TextLine, loaded_once, running
from granvit.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class RapidOCRReader:
    """RapidOCR with the models that its wheel brings (PP-OCRv6 detection and recognition), without a download.

    Attributes:
        max_side: a larger image is made smaller for the search of lines, in pixels.
        grown: how far a box is grown around the core of a line that the network marks. RapidOCR's own 1.6 leaves so
            much room around low lines that many overlap their ink by less than IoU 0.5.
        turned: whether lines that stand on their heads are turned before they are read.
        threads: of ONNX Runtime; 1 where many processes work beside each other.
    """

    max_side: int = 2000
    grown: float = 1.0
    turned: bool = True
    threads: int = running(1)

    @property
    def name(self) -> str:
        """``"rapidocr"``."""
        return "rapidocr"

    def read(self, images: Sequence[Image]) -> list[list[TextLine]]:
        """The lines of text of each image from top to bottom, all of them with their scores.

        A line's box is the smallest upright one around the quadrangle that was found.

        Raises:
            MissingDependencyError: rapidocr or onnxruntime is not installed.
        """
        engine = _engine(self)
        return [_lines(engine, image) for image in images]


@loaded_once
def _engine(reader: RapidOCRReader) -> Any:
    try:
        importlib.import_module("onnxruntime")  # rapidocr itself would miss it only at the first image
        from rapidocr import RapidOCR
    except ImportError:
        raise MissingDependencyError(
            "RapidOCRReader needs rapidocr and onnxruntime: pip install 'granvit[annotate]'"
        ) from None
    settings = {
        "Global.text_score": 0.0,  # what is too uncertain is for the filters to count
        "Global.max_side_len": reader.max_side,
        "Global.use_cls": reader.turned,
        "Det.unclip_ratio": reader.grown,
        "Global.log_level": "error",
        "EngineConfig.onnxruntime.intra_op_num_threads": reader.threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return RapidOCR(params=settings)


def _lines(engine: Any, image: Image) -> list[TextLine]:
    import numpy as np

    found = engine(np.asarray(image)[:, :, ::-1])  # BGR
    if found.boxes is None:
        return []
    if getattr(found, "txts", None) is None:
        raise RuntimeError(f"RapidOCR found {len(found.boxes)} lines and read none of them; see its log")
    lines = []
    for polygon, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
        corners = np.asarray(polygon, dtype=np.float64) / image.size
        (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
        lines.append(TextLine((x0, y0, x1, y1), str(text), float(score)))
    return lines
