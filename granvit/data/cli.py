"""``granvit data``: commands that make and look after shards."""

from __future__ import annotations

import typer

from granvit.annotate.cli import app as annotation

app = typer.Typer(no_args_is_help=True, help="Make shards of images and regions.")
app.add_typer(annotation)
