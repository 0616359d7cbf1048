"""What the package claims of its speed, and whether a run of the benchmarks bears it out."""

from __future__ import annotations

from granvit._bench_rows import OURS, Row, best_stock, groups, speedup

Verdict = tuple[str, bool | None]  # None where the data cannot tell

# On a CPU: (op, times as fast as torchvision, times as fast as the best stock form).
CPU = (("region_distill", 30.0, 5.0), ("region_attention", None, 5.0), ("box_embedding", None, 5.0))

# On an H100 in bfloat16, milliseconds of a replayed CUDA graph: (op, workload) -> (forward, with the backward).
H100: dict[tuple[str, str], tuple[float | None, float]] = {
    ("region_distill", "paper"): (None, 0.20),
    ("region_distill", "page"): (None, 0.16),
    ("region_attention", "paper.q1"): (0.045, 0.12),
    ("region_attention", "paper.q16"): (0.05, 0.14),
    ("region_attention", "page.q1"): (0.06, 0.20),
    ("region_attention", "page.q4"): (0.07, 0.22),
    ("box_embedding", "R96"): (0.03, 0.20),
    ("box_embedding", "R4096"): (0.08, 0.35),
    ("box_embedding", "R65536"): (0.9, 2.4),
}
H100_PEAK_MIB = {("region_distill", "paper"): 80}
ROI_ALIGN_OVER_TORCHVISION = 10.0
TRITON_OVER_CUDA = 1.6


def on_cpu(cases: list[Row]) -> list[Verdict]:
    """A line on each CPU target of the cases that were run, and whether it held."""
    lines = []
    for op, over_torchvision, over_stock in CPU:
        for key, group in groups(row for row in cases if row.op == op and row.sweep() is None).items():
            if OURS not in group or (op == "region_distill" and key[3] != "full"):
                continue
            torchvision = group.get("torchvision") or group.get("torchvision_float32")
            wanted = [("the best stock form", best_stock(group), over_stock)]
            if over_torchvision is not None:
                wanted.insert(0, ("torchvision", torchvision, over_torchvision))
            for what, peer, factor in wanted:
                lines.append(_verdict(" ".join(key), what, peer, factor, speedup(group, peer)))
    return lines


def _verdict(case: str, what: str, peer: Row | None, factor: float, ratio: float | None) -> Verdict:
    if peer is None:
        return f"{case} against {what}: no such peer ran with the right results", None
    name = what if peer.provider == what else f"{what} ({peer.provider})"
    if ratio is None:
        return f"{case} against {name}: no green match, hence no speed-up", None
    return f"{case}: {ratio:.1f}x {name}, target {factor:g}x", ratio >= factor


def on_gpu(cases: list[Row]) -> list[Verdict]:
    """A line on each GPU target of the cases that were run, and whether it held."""
    lines: list[Verdict] = []
    for key, group in groups(row for row in cases if row.sweep() is None).items():
        op, workload, dtype, mode = key
        ours, name = group.get(OURS), " ".join(key)
        if ours is not None and dtype == "bfloat16":
            target = H100.get((op, workload), (None, None))[mode == "full"]
            if target is not None:
                lines.append(_in_time(name, ours, target))
            most = H100_PEAK_MIB.get((op, workload))
            if most is not None and mode == "full" and ours.facts["peak_bytes"] is not None:
                peak = ours.facts["peak_bytes"] / 2**20
                lines.append((f"{name}: {peak:.0f} MiB beyond the inputs, target {most}", peak <= most))
            lines.append(_not_slower(name, ours, best_stock(group)))
        if op == "roi_align" and workload == "paper" and mode == "full":
            torchvision = group.get("torchvision") or group.get("torchvision_float32")
            ratio = speedup(group, torchvision)
            lines.append(_verdict(name, "torchvision", torchvision, ROI_ALIGN_OVER_TORCHVISION, ratio))
        lines.extend(_twins(name, group))
    return lines


def _in_time(case: str, ours: Row, target: float) -> Verdict:
    if ours.replay is None or not ours.match:
        return f"{case}: no replay with a green match, target {target:g} ms", None
    return f"{case}: {1e3 * ours.replay:.3g} ms in a graph, target on an H100 {target:g}", 1e3 * ours.replay <= target


def _not_slower(case: str, ours: Row, peer: Row | None) -> Verdict:
    if peer is None or not ours.match:
        return f"{case}: a plain call no slower than the best stock form: no green match on both sides", None
    text = f"{case}: a plain call takes {1e3 * ours.median:.3g} ms, {peer.provider} {1e3 * peer.median:.3g}"
    return text, ours.median <= peer.median


def _twins(case: str, group: dict[str, Row]) -> list[Verdict]:
    """Triton beside CUDA, of which the faster one should be chosen."""
    triton, cuda = group.get(f"{OURS}_triton"), group.get(f"{OURS}_cuda")
    if triton is None or cuda is None or triton.replay is None or cuda.replay is None:
        return []
    ratio = triton.replay / cuda.replay
    return [(f"{case}: triton takes {ratio:.2f}x of cuda, target {TRITON_OVER_CUDA:g}x", ratio <= TRITON_OVER_CUDA)]
