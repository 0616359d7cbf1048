"""Boxes as tokens: Fourier features and two linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from granvit import reference
from granvit.ops import _checks, _dispatch

_OP = "box_embedding"


def box_embedding(
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    out: Tensor | None = None,
    index: Tensor | None = None,
    inplace: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Embeds each box as one token: Fourier features (Tancik et al. 2020), linear, GELU (erf), linear.

    ``u = 2 pi boxes @ frequencies``, ``features = [sin u, cos u]``, ``token = w2 gelu(w1 features + b1) + b2``.
    Axis-aligned frequencies give NeRF's positional encoding (Mildenhall et al. 2020); a block-diagonal random matrix
    and boxes ``2 b - 1`` give the corner encoding of Segment Anything (Kirillov et al. 2023).

    Args:
        boxes: ``(R, 4)`` float32, any finite values; relative coordinates, as they are or shifted and scaled.
            float64 is let through for gradient checks.
        frequencies: ``(4, M)``, cycles per unit of each coordinate; any float dtype.
        w1: ``(D1, 2 M)`` float32, bfloat16, float16 or float64. Trigonometry is done in float32 or wider whatever this
            dtype is, and so are all sums.
        b1: ``(D1,)`` in the dtype of `w1`.
        w2: ``(D, D1)`` in the dtype of `w1`.
        b2: ``(D,)`` in the dtype of `w1`.
        out: a token sequence ``(T, D)`` in the dtype of `w1` that takes the tokens, with `index`.
        index: ``(R,)`` integer, the row of `out` for each box; no row twice.
        inplace: write into `out` itself and return it. Only under ``torch.no_grad()`` or inference mode; the last
            dimension of `out` must be contiguous.
        impl: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None picks the best that can run.

    Returns:
        ``(R, D)`` in the dtype of `w1`; with `out` the sequence ``(T, D)``, a new one unless `inplace`. Differentiable
        in all arguments but `index`; the gradient of a row of `out` that was written over is zero.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or value; the text names it.
        RuntimeError: the implementation asked for cannot run here, or `inplace` while gradients are recorded.
    """
    _check_layers(boxes, frequencies, w1, b1, w2, b2)
    index = _check_target(boxes, w2, out, index, inplace)
    chosen = _dispatch.choose(_OP, impl, boxes.device.type, w1.dtype)
    if _dispatch.must_check(chosen, boxes.device):
        _check_values(boxes, out, index)
    if chosen == "reference":
        return _run_reference(boxes, frequencies, w1, b1, w2, b2, out, index, inplace)
    ops = _dispatch.ops(chosen)
    if inplace:
        assert out is not None
        _dispatch.call(ops.box_embedding_, out, index, boxes, frequencies, w1, b1, w2, b2)
        if not torch.compiler.is_compiling() and not out.is_inference():
            torch.autograd.graph.increment_version(out)  # a backward that saved the sequence must notice
        return out
    save = _dispatch.needs_grad(boxes, frequencies, w1, b1, w2, b2)
    tokens, _ = _dispatch.call(ops.box_embedding, boxes, frequencies, w1, b1, w2, b2, out, index, save)
    return tokens


