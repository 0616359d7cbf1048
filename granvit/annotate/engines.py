"""Where batches run: in this process, in processes of this machine, or on a Ray cluster. The results are the same."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

from granvit.annotate import stages
from granvit.annotate.inputs import ImageFile
from granvit.annotate.interfaces import AnnotationError
from granvit.annotate.journal import Entry
from granvit.errors import MissingDependencyError, UserError

Batch = tuple[int, Sequence[ImageFile]]  # its number, and its images
_plan: stages.Plan  # of a worker process


def run_local(plan: stages.Plan, batches: Iterable[Batch], workers: int) -> Iterator[tuple[int, list[Entry]]]:
    """Batches as they are finished, at most two a worker on their way.

    Args:
        plan: what is done.
        batches: what it is done to.
        workers: processes; 0 for this one.

    Raises:
        AnnotationError: a worker died.
    """
    if workers == 0:
        for number, files in batches:
            yield number, stages.annotate_batch(plan, files)
        return
    # Started anew and not forked: the libraries of models have threads, which a fork does not survive.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (plan,))
    running: dict[Future[list[Entry]], Batch] = {}
    try:
        for batch in batches:
            running[pool.submit(_work, batch[1])] = batch
            if len(running) == 2 * workers:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool:
        names = ", ".join(file.name for _, files in running.values() for file in files)
        raise AnnotationError(
            f"a worker process died, perhaps for want of memory; at work were {names}; "
            "what is finished is safe, and the same command goes on from there"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict[Future[list[Entry]], Batch]) -> Iterator[tuple[int, list[Entry]]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        entries = future.result()
        yield running.pop(future)[0], entries


def _start_worker(plan: stages.Plan) -> None:
    global _plan
    _plan = plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for([parent.sentinel])
        os._exit(1)  # a killed parent cannot end its workers, and the queue they wait for would never end

    threading.Thread(target=follow, daemon=True).start()


def _work(files: Sequence[ImageFile]) -> list[Entry]:
    return stages.annotate_batch(_plan, files)


def run_ray(
    plan: stages.Plan, batches: Iterable[Batch], workers: int, gpus: float = 0.0, address: str | None = None
) -> Iterator[tuple[int, list[Entry]]]:
    """Batches as they are finished, with Ray Data: reading in tasks, finding and captioning each in `workers` actors.

    Args:
        plan: what is done; the images must lie where every machine of the cluster finds them.
        batches: what it is done to.
        workers: actors of each step that runs a model.
        gpus: of each such actor; without any it takes one CPU.
        address: of a running cluster; None for one that this program has joined, or else a new local one.

    Raises:
        MissingDependencyError: Ray is not installed.
        AnnotationError: the cluster has too few CPUs or GPUs for that many actors.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingDependencyError("engine ray needs ray[data]: pip install 'granvit[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
        ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield from _ray_results(plan, batches, workers, gpus)
    finally:
        if ours:
            ray.shutdown()


def _ray_results(
    plan: stages.Plan, batches: Iterable[Batch], workers: int, gpus: float
) -> Iterator[tuple[int, list[Entry]]]:
    import ray

    rows = [{"number": number, "items": pickle.dumps(files)} for number, files in batches]
    if not rows:
        return
    models = [stages.find] if plan.captioner is None else [stages.find, stages.caption]
    needed = {"CPU": 1.0 + (0 if gpus else workers * len(models)), "GPU": gpus * workers * len(models)}
    for name, amount in needed.items():
        there = ray.cluster_resources().get(name, 0.0)
        if there < amount:
            raise AnnotationError(f"engine ray: {workers} workers need {amount:g} {name}, the cluster has {there:g}")
    # A block is what Ray hands on at once: small ones, so that little is lost with a machine.
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 10_000))
    dataset = dataset.map(_RayStage(plan, [stages.read], first=True), num_cpus=1)
    resources: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus} if gpus else {"num_cpus": 1}
    for number, stage in enumerate(models):
        last = number == len(models) - 1
        # Without a captioner the step of captions only asks its filters, and needs no actor of its own.
        steps = [stage, stages.caption] if last and stage is stages.find else [stage]
        dataset = dataset.map(
            _RayActor,
            fn_constructor_args=(_RayStage(plan, steps, last=last),),
            compute=ray.data.ActorPoolStrategy(size=workers),
            **resources,
        )
    for row in dataset.iter_rows():
        yield int(row["number"]), _unpacked(row)


class _RayStage:
    """Steps over one row: a batch, with its items pickled, so that its images stay together."""

    def __init__(self, plan: stages.Plan, steps: list[Any], first: bool = False, last: bool = False) -> None:
        self.plan, self.steps, self.first, self.last = plan, steps, first, last

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"number": row["number"], "items": pickle.dumps(self._done(_unpacked(row)))}
        except UserError as error:  # travels as a result: Ray would wrap it and keep only its text
            return {"number": row["number"], "items": pickle.dumps(error)}

    def _done(self, items: list[Any]) -> list[Any]:
        if self.first:
            items = [stages.Item(file) for file in items]
        for step in self.steps:
            items = step(self.plan, items)
        return [stages.entry_of(self.plan, item) for item in items] if self.last else items


def _unpacked(row: dict[str, Any]) -> list[Any]:
    """The items of a row.

    Raises:
        UserError: the one that an earlier step met.
    """
    items = pickle.loads(row["items"])
    if isinstance(items, UserError):
        raise items
    return list(items)


class _RayActor:
    """A step in a process of its own, where its model stays loaded."""

    def __init__(self, stage: _RayStage) -> None:
        self.stage = stage

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self.stage(row)
