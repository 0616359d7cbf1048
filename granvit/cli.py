"""The ``granvit`` command. A subcommand imports what it needs when it runs, so ``granvit info`` works everywhere."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from granvit.annotate.cli import app as annotation
from granvit.data.cli import app as data
from granvit.errors import UserError
from granvit.eval.cli import app as evaluation
from granvit.eval.view import app as view

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Region ops for Vision Transformers.")
data.add_typer(annotation)
app.add_typer(data, name="data")
app.add_typer(evaluation)
app.add_typer(view)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print plain data for a bug report.")] = False) -> None:
    """Print what was built, for which targets, and what each op can run here and why not."""
    from granvit import info as information

    collected = information.collect()
    print(json.dumps(collected, indent=2) if as_json else information.render(collected))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the report.")] = Path("out/demo"),
) -> None:
    """Run one self-distillation step and region pooling on real photographs, with stock PyTorch and with granvit."""
    from granvit import demo as package

    package.run(out)


@app.command()
def quickstart(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the miniature recipe, such as stages.stage1.steps=10.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Delete what the output folder holds, and begin anew.")] = False,
) -> None:
    """Train the whole recipe in miniature on scenes composed here, and draw what it learned."""
    from granvit import quickstart as miniature

    raise typer.Exit(miniature.run(overrides or (), overwrite=overwrite))


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="cpu, gpu, sweep, data, train_step, or smoke (seconds).")] = "cpu",
    select: Annotated[
        str | None, typer.Option("-k", "--select", help="pytest -k expression over case names; --list shows them.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; left out, the suite's.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for JSON, log and plots.")] = Path("out/bench"),
    list_only: Annotated[bool, typer.Option("--list", help="Print the cases and run none.")] = False,
    plots: Annotated[bool, typer.Option(help="Draw the plots.")] = True,
) -> None:
    """Time the ops beside what people use today, check every result, print ratios and floors, draw plots."""
    from granvit import bench as benchmarks

    code = benchmarks.run(
        suite, select=select, dtypes=dtype or (), device=device, output=output, list_only=list_only, plots=plots
    )
    raise typer.Exit(code)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; recipes/ has some.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value with a dotted key, such as stages.stage1.steps=10.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the run would cost; nothing is loaded.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete what the output folder holds, and begin anew.")] = False,
    device: Annotated[str, typer.Option(help="For the plan: cpu, a100, h100 or h200.")] = "cpu",
    ranks: Annotated[int, typer.Option(min=1, help="For the plan: processes.")] = 1,
) -> None:
    """Run the stages of a recipe; the same command goes on where it stopped. torchrun starts several processes."""
    from granvit.recipe import load

    loaded = load(recipe, overrides or ())
    if plan:
        from granvit.train import plan as planning
        from granvit.train.devices import device as device_of

        print(planning.render(planning.plan(loaded, device_of(device), ranks)))
        return
    from torch import distributed

    from granvit.train.run import run

    status = run(loaded, overwrite=overwrite)
    if distributed.is_available() and distributed.is_initialized():
        # Left to Python's end, the threads of a group can abort a process whose run went well; they end with the last
        # who holds the group, which may be a cycle. After an error the group stays: the other ranks still wait in it,
        # for torchrun to end them.
        gc.collect()
        distributed.destroy_process_group()
    raise typer.Exit(status)


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A model (out/RUN/STAGE/model), or a run (out/RUN): its last finished stage.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="llava: a folder for plain transformers and vLLM. vision: the tower alone. "
            "region-head: region or box prompt with the projector, read by granvit.export.load_region_head."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; left out, named after --to, beside the model.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; left out, the run's, or float32 for a model without a run.")
    ] = None,
    timm: Annotated[bool, typer.Option("--timm", help="With --to vision: also one for timm, in OUTPUT/timm.")] = False,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Identifier of the Hugging Face hub for the card, such as mit."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare with the model, in plain libraries; exit 1 if they differ."),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
) -> None:
    """Write a trained model so that it is used without granvit, with a model card."""
    from granvit.export.run import export as run

    run(
        checkpoint,
        to,
        output=output,
        dtype=dtype,
        timm=timm,
        licence=licence,
        verify=verify,
        overwrite=overwrite,
    )


@app.callback()
def _configure() -> None:
    """Region ops for Vision Transformers."""


def main() -> None:
    """Entry point: an error that a user can mend is one line on stderr, not a traceback."""
    if not sys.stderr.isatty():  # where nobody watches them, the bars of transformers are litter
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except UserError as error:
        print(f"granvit: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
