"""``granvit data scenes`` and ``granvit data scenes-sheet``."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from granvit.errors import UserError, why_not_written

if TYPE_CHECKING:
    from granvit.data.scenes import SceneComposer

app = typer.Typer()

_Split = Annotated[str, typer.Option(help="train, heldout or heldout-drawings.")]
_Kind = Annotated[str, typer.Option(help="natural, ocr or mixed.")]
_Seed = Annotated[int, typer.Option(help="Other seeds give other scenes.")]
_Size = Annotated[int, typer.Option(help="Side of the square images in pixels.")]


@app.command("scenes")
def write_scenes(
    out: Annotated[Path, typer.Option(help="Folder for the shards; an unfinished run in it goes on.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")],
    split: _Split = "train",
    seed: _Seed = 0,
    kind: _Kind = "mixed",
    size: _Size = 256,
    first: Annotated[int, typer.Option(min=0, help="Number of the first scene.")] = 0,
    append: Annotated[bool, typer.Option("--append", help="Add to shards that another command made.")] = False,
) -> None:
    """Compose labelled scenes and write them as shards; nothing is downloaded. Stopped, it goes on where it was."""
    from granvit.data.progress import progress_bar
    from granvit.data.scenes import SceneComposer
    from granvit.data.shards import ShardWriter

    composer = SceneComposer(seed, split, size=size, kind=kind)
    there = 0 if append else _begun(out, composer, first)
    if there >= count:
        print(f"{out}: holds {there} of these scenes already; a larger --count adds to them")
        return
    start = time.perf_counter()
    regions = 0
    mended = "the same command goes on after them" if not append else "add the rest with --first and --append"
    with ShardWriter(out, append=append or there > 0, after_error=mended) as writer, progress_bar() as bar:
        task = bar.add_task("scenes", total=count, completed=there)
        for index in range(first + there, first + count):
            record, image = composer[index]
            file = io.BytesIO()
            image.save(file, "JPEG", quality=92, subsampling=0)  # thin coloured lines stay what they are
            writer.add(record, file.getvalue(), "jpg")
            regions += len(record.regions)
            bar.advance(task)
    rate = (count - there) / (time.perf_counter() - start)
    before = f", after {there} that were there" if there else ""
    print(f"{out}: {count - there} scenes with {regions} regions{before}, {rate:.0f} images/s")


def _begun(out: Path, composer: SceneComposer, first: int) -> int:
    """How many of these scenes a run that was stopped has left in finished shards.

    Since a scene depends on its number and the settings alone, the last one that is there tells whether they are those.

    Raises:
        ShardError: the folder holds something else.
    """
    from granvit.data.shards import INDEX, ShardError, open_shard, read_index

    shards = read_index(out) if (out / INDEX).exists() else []
    if not shards:
        return 0
    there = sum(info.samples for info in shards)
    with open_shard(out, shards[-1]) as shard:
        last = shard.record(len(shard) - 1)
    if last.to_json() != composer[first + there - 1][0].to_json():
        raise ShardError(
            f"{out}: holds {there} samples in {len(shards)} shards, and they are not the first of these scenes; "
            "take the same settings to go on, choose another folder, or add to them with --append"
        )
    return there


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
    from granvit.data.shards import write_atomically

    sheet = contact_sheet(SceneComposer(seed, split, size=size, kind=kind), range(count))
    file = io.BytesIO()
    # 256 colours are enough to look at; the octree keeps rare ones, which the median cut loses.
    sheet.quantize(256, pil.Quantize.FASTOCTREE).save(file, "PNG", optimize=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, file.getvalue())
    except OSError as error:
        raise UserError(f"{out}: {why_not_written(error)}") from error
    print(f"{out}: {count} scenes")
