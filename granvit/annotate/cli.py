"""The commands of annotation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from granvit.errors import UserError

if TYPE_CHECKING:
    from granvit.annotate.audit import Audit
    from granvit.annotate.interfaces import OCR, Captioner, Detector
    from granvit.annotate.run import Report

app = typer.Typer()


@app.command()
def annotate(
    images: Annotated[list[str], typer.Argument(help="Files, folders and glob patterns.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards; an unfinished run in it goes on.")],
    kind: Annotated[
        str | None, typer.Option(help="natural or ocr; left out, ocr where --ocr is given, else natural.")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="selective-search, or transformers:MODEL (a name on the hub or a folder).")
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="transformers:MODEL or vllm:MODEL; left out, boxes keep the detector's labels.")
    ] = None,
    ocr: Annotated[str | None, typer.Option(help="rapidocr.")] = None,
    show: Annotated[str, typer.Option(help="How the captioner sees a box: crop or draw.")] = "crop",
    device: Annotated[str, typer.Option(help="Where models of transformers run.")] = "cpu",
    image_side: Annotated[float, typer.Option(help="The image's shorter side must be longer, in pixels.")] = 448,
    image_ratio: Annotated[float, typer.Option(help="Longest aspect ratio of an image.")] = 3,
    box_ratio: Annotated[float, typer.Option(help="Longest aspect ratio of a box of a natural image.")] = 3,
    box_area: Annotated[float, typer.Option(help="Its area must be larger, in pixels.")] = 100**2,
    text_height: Annotated[float, typer.Option(help="Least height of a line of text, in pixels.")] = 8,
    paper_text_boxes: Annotated[
        bool, typer.Option("--paper-text-boxes", help="Boxes of text have the limits of other boxes, as in the paper.")
    ] = False,
    score: Annotated[float, typer.Option(help="Least score of a box.")] = 0.5,
    duplicate: Annotated[float, typer.Option(help="Intersection over union above which boxes are one.")] = 0.9,
    max_regions: Annotated[int | None, typer.Option(help="Of an image; the best ones stay.")] = None,
    empty_captions: Annotated[bool, typer.Option("--empty-captions", help="Keep boxes without a caption.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images that annotators see together.")] = 8,
    shard_samples: Annotated[int, typer.Option(help="Images of a shard.")] = 1000,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Processes, 0 for this one (local), or actors a step (ray).")
    ] = None,
    gpus: Annotated[float, typer.Option(help="GPUs of each Ray actor.")] = 0,
    ray_address: Annotated[str | None, typer.Option(help="Of a running Ray cluster, or auto.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Find, caption and filter the regions of raw images, and write shards; stopped, it goes on where it was."""
    from granvit.annotate import run
    from granvit.annotate.filters import BoxRules, Filters

    _need_annotator(detector, ocr)
    rules = BoxRules(box_ratio, box_area)
    filters = Filters(
        image_side=image_side,
        image_ratio=image_ratio,
        natural=rules,
        ocr=rules if paper_text_boxes else BoxRules(None, None, text_height),
        score=score,
        duplicate=duplicate,
        empty_captions=empty_captions,
        max_regions=max_regions,
    )
    report = run.annotate(
        images,
        out,
        kind=kind or ("natural" if ocr is None else "ocr"),
        detector=None if detector is None else make_detector(detector, device),
        captioner=None if captioner is None else make_captioner(captioner, show, device),
        ocr=None if ocr is None else make_ocr(ocr),
        filters=filters,
        batch_size=batch_size,
        shard_samples=shard_samples,
        engine=engine,
        workers=int(engine == "ray") if workers is None else workers,
        gpus=gpus,
        ray_address=ray_address,
        progress=not as_json,
    )
    if as_json:
        print(report.to_json().decode())
    else:
        show_report(report)


