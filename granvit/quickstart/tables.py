"""What the quickstart prints at its end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(console: Console, report: dict[str, Any]) -> None:
    """Prints the report."""
    console.print(_set_up(report))
    console.print(_agreement(report))
    unfused = [op for op, impl in report["implementation"].items() if impl == "reference"]
    if unfused:
        console.print(
            f"[yellow]{' and '.join(unfused)} ran as plain PyTorch, the reference: no compiled kernel runs here, so no "
            "speed is claimed. `granvit info` says why."
        )
    if any("seconds" in row for row in report["region_part"]):
        console.print(_region_part(report))
    if "seconds" in report["step"]:
        console.print(_whole_step(report))
    console.print(f"Picture: [bold]{report['picture']}[/]   every number: [bold]{report['numbers']}[/]")
    console.print(
        "Next: put region_distill_loss or region_attention of granvit.ops behind your own ViT; `granvit info` shows which "
        "kernels run here, `granvit bench` measures them against the best stock forms."
    )


def _set_up(report: dict[str, Any]) -> str:
    model = report["model"]
    height, width = model["grid"]
    return (
        f"{model['name']} at {model['image_size']} px, {height}x{width} tokens an image, {model['weights']}: nothing is "
        f"downloaded. {len(report['photographs'])} photographs ({', '.join(report['photographs'])}), {report['regions']} "
        f"regions. {report['device']}, torch {report['torch']}."
    )


def _agreement(report: dict[str, Any]) -> Table:
    table = Table(title="Granvit computes what stock PyTorch computes", title_justify="left")
    table.add_column("what")
    table.add_column("dtype")
    for heading in ("stock error", "granvit error", "allowed"):
        table.add_column(heading, justify="right")
    step = report["step"]
    for what, difference in (
        (f"loss of the step, {step['loss']['granvit']:.6f}", step["loss_difference"]),
        (f"gradients of the ViT, worst of {step['parameters']}", step["worst_gradient_difference"]),
    ):
        table.add_row(what, "float32", "the measure", f"{difference:.0e}", f"{step['limit']:.0e}")
    for row in report["region_part"]:
        errors = (row["error"]["stock"], row["error"]["granvit"], row["limit"])
        table.add_row(f"{row['op']} alone", row["dtype"], *[f"{error:.0e}" for error in errors])
    table.caption = "Relative to the size of the result. The ops alone: against stock operations in float64."
    table.caption_justify = "left"
    return table


def _region_part(report: dict[str, Any]) -> Table:
    table = Table(title="The region part alone, forward and backward", title_justify="left")
    table.add_column("op")
    table.add_column("dtype")
    for heading in ("stock ms", "granvit", "faster", "stock MiB", "granvit", "smaller"):
        table.add_column(heading, justify="right")
    for row in report["region_part"]:
        if "seconds" in row:
            milliseconds = {way: seconds * 1000 for way, seconds in row["seconds"].items()}
            times = _pair(milliseconds, "{:.1f}", least=0.0)
            table.add_row(row["op"], row["dtype"], *times, *_pair(row["mib"], "{:.1f}", least=1.0))
    table.caption = "Median time; peak growth of the process. Stock: torchvision's roi_align + MSE; masked SDPA."
    table.caption_justify = "left"
    return table


def _whole_step(report: dict[str, Any]) -> Table:
    step = report["step"]
    table = Table(title="The whole step in float32: seconds", title_justify="left")
    table.add_column("what")
    for heading in ("stock", "granvit", "faster"):
        table.add_column(heading, justify="right")
    teacher = step["teacher_seconds"]
    table.add_row(f"teacher on {report['regions']} crops (same for both)", *[f"{teacher:.2f}"] * 2, "")
    table.add_row("student, loss, gradients of all parameters", *_pair(step["seconds"], "{:.2f}", least=0.0, digits=2))
    whole = {way: teacher + seconds for way, seconds in step["seconds"].items()}
    table.add_row("together", *_pair(whole, "{:.2f}", least=0.0, digits=2))
    return table


def _pair(values: dict[str, float | None], form: str, *, least: float, digits: int = 1) -> tuple[str, str, str]:
    """Both values and their ratio; no ratio where either is below what the measurement resolves."""
    stock, ours = values["stock"], values["granvit"]
    if stock is None or ours is None:
        return "-", "-", "-"
    ratio = f"{stock / ours:.{digits}f}x" if min(stock, ours) > least else "-"
    return form.format(stock), form.format(ours), ratio
