"""Calls every op on tiny tensors of every dtype, forward and backward, with boxes that lead everywhere.

``python -m tests.gpu.small_calls IMPL``; test_sanitizer.py runs it under a tool that watches memory.
"""

from __future__ import annotations

import sys

import torch

from tests.ops.calls import Call, make, on_kernels

WILD = torch.tensor([[-9.0, -9.0, 9.0, 9.0], [torch.nan] * 4, [0.9, 0.9, 0.1, 0.1], [1.0, 1.0, 1.0, 1.0]])


def let_loose(call: Call) -> None:
    """Boxes and indices of the first regions lead out of the image and out of all images."""
    for t in call.arguments:
        if t.shape[1:] == (4,):
            t.detach()[: len(WILD)] = WILD.to(t)
        elif t.dtype == torch.long and t.dim() == 1:
            t[:2] = torch.tensor([-(2**40), 2**40], device=t.device)


def main(device: str, impl: str) -> None:
    for name in dict.fromkeys(name for name, _, kernel in on_kernels(device) if kernel == impl):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            call = make(name, dtype=dtype).on(device, impl)
            call.run()
            let_loose(call)
            call.run()
            print(name, dtype)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main("cuda", sys.argv[1])
