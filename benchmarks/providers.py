"""One way to compute an op: ours, or a stock form of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from granvit.ops import _dispatch


@dataclass(frozen=True)
class Setting:
    """What decides whether a provider can run."""

    device: torch.device
    dtype: torch.dtype
    mode: str


def _always(setting: Setting) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """A function with the signature and the results of the op.

    Attributes:
        name: as it appears in tables and test ids.
        function: called with the op's arguments.
        stock: a peer, made of stock PyTorch or another library; else ours.
        compiled: run `function` through torch.compile.
        same_result: False for a form that users run in place of the op though it computes something else.
        sweep: affordable at every size of the sweeps.
        unavailable: why it cannot run in a setting, or None. What only a call can tell need not be foreseen here.
        impl: for ours, the implementation that it demands; None takes the best.
    """

    name: str
    function: Callable[..., Tensor]
    stock: bool = True
    compiled: bool = False
    same_result: bool = True
    sweep: bool = False
    unavailable: Callable[[Setting], str | None] = _always
    impl: str | None = None

    def build(self) -> Callable[..., Tensor]:
        """The function to time."""
        return torch.compile(self.function) if self.compiled else self.function


def compiled(provider: Provider) -> Provider:
    """The same provider through torch.compile; not in sweeps, where every size would be compiled anew."""
    return dataclasses.replace(provider, name=f"{provider.name}_compiled", compiled=True, sweep=False)


def ours(op: str, function: Callable[..., Tensor]) -> tuple[Provider, ...]:
    """The op as a user calls it; on a GPU each of its implementations as well, to choose between them by figures."""

    def demanded(impl: str) -> Provider:
        def unavailable(setting: Setting) -> str | None:
            return _dispatch.unavailable(op, impl, setting.device.type)

        call = functools.partial(function, impl=impl)
        return Provider(f"granvit_{impl}", call, stock=False, impl=impl, unavailable=unavailable)

    return (Provider("granvit", function, stock=False), demanded("cuda"), demanded("triton"))
