"""``granvit eval`` and ``granvit probe``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer()

_Images = Annotated[int | None, typer.Option(help="Of each source, drawn at random; left out, all.")]
_Device = Annotated[str | None, typer.Option(help="cpu or cuda; left out, cuda where there is one.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the results that the folder holds.")]


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a model, or of a run: its last finished stage.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Shards, a recipe's held-out data (.yaml), questions (.jsonl), or scenes:KIND:COUNT; may be repeated. "
            "Left out, the held-out data of the model's run."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; an unfinished run in it goes on.")] = Path(
        "out/eval"
    ),
    tasks: Annotated[
        str, typer.Option(help="Of global_caption, bbox_to_caption, caption_to_bbox, with commas.")
    ] = "bbox_to_caption,caption_to_bbox",
    images: _Images = None,
    regions: Annotated[int | None, typer.Option(help="Of an image that each task asks about; left out, all.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="text, region, box or mixed; left out, the training's, or text.")
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="relative, thousandths or pixels; left out, the training's, or relative.")
    ] = None,
    ambiguous: Annotated[
        bool, typer.Option("--ambiguous", help="Ask Caption2Bbox for captions of several boxes too, as RefCOCO does.")
    ] = False,
    wrong_image: Annotated[
        bool, typer.Option("--wrong-image", help="Show another image in place of each: what is known without looking.")
    ] = False,
    image_folder: Annotated[
        Path | None, typer.Option(help="That paths in questions start from; left out, the folder of the file.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions that are answered together.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 64,
    tiles: Annotated[
        int | None,
        typer.Option(help="Most tiles beside a large image; left out, the training's, or 0."),
    ] = None,
    max_broken: Annotated[
        float | None, typer.Option(help="Share of images that may be unreadable; left out, the training's, or 0.01.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: _Device = None,
    overwrite: _Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation.json in place of tables.")] = False,
) -> None:
    """Ask a model about held-out images, keep every answer, and say what they are worth; stopped, it goes on."""
    import json

    from rich.console import Console

    from granvit.data.progress import progress_bar
    from granvit.eval.opening import find_model, of_recipe, open_sources
    from granvit.eval.questions import Asking, SettingsError
    from granvit.eval.runner import Settings
    from granvit.eval.runner import evaluate as run
    from granvit.recipe import MAX_BROKEN

    found = find_model(model)
    stage = found.stage
    asking = Asking(
        tuple(task.strip() for task in tasks.split(",")),
        regions,
        prompt or (stage.prompt if stage else "text"),
        style or (stage.style if stage else "relative"),
        ambiguous,
        seed,
    )
    trained = found.recipe.data if found.recipe else None
    if tiles is None:
        tiles = trained.tiles if trained else 0
    if max_broken is None:
        max_broken = trained.max_broken if trained else MAX_BROKEN
    settings = Settings(asking, images, wrong_image, batch_size, max_new_tokens, tiles, seed, dtype, _device(device))
    if data:
        sources = open_sources(data, images=image_folder, seed=seed, size=_frame(found.folder))
    elif found.recipe is not None:
        sources = of_recipe(found.recipe)
    else:
        raise SettingsError(f"data: {model} says nothing of a run; expected --data")
    with progress_bar() as bar:
        task = bar.add_task("images", total=None)
        report = run(
            found.folder,
            sources,
            settings,
            out,
            overwrite=overwrite,
            max_broken=max_broken,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            note=lambda text: bar.console.print(text, highlight=False, markup=False, soft_wrap=True),
        )
    if as_json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
        return
    console = Console(width=None)
    for name in report["metrics"]:
        console.print(table(name, report["metrics"][name]))
    if report["counts"]["not read"]:
        console.print(f"not read: {report['counts']['not read']} images")
    for reason, count in report["counts"]["not asked"].items():
        console.print(f"not asked: {count} x {reason}")
    console.print(f"wrote {out}/evaluation.json", highlight=False, soft_wrap=True)


def _device(device: str | None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _frame(model: Path) -> int:
    """Side of a model's frame in pixels."""
    import json

    from granvit.model.checkpoint import SETTINGS

    return int(json.loads((model / SETTINGS).read_text(encoding="utf-8"))["image_size"])


def table(task: str, metrics: dict[str, Any]) -> Table:
    """The means of a task and of each group, for a console."""
    from rich.table import Table

    from granvit.eval.scores import HEADINGS

    names = [name for name in HEADINGS if name in metrics["all"]]
    made = Table(task, "answers", title_justify="left")
    made.columns[1].justify = "right"
    for name in names:
        made.add_column(HEADINGS[name], justify="right")
    rows = [("all", metrics["all"])]
    for dimension, groups in metrics["by"].items():
        if len(groups) > 1:
            rows += [(f"{dimension}: {group}", means) for group, means in groups.items()]
    for label, means in rows:
        cells = (f"{means[name]:.3f}" if name in means else "" for name in names)
        made.add_row(label, str(means["count"]), *cells)
    return made


@app.command("probe")
def probe(
    towers: Annotated[
        list[str],
        typer.Argument(
            help="Folders of models or runs, recipes (.yaml: the tower before it trains), or towers of transformers "
            "(folders or hub names)."
        ),
    ],
    train: Annotated[
        list[str] | None,
        typer.Option(help="Shards, a recipe's training data (.yaml), or scenes:KIND:COUNT; may be repeated."),
    ] = None,
    heldout: Annotated[list[str] | None, typer.Option(help="Likewise, held out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for probes.json.")] = Path("out/probes"),
    train_images: Annotated[int, typer.Option(help="Of each training source.")] = 400,
    images: Annotated[int, typer.Option(help="Of each held-out source.")] = 200,
    size: Annotated[int | None, typer.Option(help="Side of the frame in pixels; left out, each tower's own.")] = None,
    scene_size: Annotated[int, typer.Option(help="Side of scenes in pixels.")] = 256,
    max_broken: Annotated[
        float | None, typer.Option(help="Share of images that may be unreadable; left out, 0.01.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    device: _Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print probes.json in place of a table.")] = False,
) -> None:
    """Probe vision towers without a language model: do their features tell regions apart, and whole images?"""
    import json
    from functools import partial

    from rich.console import Console

    from granvit.data.progress import progress_bar
    from granvit.eval.comparison import ProbeSettings, compare
    from granvit.eval.comparison import table as probes_table
    from granvit.eval.opening import open_sources, open_tower
    from granvit.recipe import MAX_BROKEN

    settings = ProbeSettings(train_images, images, seed, _device(device))
    train_sources, heldout_sources = (
        open_sources(texts or ["scenes:natural:100000"], seed=seed, size=scene_size, split=split, unique=False)
        for split, texts in (("train", train), ("heldout", heldout))
    )
    with progress_bar() as bar:
        task = bar.add_task("images", total=None)
        report = compare(
            [partial(open_tower, text, size) for text in towers],
            train_sources,
            heldout_sources,
            settings,
            out,
            max_broken=MAX_BROKEN if max_broken is None else max_broken,
            progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
            note=lambda text: bar.console.print(text, highlight=False, markup=False, soft_wrap=True),
        )
    if as_json:
        print(json.dumps(report, indent=1))
        return
    Console(width=None).print(probes_table(report))
    if report["towers"][0]["not read"]:
        print(f"not read: {report['towers'][0]['not read']} images")
    print(f"wrote {out}/probes.json")
