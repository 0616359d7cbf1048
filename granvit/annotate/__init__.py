"""Automatic annotation: raw images to shards of records, with a detector, a captioner or an OCR."""

from granvit.annotate.filters import BoxRules, Filters
from granvit.annotate.interfaces import AnnotationError, Captions, Detection, TextLine
from granvit.annotate.run import Report, annotate

__all__ = ["AnnotationError", "BoxRules", "Captions", "Detection", "Filters", "Report", "TextLine", "annotate"]