@app.command()
def audit(
    shards: Annotated[Path, typer.Argument(help="Folder of shards whose records are the truth.")],
    kind: Annotated[
        str | None, typer.Option(help="natural or ocr; left out, ocr where --ocr is given, else natural.")
    ] = None,
    detector: Annotated[str | None, typer.Option(help="As for annotate.")] = None,
    captioner: Annotated[str | None, typer.Option(help="As for annotate.")] = None,
    ocr: Annotated[str | None, typer.Option(help="As for annotate.")] = None,
    show: Annotated[str, typer.Option(help="How the captioner sees a box: crop or draw.")] = "crop",
    device: Annotated[str, typer.Option(help="Where models of transformers run.")] = "cpu",
    iou: Annotated[float, typer.Option(help="Least intersection over union of a box and its truth.")] = 0.5,
    score: Annotated[float, typer.Option(help="Least score of a box.")] = 0.5,
    all_boxes: Annotated[bool, typer.Option("--all-boxes", help="Without the limits of boxes' sizes.")] = False,
    samples: Annotated[int | None, typer.Option(help="Only so many of this kind.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images that annotators see together.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Annotate images whose truth is known, and print recall, precision and how often the text is exact."""
    from itertools import islice

    from granvit.annotate import audit as package
    from granvit.annotate.filters import BoxRules, Filters
    from granvit.data.progress import progress_bar
    from granvit.data.shards import read_index

    _need_annotator(detector, ocr)
    kind = kind or ("natural" if ocr is None else "ocr")
    nothing = BoxRules(None, None, None)
    there = sum(info.kinds.get(kind, 0) for info in read_index(shards))
    of_kind = (sample for sample in package.shard_samples(shards) if sample[0].kind == kind)
    with progress_bar() as bar:
        task = bar.add_task("annotating", total=there if samples is None else min(samples, there))
        result = package.audit(
            islice(of_kind, samples),
            kind=kind,
            detector=None if detector is None else make_detector(detector, device),
            captioner=None if captioner is None else make_captioner(captioner, show, device),
            ocr=None if ocr is None else make_ocr(ocr),
            filters=Filters(natural=nothing, ocr=nothing, score=score) if all_boxes else Filters(score=score),
            iou=iou,
            batch_size=batch_size,
            progress=lambda images: bar.update(task, completed=images),
        )
    if as_json:
        print(result.to_json().decode())
    else:
        show_audit(result)


def _need_annotator(detector: str | None, ocr: str | None) -> None:
    if detector is None and ocr is None:
        raise UserError(
            "say who finds the regions: --detector for natural images, or --ocr rapidocr for images of text"
        )


def make_detector(text: str, device: str) -> Detector:
    """The detector that an option names.

    Raises:
        UserError: there is none of that name.
    """
    from granvit.annotate.detectors import SelectiveSearchDetector, TransformersDetector

    engine, _, model = text.partition(":")
    if text == "selective-search":
        return SelectiveSearchDetector()
    if engine == "transformers" and model:
        return TransformersDetector(model, device=device)
    raise UserError(f"--detector: expected selective-search or transformers:MODEL, got {text!r}")


def make_captioner(text: str, show: str, device: str) -> Captioner:
    """The captioner that an option names.

    Raises:
        UserError: there is none of that name.
    """
    from granvit.annotate.captioners import Questions, TransformersCaptioner, VLLMCaptioner

    engine, _, model = text.partition(":")
    if engine == "transformers" and model:
        return TransformersCaptioner(model, Questions(show), device=device)
    if engine == "vllm" and model:
        return VLLMCaptioner(model, Questions(show))
    raise UserError(f"--captioner: expected transformers:MODEL or vllm:MODEL, got {text!r}")


def make_ocr(text: str) -> OCR:
    """The OCR that an option names.

    Raises:
        UserError: there is none of that name.
    """
    from granvit.annotate.ocr import RapidOCRReader

    if text == "rapidocr":
        return RapidOCRReader()
    raise UserError(f"--ocr: expected rapidocr, got {text!r}")


def show_report(report: Report) -> None:
    """Prints what became of images and boxes."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "images", "boxes", title="annotation")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("found", str(report.images), str(report.found))
    for name in (*report.dropped, *report.boxes_dropped):
        table.add_row(f"dropped: {name}", _count(report.dropped, name), _count(report.boxes_dropped, name))
    table.add_row("written", str(report.samples), str(report.regions))
    Console().print(table)
    if not report.samples:
        print("No image is left: the table says which limits took them, and --help how to change these.")


def show_audit(result: Audit) -> None:
    """Prints what was found of the truth."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "shorter side", "regions", "recall", "exact text", title=f"{result.images} images, IoU {result.iou:g}"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, count in {**result.sizes, "all": result.all}.items():
        table.add_row(name, str(count.truth), _share(count.recall), _share(count.exact_rate))
    Console().print(table)
    print(f"precision {_share(result.precision) or 'unknown, nothing was found'} of {result.found} found regions")


def _share(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1%}"


def _count(counts: dict[str, int], name: str) -> str:
    return str(counts[name]) if name in counts else ""
