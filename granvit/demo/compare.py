"""Stock PyTorch against granvit on the same inputs: do the numbers agree, and what does each way cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from granvit.demo import measure, picture, stock
from granvit.demo.photographs import Regions
from granvit.ops import _dispatch, region_attention, region_distill_loss

if TYPE_CHECKING:
    from granvit.adapters.timm import RegionEncoder

DTYPES = (torch.float32, torch.bfloat16)
# The largest relative difference that float32 rounding explains, once it has gone backward through a ViT.
STEP_LIMIT = 1e-5


def implementation(op: str) -> str:
    """Which implementation of an op runs here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the demo says in its own words that an op runs on the reference
        return _dispatch.choose(op, None, "cpu", torch.float32)


def steps(
    student: RegionEncoder,
    pixels: Tensor,
    target: Tensor,
    regions: Regions,
    grid: tuple[int, int],
    repeats: int,
) -> tuple[dict[str, Any], Tensor]:
    """The student's half of the self-distillation step both ways.

    Args:
        student: the encoder that learns.
        pixels: whole photographs ``(B, 3, S, S)``.
        target: the teacher's tokens of the crops, ``(R, H*W, C)``.
        regions: boxes and their photographs.
        grid: ``(H, W)``.
        repeats: runs behind every median.

    Returns:
        Losses, differences and median seconds; and the student's tokens ``(B, H*W, C)``.

    Raises:
        AgreementError: loss or a parameter's gradient differ by more than rounding.
    """

    def stock_loss() -> Tensor:
        tokens, _ = student.tokens(pixels)
        return stock.distill_loss(tokens, target, regions.boxes, regions.image_index, grid)

    def granvit_loss() -> Tensor:
        return student.distill_loss(pixels, regions.boxes, regions.image_index, target, grid)

    losses_of = {"stock": stock_loss, "granvit": granvit_loss}
    losses: dict[str, Tensor] = {}
    gradients: dict[str, dict[str, Tensor]] = {}

    def step(way: str) -> None:
        student.zero_grad(set_to_none=True)
        loss = losses_of[way]()
        loss.backward()
        losses[way] = loss.detach()
        gradients[way] = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    # A step takes seconds, so three have to do.
    seconds = measure.median_times({way: partial(step, way) for way in losses_of}, min(repeats, 3))
    ours, theirs = gradients["granvit"], gradients["stock"]
    if ours.keys() != theirs.keys():
        raise measure.AgreementError("demo: granvit and stock PyTorch reach different parameters of the ViT")
    # Each parameter against the size of its own gradient, so that a small one cannot hide behind a large one.
    differences = {name: measure.relative_difference(ours[name], theirs[name]) for name in theirs}
    worst = max(differences, key=lambda name: differences[name])
    result: dict[str, Any] = {
        "loss": {way: float(loss) for way, loss in losses.items()},
        "loss_difference": measure.relative_difference(losses["granvit"], losses["stock"]),
        "parameters": len(theirs),
        "worst_parameter": worst,
        "worst_gradient_difference": differences[worst],
        "limit": STEP_LIMIT,
    }
    measure.check_agreement("distillation loss", result["loss_difference"], STEP_LIMIT)
    measure.check_agreement(f"gradient of the ViT's {worst}", differences[worst], STEP_LIMIT)
    if implementation("region_distill") != "reference":
        result["seconds"] = seconds
    with torch.no_grad():
        return result, student.tokens(pixels)[0]


def distillation(
    tokens: Tensor, target: Tensor, regions: Regions, grid: tuple[int, int], repeats: int
) -> list[dict[str, Any]]:
    """Distillation loss and its gradient in the student's tokens, apart from the ViT, in each dtype."""
    where = (regions.boxes, regions.image_index, grid)

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        return stock.distill_loss(student, teacher, *where)

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return region_distill_loss(student, teacher, *where, grid)

    return _rows("region_distill", theirs, ours, [tokens], [target], torch.ones(()), repeats)


