# SPDX-License-Identifier: Apache-2.0
"""Text of a compilation's numbers, for a terminal."""

from __future__ import annotations

from typing import Any


def as_text(result: dict[str, Any]) -> str:
    """Content of compile.json as text."""
    lines = [
        f"{result['program']} step for {result['topology']} ({result['device_kind']}), mesh "
        f"{' x '.join(f'{k} {v}' for k, v in result['mesh'].items())}, "
        f"{result['images_per_chip']:g} images a chip",
        *([f"  an estimate: {result['estimated_by']}"] if result.get("estimate") else []),
        *_memory(result),
        *_speed(result),
        *_collectives(result),
        *_buffers(result.get("largest_buffers", [])),
    ]
    if advice := result.get("advice"):
        lines += ["  what would help:", *(f"    {line}" for line in advice)]
    return "\n".join(lines) + "\n"


def size(count: float, unit: str = "B") -> str:
    """A number with three digits and a decimal prefix: `2.65 GB`, `171 MB`."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(count) < 1000 or prefix == "T":
            break
        count /= 1000

    # Three digits in all; bytes below 1000 are whole.
    digits = 0 if prefix == "" else max(0, 2 - len(str(int(abs(count)))) + 1)
    return f"{count:.{digits}f} {prefix}{unit}"


def _memory(result: dict[str, Any]) -> list[str]:
    """Lines on the memory of one device, and whether the program fits."""
    limit, peak = result["hbm_limit_bytes"], result["hbm_peak_bytes"]
    verdict = "fits" if result["fits"] else f"does NOT fit: {size(peak - limit)} too many"
    return [
        f"  memory a chip    {size(peak):>9} of {size(limit)}: {verdict}",
        f"    arguments      {size(result['hbm_args_bytes']):>9}",
        f"    temporaries    {size(result['hbm_temp_bytes']):>9}",
        *_other_memory(result),
    ]


def _other_memory(result: dict[str, Any]) -> list[str]:
    """Line on results that are not written over arguments, the program's code, and what waits."""
    names = ("hbm_result_bytes", "hbm_code_bytes", "hbm_waiting_bytes")
    others = sum(result.get(name, 0.0) for name in names)
    return [f"    and results, code, waiting {size(others)}"] if others else []


def _speed(result: dict[str, Any]) -> list[str]:
    """Lines on FLOPs, traffic and the roofline, as far as they are known."""
    # A program over the memory has no FLOPs; an evaluation has no model FLOPs.
    lines = []
    if "flops" in result:
        lines += [
            f"  FLOPs a chip     {size(result['flops'], 'F'):>9}",
            f"  bytes touched    {size(result['bytes_accessed']):>9} (XLA's count)",
            f"    main memory    {size(result['memory_bytes']):>9} read and written there",
        ]
    if model := result.get("model_flops"):
        extra = f", {result['flops'] / model - 1:+.0%} computed" if "flops" in result else ""
        lines.append(f"  model FLOPs      {size(model, 'F'):>9}{extra}")

    if seconds := result.get("roofline_seconds"):
        parts = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in seconds.items())
        mfu = f", MFU {result['mfu_bound']:.0%}" if "mfu_bound" in result else ""
        rate = result["roofline_images_per_second_per_chip"]
        lines.append(f"  roofline         {parts}: at most {rate:.3g} images/s a chip{mfu}")

    # Untuned compilation is faster; the code of some convolutions would be slower in a run.
    how = "" if result["tuned"] else ", without a search for fast convolutions (compile.tuned)"
    return [*lines, f"  compiled in      {result['compile_seconds']:7.1f} s{how}"]


def _collectives(result: dict[str, Any]) -> list[str]:
    """Lines on the collectives by kind."""
    rows = [
        f"    {kind:<18} {c['count']:6d} {size(c['bytes']):>9}, {size(c['overlapped_bytes'])} of it "
        "while the chip computes"
        for kind, c in result.get("collectives", {}).items()
    ]

    # Time in which nothing else runs, by the compiler's schedule.
    if waits := result.get("exposed_collective_seconds"):
        rows.append(f"    it waits for the rest, {waits * 1e3:.3g} ms at least: not in the roofline")
    return ["  collectives, bytes that a chip receives:", *rows] if rows else []


def _buffers(buffers: list[dict[str, Any]]) -> list[str]:
    """Lines on the largest buffers; long names keep their end, which names the layer's operation."""
    rows = []
    for b in buffers:
        name = b["op_name"] if len(b["op_name"]) <= 70 else "…" + b["op_name"][-69:]
        stored = f"{size(b['bytes']):>9} x {b['count']:<3d} {b['shape']:<26}"
        rows.append(f"    {stored} {b['opcode']} {name}")
    return ["  largest buffers:", *rows] if rows else []
