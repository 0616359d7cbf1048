"""Started by tests: forks a run of `annotate` for every line on stdin and names its pid, so that imports are paid once.

A line is JSON: images, out, log, and optionally a limit of the size of files in bytes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

from granvit.annotate import annotate
from granvit.data.shards import ShardWriter
from granvit.errors import UserError
from tests.annotate.support import SlowOCR

SETTINGS = {"kind": "ocr", "batch_size": 2, "shard_samples": 7}


def slow_add(self: ShardWriter, *sample: Any) -> None:
    time.sleep(0.004)
    original_add(self, *sample)


original_add = ShardWriter.add


def run(order: dict[str, Any]) -> None:
    if "limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    ShardWriter.add = slow_add  # so that kills come while shards are written too
    annotate([order["images"]], order["out"], ocr=SlowOCR(0.01, order["log"]), **SETTINGS)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                run(json.loads(line))
            except UserError as error:
                print(f"error {error}", flush=True)
                os._exit(1)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(2)
            os._exit(0)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)
