"""Foreign datasets to shards: one file a format, and one driver for all."""

from granvit.data.importers.base import AnnotationError, Sample, relative_box
from granvit.data.importers.driver import FORMATS, ImportReport, import_dataset

__all__ = ["FORMATS", "AnnotationError", "ImportReport", "Sample", "import_dataset", "relative_box"]