def _check_layers(boxes: Tensor, frequencies: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    if not isinstance(boxes, Tensor) or boxes.dtype not in (torch.float32, torch.float64):
        raise _checks.wrong_type(_OP, "boxes", "a float32 tensor", boxes)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise _checks.wrong_value(_OP, "boxes", "shape (R, 4)", boxes)
    _checks.floating(_OP, "frequencies", frequencies)
    if frequencies.dim() != 2 or frequencies.shape[0] != 4:
        raise _checks.wrong_value(_OP, "frequencies", "shape (4, M)", frequencies)
    features = 2 * frequencies.shape[1]
    _checks.floating(_OP, "w1", w1)
    if w1.dim() != 2 or w1.shape[1] != features:
        raise _checks.wrong_value(_OP, "w1", f"shape (D1, {features}), two features a frequency", w1)
    _same_dtype("b1", b1, w1)
    if b1.dim() != 1 or b1.shape[0] != w1.shape[0]:
        raise _checks.wrong_value(_OP, "b1", f"shape ({w1.shape[0]},) to match w1", b1)
    _same_dtype("w2", w2, w1)
    if w2.dim() != 2 or w2.shape[1] != w1.shape[0]:
        raise _checks.wrong_value(_OP, "w2", f"shape (D, {w1.shape[0]}) to match w1", w2)
    _same_dtype("b2", b2, w1)
    if b2.dim() != 1 or b2.shape[0] != w2.shape[0]:
        raise _checks.wrong_value(_OP, "b2", f"shape ({w2.shape[0]},) to match w2", b2)
    for name, t in (("frequencies", frequencies), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        _checks.on_device(_OP, name, t, boxes.device)


def _same_dtype(name: str, t: object, w1: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype != w1.dtype:
        raise _checks.wrong_type(_OP, name, f"a tensor of {str(w1.dtype).removeprefix('torch.')} like w1", t)


def _check_target(boxes: Tensor, w2: Tensor, out: Tensor | None, index: Tensor | None, inplace: bool) -> Tensor | None:
    """Checks where the tokens go; returns `index` as int64."""
    if out is None:
        if index is not None:
            raise _checks.wrong_value(_OP, "index", "None without out", index)
        if inplace:
            raise _checks.wrong_value(_OP, "inplace", "False without out", inplace)
        return None
    _same_dtype("out", out, w2)
    if out.dim() != 2 or out.shape[1] != w2.shape[0]:
        raise _checks.wrong_value(_OP, "out", f"shape (T, {w2.shape[0]}) to match w2", out)
    _checks.on_device(_OP, "out", out, boxes.device)
    if not isinstance(index, Tensor) or not _checks.is_integer(index):
        raise _checks.wrong_type(_OP, "index", "an integer tensor with out", index)
    if index.dim() != 1 or index.shape[0] != boxes.shape[0]:
        raise _checks.wrong_value(_OP, "index", f"shape ({boxes.shape[0]},) to match boxes", index)
    _checks.on_device(_OP, "index", index, boxes.device)
    if inplace:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{_OP}: inplace: expected gradients to be off (torch.no_grad() or inference mode), got grad mode on; "
                "leave inplace False to differentiate"
            )
        if out.shape[1] > 1 and out.stride(1) != 1:
            raise _checks.wrong_value(_OP, "out", "a contiguous last dimension to write in place", out.stride())
        if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
            raise _checks.wrong_value(_OP, "out", "rows that do not overlap to write in place", out.stride())
    return index.long()


def _check_values(boxes: Tensor, out: Tensor | None, index: Tensor | None) -> None:
    """Checks what boxes and index hold, as :func:`granvit.ops._checks.values` does."""
    finite = boxes.isfinite().all(1)
    if torch.compiler.is_compiling():
        torch._assert_async(finite.all(), f"{_OP}: boxes: expected finite values")
        if out is not None and index is not None:
            inside = ((index >= 0) & (index < out.shape[0])).all()
            torch._assert_async(inside, f"{_OP}: index: expected values in [0, rows of out)")
            # Counted, not sorted: neighbours of a sorted index would bind a graph to three boxes or more.
            clamped = index.clamp(0, out.shape[0] - 1)
            times = index.new_zeros(out.shape[0]).scatter_add(0, clamped, torch.ones_like(index))
            torch._assert_async((times <= 1).all(), f"{_OP}: index: expected no row twice")
        return
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{_OP}: boxes: expected finite values, got {boxes[row].tolist()} in row {row}")
    if out is None or index is None:
        return
    inside = (index >= 0) & (index < out.shape[0])
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise ValueError(f"{_OP}: index: expected values in [0, {out.shape[0]}), got {int(index[row])} in row {row}")
    rows, times = index.unique(return_counts=True)
    if not bool((times == 1).all()):
        raise ValueError(f"{_OP}: index: expected no row twice, got {int(rows[times > 1][0])} more than once")


def _run_reference(
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    out: Tensor | None,
    index: Tensor | None,
    inplace: bool,
) -> Tensor:
    # The reference chooses its own dtypes; autocast would lower them.
    with torch.autocast(boxes.device.type, enabled=False):
        if not inplace:
            return reference.box_embedding(boxes, frequencies, w1, b1, w2, b2, out=out, index=index)
        assert out is not None
        assert index is not None
        return out.index_copy_(0, index, reference.box_embedding(boxes, frequencies, w1, b1, w2, b2))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    boxes, frequencies, w1, b1, w2, b2, _, index, _ = inputs
    hidden = output[1]
    ctx.save_for_backward(boxes, frequencies, w1, b1, w2, b2, hidden, index)
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)


def _backward(ops: Any, ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    _dispatch.refuse_double_backward(_OP)
    if grad is None:
        return (None,) * 9
    boxes, frequencies, w1, b1, w2, b2, hidden, index = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 6
    if any(needs[:6]):
        computed = ops.box_embedding_backward(grad, boxes, frequencies, w1, b1, w2, b2, hidden, index, *needs[:6])
        grads = [g if needed else None for g, needed in zip(computed, needs, strict=False)]
    grad_out = _without_rows(grad, index) if needs[6] else None
    return (*grads, grad_out, None, None)


def _without_rows(grad: Tensor, index: Tensor) -> Tensor:
    """grad with zeros in the rows `index`. On a device nobody has checked it: what is outside of grad is left out."""
    rows = grad.shape[0]
    inside = (index >= 0) & (index < rows)
    # One row more than there are takes what is outside.
    written = index.new_zeros(rows + 1, dtype=torch.bool).index_fill_(0, torch.where(inside, index, rows), True)
    return grad.masked_fill(written[:rows, None], 0)


def _fake(
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    out: Tensor | None,
    index: Tensor | None,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    rows = boxes.shape[0] if out is None else out.shape[0]
    saved = boxes.shape[0] if save_hidden else 0
    # On a GPU the saved layer is worth its bytes; stock PyTorch rounds it to the weights' dtype as well.
    kept = w1.dtype if boxes.device.type == "cuda" else torch.promote_types(w1.dtype, torch.float32)
    return w1.new_empty((rows, w2.shape[0])), w1.new_empty((saved, w1.shape[0]), dtype=kept)


def _fake_triton(*args: Any) -> tuple[Tensor, Tensor]:
    # The same where Triton's interpreter runs it on the CPU.
    tokens, hidden = _fake(*args)
    return tokens, hidden.to(tokens.dtype)


def _fake_inplace(
    out: Tensor,
    index: Tensor,
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> None:
    return None


def _fake_backward(
    grad: Tensor,
    boxes: Tensor,
    frequencies: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    hidden: Tensor,
    index: Tensor | None,
    for_boxes: bool,
    for_frequencies: bool,
    for_w1: bool,
    for_b1: bool,
    for_w2: bool,
    for_b2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor, needed: bool) -> Tensor:
        return t.new_empty(t.shape if needed else 0)

    return (
        like(boxes, for_boxes),
        like(frequencies, for_frequencies),
        like(w1, for_w1),
        like(b1, for_b1),
        like(w2, for_w2),
        like(b2, for_b2),
    )


_dispatch.declare(_OP)
_dispatch.register(_OP, "box_embedding", _fake, setup=_setup_forward, backward=_backward, triton_fake=_fake_triton)
_dispatch.register(_OP, "box_embedding_", _fake_inplace, mutates=("out",))
_dispatch.register(_OP, "box_embedding_backward", _fake_backward)
