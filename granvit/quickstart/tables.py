"""What the quickstart prints at its end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

REGION_PARTS = {
    "region_distill": ("distillation, loss + gradient", "torchvision roi_align + MSE"),
    "region_attention": ("pooling, result + gradients", "masked SDPA"),
}


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
    for heading in ("error of stock", "error of granvit", "allowed"):
        table.add_column(heading, justify="right")
    step = report["step"]
    rows = [
        (f"step: loss {step['loss']['stock']:.6f}, granvit {step['loss']['granvit']:.6f}", step["loss_difference"]),
        (f"step: gradients of the ViT's {step['parameters']} parameters, the worst", step["worst_gradient_difference"]),
    ]
    for what, difference in rows:
        table.add_row(what, "float32", "taken as exact", f"{difference:.1e}", f"{step['limit']:.1e}")
    for row in report["region_part"]:
        errors = [f"{row['error'][way]:.1e}" for way in ("stock", "granvit")]
        table.add_row(REGION_PARTS[row["op"]][0], row["dtype"], *errors, f"{row['limit']:.1e}")
    table.caption = "Relative to the size of the result. Region parts: against stock operations in float64."
    table.caption_justify = "left"
    return table


def _region_part(report: dict[str, Any]) -> Table:
    table = Table(title="The region part alone: median time, peak extra memory of the process", title_justify="left")
    for heading in ("what", "stock form", "dtype"):
        table.add_column(heading)
    for heading in ("stock ms", "granvit ms", "faster", "stock MiB", "granvit MiB", "smaller"):
        table.add_column(heading, justify="right")
    for row in report["region_part"]:
        if "seconds" in row:
            milliseconds = {way: seconds * 1000 for way, seconds in row["seconds"].items()}
            table.add_row(
                *REGION_PARTS[row["op"]],
                row["dtype"],
                *_pair(milliseconds, "{:.2f}", least=0.0),
                *_pair(row["mib"], "{:.1f}", least=1.0),
            )
    return table


def _whole_step(report: dict[str, Any]) -> Table:
    step = report["step"]
    table = Table(title="The whole step in float32: seconds", title_justify="left")
    table.add_column("what")
    for heading in ("stock", "granvit", "faster"):
        table.add_column(heading, justify="right")
    teacher = step["teacher_seconds"]
    table.add_row(f"teacher on {report['regions']} crops (run once, the same for both)", *[f"{teacher:.2f}"] * 2, "")
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
