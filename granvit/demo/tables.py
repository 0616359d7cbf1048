"""What the demo prints at its end."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def show(console: Console, report: dict[str, Any]) -> None:
    """Prints the report."""
    console.print(_set_up(report))
    console.print(_agreement(report))
    unfused = [op for op, implementation in report["implementation"].items() if implementation == "reference"]
    if unfused:
        console.print(
            f"[yellow]No compiled kernel of {' and '.join(unfused)} runs here: plain PyTorch, the reference, stood in. "
            "So no speed is claimed for it. `granvit info` says why."
        )
    if any("seconds" in row for row in report["region_part"]):
        console.print(_region_part(report))
    if "seconds" in report["step"]:
        console.print(_whole_step(report))
    console.print(f"Picture: [bold]{report['picture']}[/]\nNumbers: [bold]{report['numbers']}[/]", soft_wrap=True)
    console.print(
        "Next: [bold]granvit.adapters.timm.RegionEncoder(your_vit)[/] does this with a ViT of yours; "
        "[bold]granvit info[/] shows which kernels run here; [bold]granvit bench[/] holds them against the best stock "
        "forms."
    )


def _set_up(report: dict[str, Any]) -> str:
    model = report["model"]
    height, width = model["grid"]
    names = report["photographs"]
    return (
        f"{model['name']} at {model['image_size']} px, {height}x{width} tokens an image, random weights (seed "
        f"{model['seed']}; nothing is downloaded). {len(names)} photographs ({', '.join(names)}), {report['regions']} "
        f"boxes. {report['device']}, torch {report['torch']}."
    )


def _table(title: str, columns: list[str], caption: str = "") -> Table:
    style: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "box": box.SIMPLE_HEAD}
    table = Table(title=title, caption=caption, pad_edge=False, collapse_padding=True, **style)
    for column, heading in enumerate(columns):
        table.add_column(heading, justify="right" if column else "left", no_wrap=True)
    return table


def _agreement(report: dict[str, Any]) -> Table:
    table = _table(
        "Granvit computes what stock PyTorch computes",
        ["error relative to the result", "stock", "granvit", "allowed"],
        "The step is held against the stock step, the ops alone against stock operations in float64.",
    )
    step = report["step"]
    for what, difference in (
        (f"step fp32, loss {step['loss']['granvit']:.6f}", step["loss_difference"]),
        (f"step fp32, worst of {step['parameters']} gradients of the ViT", step["worst_gradient_difference"]),
    ):
        table.add_row(what, "-", f"{difference:.0e}", f"{step['limit']:.0e}")
    for row in report["region_part"]:
        errors = (row["error"]["stock"], row["error"]["granvit"], row["limit"])
        table.add_row(_op(row), *[f"{error:.0e}" for error in errors])
    return table


def _region_part(report: dict[str, Any]) -> Table:
    table = _table(
        "The ops alone, forward and backward",
        ["", "stock ms", "granvit", "faster", "stock MiB", "granvit", "less"],
        "Median time; peak growth of the process.\nStock: torchvision's roi_align + MSE; SDPA with a mask.",
    )
    for row in report["region_part"]:
        if "seconds" in row:
            milliseconds = {way: seconds * 1000 for way, seconds in row["seconds"].items()}
            times = _pair(milliseconds, "{:.1f}", least=0.0)
            table.add_row(_op(row), *times, *_pair(row["mib"], "{:.1f}", least=1.0))
    return table


def _whole_step(report: dict[str, Any]) -> Table:
    step = report["step"]
    table = _table("The whole step in fp32", ["seconds", "stock", "granvit", "faster"])
    teacher = step["teacher_seconds"]
    table.add_row(f"teacher on {report['regions']} crops, the same for both", *[f"{teacher:.2f}"] * 2, "")
    table.add_row("student, loss, gradients of the ViT", *_pair(step["seconds"], "{:.2f}", least=0.0, digits=2))
    whole = {way: teacher + seconds for way, seconds in step["seconds"].items()}
    table.add_row("together", *_pair(whole, "{:.2f}", least=0.0, digits=2))
    return table


def _op(row: dict[str, Any]) -> str:
    return f"{row['op']} {DTYPES[row['dtype']]}"


def _pair(values: dict[str, float | None], form: str, *, least: float, digits: int = 1) -> tuple[str, str, str]:
    """Both values and their ratio; no ratio where either is below what the measurement resolves."""
    stock, ours = values["stock"], values["granvit"]
    if stock is None or ours is None:
        return "-", "-", "-"
    ratio = f"{stock / ours:.{digits}f}x" if min(stock, ours) > least else "-"
    return form.format(stock), form.format(ours), ratio
