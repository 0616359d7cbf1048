"""``granvit data``: commands that make and look after shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from granvit.data.importers.cli import app as importers
from granvit.data.scenes.cli import app as scenes

app = typer.Typer(no_args_is_help=True, help="Make shards of images and regions, and look at them.")
app.add_typer(importers, name="import")
app.add_typer(scenes)

Folder = Annotated[Path, typer.Argument(help="Folder of shards, with its index.")]


@app.command()
def stats(
    shards: Folder, as_json: Annotated[bool, typer.Option("--json", help="Print plain data instead of tables.")] = False
) -> None:
    """Count what is in a folder of shards: kinds, sources, sizes, captions, repetitions, and what was left out."""
    from rich.console import Console

    from granvit.data.progress import progress_bar
    from granvit.data.shards import read_index
    from granvit.data.stats import collect, render

    there = sum(info.samples for info in read_index(shards))
    with progress_bar() as bar:
        task = bar.add_task("reading", total=there)
        found = collect(shards, lambda samples: bar.update(task, completed=samples))
    if as_json:
        print(json.dumps(found.plain(), indent=2))
    else:
        Console().print(render(found, shards))


@app.command()
def view(
    shards: Folder,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("out/view.html"),
    count: Annotated[int, typer.Option(min=1, help="Samples to show, drawn at random.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Write one self-contained page that shows samples with their boxes and captions, and filters them."""
    from granvit.data.progress import progress_bar
    from granvit.data.shards import read_index
    from granvit.data.view import write_page

    there = sum(info.samples for info in read_index(shards))
    with progress_bar() as bar:
        task = bar.add_task("drawing", total=min(count, there))
        shown = write_page(shards, out, count=count, seed=seed, progress=lambda n: bar.update(task, completed=n))
    print(f"wrote {out}: {shown} samples")


@app.command()
def verify(shards: Folder) -> None:
    """Compare every shard with the checksum in the index."""
    from granvit.data import shards as files

    files.verify(shards)
    print(f"{shards}: all {len(files.read_index(shards))} shards are what the index says")
