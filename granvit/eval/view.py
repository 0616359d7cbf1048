"""``granvit view`` and ``granvit report``: what a model looks at, and what a run came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
view = typer.Typer(no_args_is_help=True, help="Draw what a model looks at.")
app.add_typer(view, name="view")


@view.callback()
def _several() -> None:
    """Draw what a model looks at."""  # a Typer with one command and no callback has no subcommands


@view.command()
def attention(
    tower: Annotated[
        str,
        typer.Argument(
            help="Folder of a model or a run, a recipe (.yaml: before it trains), or a tower of transformers."
        ),
    ],
    image: Annotated[Path, typer.Argument(help="An image file.")],
    query: Annotated[
        list[str] | None, typer.Option(help="x,y relative to the image, 0 to 1; may be repeated. Left out, the middle.")
    ] = None,
    before: Annotated[str | None, typer.Option(help="Another tower, drawn above: as it was before training.")] = None,
    layers: Annotated[
        str, typer.Option("--layers", "--layer", help="1 is the first, -1 the last; several with commas, or all.")
    ] = "-1",
    heads: Annotated[bool, typer.Option("--heads", help="Each head apart, in place of their mean.")] = False,
    similarity: Annotated[
        bool, typer.Option("--feature-similarity", help="Cosine similarity of features, in place of attention.")
    ] = False,
    output: Annotated[Path, typer.Option(help="The picture, a PNG.")] = Path("out/attention.png"),
) -> None:
    """Draw the attention of tokens of a vision tower over an image, or which tokens they are like."""
    from granvit.eval.attention_picture import draw_looks, look, read_image
    from granvit.eval.opening import open_tower
    from granvit.model.tower import blocks_of

    points = [_point(text) for text in query or ["0.5,0.5"]]
    pixels = read_image(image)
    names = [name for name in (before, tower) if name is not None]
    looks = []
    for name, title in zip(names, ("before", "after") if before is not None else ("image",), strict=True):
        opened = open_tower(name)
        count = len(blocks_of(opened.module))
        numbers = _layers(layers, count)
        looks.append(look(opened, pixels, points, title=title, layers=numbers, heads=heads, similarity=similarity))
    which = "" if layers == "all" or "," in layers else f", layer {numbers[0]} of {count}"
    what = "Similarity to the marked token's feature" if similarity else "Attention of the marked token"
    draw_looks(pixels, looks, output, title=what + which)
    print(f"wrote {output}")


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected x,y such as 0.25,0.6, got {text!r}", param_hint="--query") from None
    return x, y


def _layers(text: str, count: int) -> list[int]:
    if text == "all":
        return list(range(1, count + 1))
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers or all, got {text!r}", param_hint="--layers") from None
    for number in numbers:
        if not 1 <= abs(number) <= count:
            raise typer.BadParameter(f"expected 1 to {count}, or -{count} to -1, got {number}", param_hint="--layers")
    return [number if number > 0 else count + 1 + number for number in numbers]


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    output: Annotated[Path | None, typer.Option(help="The page; left out, report.html in the folder.")] = None,
    attention: Annotated[bool, typer.Option(help="Load the towers and draw where they look.")] = True,
) -> None:
    """Write one page about a run: metrics before and after, curves, failures, cases, attention."""
    from granvit.data.progress import progress_bar
    from granvit.eval.report import write_report

    with progress_bar() as bar:
        task = bar.add_task("reading", total=None)
        path = write_report(
            run,
            output,
            attention=attention,
            progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        )
    print(f"wrote {path}")
