"""``granvit data import``: a command for each format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from granvit.data.importers.driver import ImportReport, import_dataset

app = typer.Typer(
    no_args_is_help=True,
    help="Write a published dataset into shards. An import that was stopped does not go on: a rerun begins anew.",
)

Images = Annotated[Path, typer.Option(help="Folder of the images.")]
Out = Annotated[
    Path, typer.Option(help="Folder for the shards; what a stopped import left in it is to be deleted first.")
]
Samples = Annotated[int, typer.Option(help="Samples in a shard, at most.", min=1)]
Append = Annotated[bool, typer.Option("--append", help="Go on after the shards that are there.")]
Skip = Annotated[bool, typer.Option("--skip-broken", help="Count images that are missing or broken, and go on.")]
Limit = Annotated[int | None, typer.Option(help="Stop after so many samples.", min=1)]


@app.command()
def coco(
    instances: Annotated[Path, typer.Option(help="instances_train2017.json")],
    images: Images,
    out: Out,
    captions: Annotated[Path | None, typer.Option(help="captions_train2017.json")] = None,
    samples_per_shard: Samples = 1000,
    append: Append = False,
    skip_broken: Skip = False,
    limit: Limit = None,
) -> None:
    """COCO detection; names of categories are captions of regions."""
    driver = _driver(out, samples_per_shard, append, skip_broken, limit)
    _run("coco", driver, instances=instances, images=images, captions=captions)


@app.command()
def refcoco(
    refs: Annotated[Path, typer.Option(help="refs(unc).p, or JSON.")],
    images: Images,
    out: Out,
    instances: Annotated[Path | None, typer.Option(help="instances.json that belongs to the refs.")] = None,
    split: Annotated[str | None, typer.Option(help="train, val, testA, testB or test; needed with refs.")] = None,
    source: Annotated[str, typer.Option(help="Name of the dataset: refcoco, refcoco+ or refcocog.")] = "refcoco",
    samples_per_shard: Samples = 1000,
    append: Append = False,
    skip_broken: Skip = False,
    limit: Limit = None,
) -> None:
    """RefCOCO, RefCOCO+ and RefCOCOg; each expression is a region."""
    driver = _driver(out, samples_per_shard, append, skip_broken, limit)
    _run("refcoco", driver, refs=refs, images=images, instances=instances, split=split, source=source)


@app.command()
def visual_genome(
    descriptions: Annotated[Path, typer.Option(help="region_descriptions.json")],
    image_data: Annotated[Path, typer.Option(help="image_data.json")],
    images: Images,
    out: Out,
    samples_per_shard: Samples = 1000,
    append: Append = False,
    skip_broken: Skip = False,
    limit: Limit = None,
) -> None:
    """Visual Genome's region descriptions."""
    driver = _driver(out, samples_per_shard, append, skip_broken, limit)
    _run("visual-genome", driver, descriptions=descriptions, image_data=image_data, images=images)


@app.command()
def flickr30k(
    sentences: Annotated[Path, typer.Option(help="Folder Sentences.")],
    annotations: Annotated[Path, typer.Option(help="Folder Annotations.")],
    images: Images,
    out: Out,
    ids: Annotated[Path | None, typer.Option(help="train.txt, val.txt or test.txt; left out, all.")] = None,
    several: Annotated[str, typer.Option(help="A phrase with several boxes: union, each or skip.")] = "union",
    samples_per_shard: Samples = 1000,
    append: Append = False,
    skip_broken: Skip = False,
    limit: Limit = None,
) -> None:
    """Flickr30k Entities; each phrase with boxes is a region."""
    driver = _driver(out, samples_per_shard, append, skip_broken, limit)
    options = {"sentences": sentences, "annotations": annotations, "images": images, "ids": ids, "several": several}
    _run("flickr30k", driver, **options)


@app.command()
def llava(
    annotations: Annotated[Path, typer.Option(help="A JSON list of conversations, or .jsonl.")],
    images: Images,
    out: Out,
    style: Annotated[str, typer.Option(help="Of boxes in the text: relative, thousandths or pixels.")] = "relative",
    square: Annotated[
        bool, typer.Option("--square", help="Boxes are meant in the image padded to a square, as in LLaVA-1.5's data.")
    ] = False,
    captions: Annotated[
        bool, typer.Option("--captions", help="A conversation of one question gives the image's caption.")
    ] = False,
    source: Annotated[str, typer.Option(help="Name of the dataset.")] = "llava",
    samples_per_shard: Samples = 1000,
    append: Append = False,
    skip_broken: Skip = False,
    limit: Limit = None,
) -> None:
    """LLaVA's conversations; boxes in the text become regions."""
    driver = _driver(out, samples_per_shard, append, skip_broken, limit)
    options = {"style": style, "square": square, "captions": captions, "source": source}
    _run("llava", driver, annotations=annotations, images=images, **options)


@app.command()
def jsonl(
    annotations: Annotated[Path, typer.Option(help="A record of granvit a line, each with the path of its image.")],
    images: Images,
    out: Out,
    samples_per_shard: Samples = 1000,
    append: Append = False,
    skip_broken: Skip = False,
    limit: Limit = None,
) -> None:
    """JSON lines of granvit's own records."""
    driver = _driver(out, samples_per_shard, append, skip_broken, limit)
    _run("jsonl", driver, annotations=annotations, images=images)


def _driver(out: Path, samples_per_shard: int, append: bool, skip_broken: bool, limit: int | None) -> dict[str, Any]:
    return {
        "out": out,
        "samples_per_shard": samples_per_shard,
        "append": append,
        "skip_broken": skip_broken,
        "limit": limit,
    }


def _run(format: str, driver: dict[str, Any], **options: Any) -> None:
    """Imports under a progress bar, and prints what was written and what was left out."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        # Formats are read as streams, so how many samples there are is known at the end.
        task = bar.add_task(f"{format}: reading annotations", total=driver["limit"])

        def show(report: ImportReport) -> None:
            told = f"{format}: {report.samples} images, {report.regions} regions"
            bar.update(task, completed=report.samples, description=told)

        report = import_dataset(format, **driver, progress=show, **options)
    table = Table("", "count", title=f"{format} in {driver['out']}")
    table.add_row("images written", str(report.samples))
    table.add_row("regions written", str(report.regions))
    for reason, count in sorted(report.counts.items()):
        table.add_row(reason if reason.startswith("kept: ") else f"left out: {reason}", str(count))
    Console().print(table)