@dataclass(frozen=True)
class PoolingInputs:
    """What the region pooling reads: query ``(R, 1, heads, dim)``, key and value ``(B, H*W, heads, dim)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    @classmethod
    def from_tokens(cls, tokens: Tensor, regions: Regions, grid: tuple[int, int], heads: int) -> PoolingInputs:
        """A query for each box that asks which of its tokens look like the one at its centre.

        A trained attention pool has learnt its query. This ViT is random, so the query is the key of the box's centre
        cell; keys are the tokens less their image's mean, of unit length, which makes each score a cosine.
        """
        height, width = grid
        value = tokens.unflatten(-1, (heads, -1))
        key = nn.functional.normalize(value - value.mean(1, keepdim=True), dim=-1)
        centre = (regions.boxes[:, :2] + regions.boxes[:, 2:]) / 2
        cell = (centre[:, 1] * height).long() * width + (centre[:, 0] * width).long()
        return cls(key[regions.image_index, cell][:, None], key, value, scale=4.0)

    def weights(self, regions: Regions, grid: tuple[int, int]) -> Tensor:
        """Attention of each region over its image, ``(R, H, W)``, averaged over heads."""
        return torch.stack(
            [
                picture.attention_weights(query, self.key[image], box, grid, self.scale).mean((0, 1))
                for query, box, image in zip(self.query, regions.boxes, regions.image_index.tolist(), strict=True)
            ]
        )


def pooling(inputs: PoolingInputs, regions: Regions, grid: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Pooled tokens and the gradients in query, key and value, in each dtype."""

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return stock.attention_pool(query, key, value, regions.boxes, grid, inputs.scale)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return region_attention(query, key, value, regions.boxes, regions.image_index, grid, scale=inputs.scale)

    # Any fixed gradient from above will do.
    upstream = torch.randn(inputs.query.shape, generator=torch.Generator().manual_seed(0))
    qkv = [inputs.query, inputs.key, inputs.value]
    return _rows("region_attention", theirs, ours, qkv, [], upstream, repeats)


def _rows(
    op: str,
    stock_form: Callable[..., Tensor],
    fused: Callable[..., Tensor],
    differentiable: list[Tensor],
    constant: list[Tensor],
    upstream: Tensor,
    repeats: int,
) -> list[dict[str, Any]]:
    """For each dtype the errors of result and gradients; where a kernel runs, times and memory too.

    Errors are against the stock form in float64 on the same inputs. Ours may be twice that of the stock form in the
    same dtype, and one unit of rounding.
    """

    def prepare(form: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        leaves = [t.detach().to(dtype) for t in inputs]
        wanted = [t.requires_grad_() for t in leaves[: len(differentiable)]]

        def forward_and_backward() -> list[Tensor]:
            result = form(*leaves)
            return [result.detach(), *torch.autograd.grad(result, wanted, upstream.to(result.dtype))]

        return forward_and_backward

    rows = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        inputs = [t.to(dtype) for t in differentiable + constant]
        exact = prepare(stock_form, inputs, torch.float64)()
        ways = {"stock": prepare(stock_form, inputs, dtype), "granvit": prepare(fused, inputs, dtype)}
        errors = {way: _largest_difference(compute(), exact) for way, compute in ways.items()}
        limit = 2 * errors["stock"] + torch.finfo(dtype).eps
        measure.check_agreement(f"{op} in {name}", errors["granvit"], limit)
        row: dict[str, Any] = {"op": op, "dtype": name, "error": errors, "limit": limit}
        if implementation(op) != "reference":
            row["seconds"] = measure.median_times(ways, repeats)
            row["mib"] = {way: measure.peak_memory(compute) for way, compute in ways.items()}
        rows.append(row)
    return rows


def _largest_difference(tensors: list[Tensor], exact: list[Tensor]) -> float:
    return max(measure.relative_difference(a, b) for a, b in zip(tensors, exact, strict=True))
