"""``granvit data``: commands that make and look after shards."""

from __future__ import annotations

import typer

from granvit.data.importers.cli import app as importers
from granvit.data.scenes.cli import app as scenes

app = typer.Typer(no_args_is_help=True, help="Make shards of images and regions.")
app.add_typer(importers, name="import")
app.add_typer(scenes)
