"""``granvit data``: making, reading and checking region data."""

from __future__ import annotations

import typer

from granvit.annotate.cli import annotate

app = typer.Typer(no_args_is_help=True, help="Make, read and check region data.")
app.command()(annotate)
