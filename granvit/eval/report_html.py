"""Pieces of a report: tables, pictures and boxes on them, in HTML that needs no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from torch import Tensor

from granvit.data.sources import Shown
from granvit.eval.cases import outcome
from granvit.eval.metrics import Box
from granvit.eval.scores import Answer, score
from granvit.geometry import BoxTransform

SIDE = 320  # of the pictures of cases, at most


def section(name: str, title: str, *parts: str, about: str = "") -> str:
    """A section with a heading; "" where it has no parts."""
    body = "".join(parts)
    if not body:
        return ""
    said = f'<p class="about">{escape(about)}</p>' if about else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{said}{body}</section>'


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column heads its rows; cells are HTML, the caption and the columns are text."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    # Focusable, so that the keyboard can scroll what is too wide for a narrow screen.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def explained(name: str, meaning: str) -> str:
    """A name with its meaning in small letters below."""
    return f"{escape(name)}<small>{escape(meaning)}</small>"


def number(value: float | None, interval: tuple[float, float] | None = None) -> str:
    """A value of a metric, with its interval below."""
    if value is None:
        return '<span class="none">&ndash;</span>'
    return f"{value:.3f}" + (f"<small>{interval[0]:.3f} to {interval[1]:.3f}</small>" if interval else "")


def shown_pixels(shown: Shown, side: int = SIDE) -> Tensor:
    """The image that a frame shows, without the frame around it, uint8 ``(3, h, w)``."""
    height, width = shown.transform.source
    zoom = side / max(height, width)
    size = (max(1, round(height * zoom)), max(1, round(width * zoom)))
    back = shown.transform.inverse()
    return back.then(BoxTransform.resize(back.target, size)).pixels(shown.pixels)


def jpeg(pixels: Tensor) -> str:
    """A uint8 image ``(3, H, W)`` as a data URL."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())).save(
        file, "JPEG", quality=82
    )
    return data_url(file.getvalue(), "image/jpeg")


def smaller(png: bytes) -> str:
    """A drawing as a data URL, in a tenth of the bytes."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(file, "WEBP", quality=88, method=6)
    return data_url(file.getvalue(), "image/webp")


def data_url(data: bytes, kind: str) -> str:
    """Bytes as a URL that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def case(answer: Answer, shown: Shown | None) -> str:
    """One answer: the image with the true box (dashed) and the one that was found (solid), and what was said."""
    what, worth = outcome(answer), score(answer)
    right = what == "right"
    if answer.task == "caption_to_bbox":
        asked, said = answer.question.rpartition(":")[2].strip() or answer.question, answer.answer or "(nothing)"
        lines = [f"<b>asked for</b> {escape(asked)}", f"<b>said</b> {escape(said)}", f"IoU {worth['mean_iou']:.2f}"]
    else:
        lines = [
            f"<b>is</b> {escape(' / '.join(answer.references))}",
            f"<b>said</b> {escape(answer.answer or '(nothing)')}",
        ]
    if what:
        mark = "right" if right else f"wrong: {what}"
        lines.append(f'<span class="{"good" if right else "bad"}">{escape(mark)}</span>')
    else:  # a long text is more or less right
        lines.append(f"ROUGE-L {worth['rouge_l']:.2f}")
    picture = '<p class="gone">the image is not there any more</p>'
    if shown is not None:
        pixels = shown_pixels(shown)
        boxes = _rect(answer.box, "true") + _rect(answer.found, "good" if right else "bad")
        alt = (
            f"{answer.key}: the region is {' / '.join(answer.references)}; the answer was {answer.answer or 'nothing'}"
        )
        picture = (
            f'<div class="boxed"><img src="{jpeg(pixels)}" width="{pixels.shape[2]}" height="{pixels.shape[1]}" '
            f'alt="{escape(alt)}">'
            f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">{boxes}</svg></div>'
        )
    return f'<figure class="case">{picture}<figcaption>{"<br>".join(lines)}</figcaption></figure>'


def _rect(box: Box | None, kind: str) -> str:
    if box is None:
        return ""
    place = f'x="{box[0]:.4f}" y="{box[1]:.4f}" width="{box[2] - box[0]:.4f}" height="{box[3] - box[1]:.4f}"'
    return f'<rect class="under" {place}/><rect class="{kind}" {place}/>'
