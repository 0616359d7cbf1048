"""``granvit data scenes`` and ``granvit data scenes-sheet``."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

_Split = Annotated[str, typer.Option(help="train, heldout or heldout-drawings.")]
_Kind = Annotated[str, typer.Option(help="natural, ocr or mixed.")]
_Seed = Annotated[int, typer.Option(help="Other seeds give other scenes.")]
_Size = Annotated[int, typer.Option(help="Side of the square images in pixels.")]


@app.command("scenes")
def write_scenes(
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")],
    split: _Split = "train",
    seed: _Seed = 0,
    kind: _Kind = "mixed",
    size: _Size = 256,
    first: Annotated[int, typer.Option(min=0, help="Number of the first scene.")] = 0,
    append: Annotated[bool, typer.Option(help="Go on after the shards that are there.")] = False,
) -> None:
    """Compose labelled scenes and write them as shards; nothing is downloaded."""
    from granvit.data.scenes import SceneComposer
    from granvit.data.shards import ShardWriter

    composer = SceneComposer(seed, split, size=size, kind=kind)
    start = time.perf_counter()
    regions = 0
    with ShardWriter(out, append=append) as writer:
        for index in range(first, first + count):
            record, image = composer[index]
            file = io.BytesIO()
            image.save(file, "JPEG", quality=92, subsampling=0)  # thin coloured lines stay what they are
            writer.add(record, file.getvalue(), "jpg")
            regions += len(record.regions)
    rate = count / (time.perf_counter() - start)
    print(f"{out}: {count} scenes with {regions} regions, {rate:.0f} images/s")


@app.command("scenes-sheet")
def write_sheet(
    out: Annotated[Path, typer.Option(help="The picture, a PNG.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 12,
    split: _Split = "train",
    seed: _Seed = 0,
    kind: _Kind = "mixed",
    size: _Size = 256,
) -> None:
    """Draw scenes side by side, every region framed, to look at."""
    from PIL import Image as pil

    from granvit.data.scenes import SceneComposer
    from granvit.data.scenes.contact import contact_sheet

    sheet = contact_sheet(SceneComposer(seed, split, size=size, kind=kind), range(count))
    out.parent.mkdir(parents=True, exist_ok=True)
    # 256 colours are enough to look at; the octree keeps rare ones, which the median cut loses.
    sheet.quantize(256, pil.Quantize.FASTOCTREE).save(out, "PNG", optimize=True)
    print(f"{out}: {count} scenes")
