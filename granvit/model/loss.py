"""Cross entropy of supervised tokens without the logits of all of them at once."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# The gradient of per-token losses has been right since then.
_LIGER = "0.8.5"
# Logits are made a few tokens at a time: 256 MiB of them in float32.
_CHUNK_ELEMENTS = 1 << 26

log = logging.getLogger(__name__)


def token_losses(head: nn.Module, hidden: Tensor, labels: Tensor, *, fused: bool | None = None) -> Tensor:
    """Cross entropy of each token, through the output layer of a language model.

    Args:
        head: the output layer, ``(N, D)`` to ``(N, vocabulary)``.
        hidden: ``(N, D)``.
        labels: ``(N,)`` int64.
        fused: whether liger-kernel's fused linear cross entropy does it; None is where it can run: on a GPU, with
            liger-kernel 0.8.5 or newer, for a plain linear layer, and not in float64. Otherwise logits are made for a
            few tokens at a time, in the model's dtype, and made again for the gradient. Which one runs is logged.

    Returns:
        ``(N,)`` float32; float64 for hidden states in float64.

    Raises:
        ValueError: `fused` is demanded where it cannot run.
    """
    reason = "fused_loss=False" if fused is False else _why_not_fused(head, hidden)
    if fused and reason is not None:
        raise ValueError(f"GranViT: fused_loss: expected what liger-kernel can run, but {reason}")
    _announce(reason)
    if reason is None and len(hidden):  # liger-kernel divides by the number of tokens
        return _fused(head, hidden, labels)
    out_features = getattr(head, "out_features", None)
    chunk = max(1, _CHUNK_ELEMENTS // out_features) if out_features else 512
    parts = list(zip(hidden.split(chunk), labels.split(chunk), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([_cross_entropy(head, h, t) for h, t in parts])
    return torch.cat([checkpoint(_cross_entropy, head, h, t, use_reentrant=False) for h, t in parts])


def _cross_entropy(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def _fused(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    losses: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="none")(head.weight, hidden, labels, head.bias)
    return losses


def _why_not_fused(head: nn.Module, hidden: Tensor) -> str | None:
    """What keeps the fused loss from running; None where it can run."""
    if not hidden.is_cuda:
        return "the model is not on a GPU"
    if hidden.dtype == torch.float64:
        return "the model is in float64"
    if type(head) is not nn.Linear:
        return f"the output layer is no plain linear layer but {type(head).__name__}"
    return _why_no_liger()


@functools.cache
def _why_no_liger() -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    version = importlib.metadata.version("liger-kernel")
    return None if Version(version) >= Version(_LIGER) else f"liger-kernel is {version}, older than {_LIGER}"


@functools.cache
def _announce(reason: str | None) -> None:
    """Says once what computes the loss, and why."""
    chosen = "liger-kernel, fused" if reason is None else f"torch, a few tokens at a time ({reason})"
    log.info("cross entropy: %s", chosen)
