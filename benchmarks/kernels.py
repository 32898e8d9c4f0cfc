"""Time the codec against a memcpy of the same tensor, and against what other libraries do to a gradient.

    python benchmarks/kernels.py --mebibytes 100 --rounds 15
    python benchmarks/kernels.py --only-picture     # draws the committed CSV again, measures nothing

All subjects take turns in every round, and a time is divided by the memcpy's of its own round, so that a machine whose
speed drifts favours nobody. Libraries that are not installed are left out. On a GPU the floor is a copy from device to
device.
"""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from torch_qgc.kernels import Encoded, decode_sum, encode, payload_bytes, reference, report

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
FLOOR = "memcpy"
KEY = (1, 2)


@dataclass(frozen=True)
class Subject:
    """One thing to time: `per` is how many payloads one call handles, `wire` its bits per coordinate sent."""

    name: str
    run: Callable[[], Any]
    wire: float
    per: int = 1


def copies(values: torch.Tensor) -> list[Subject]:
    same, half = torch.empty_like(values), torch.empty_like(values, dtype=torch.bfloat16)
    return [
        Subject(FLOOR, lambda: same.copy_(values), 32),
        Subject("encode: torch .to(bfloat16), rounds to nearest", lambda: half.copy_(values), 16),
        Subject("decode: torch bfloat16, accumulate", lambda: same.add_(half), 16),
    ]


def codec(values: torch.Tensor) -> list[Subject]:
    """The public face, at 2, 3, 4 and 8 bits."""
    out = torch.zeros_like(values)
    subjects = []
    for bits in (2, 3, 4, 8):
        wire = 8 * payload_bytes(values.numel(), bits) / values.numel()
        payload = encode(values, bits, key=KEY)
        runs = {
            f"encode: torch_qgc {bits} bits": lambda b=bits: encode(values, b, key=KEY),
            f"encode: torch_qgc {bits} bits, L2 scale": lambda b=bits: encode(values, b, key=KEY, norm="l2"),
            f"decode: torch_qgc {bits} bits, accumulate": lambda p=payload: decode_sum([p], [0.5], out),
        }
        subjects += [Subject(name, run, wire) for name, run in runs.items()]
    eight, halves = [encode(values, 4, key=(1, k)) for k in range(8)], [0.5] * 8
    wire = 8 * payload_bytes(values.numel(), 4) / values.numel()
    for end, accumulate in (("accumulate", True), ("overwrite", False)):  # an aggregator overwrites
        name = f"decode: torch_qgc 4 bits, 8 payloads, per payload, {end}"
        fused = functools.partial(decode_sum, eight, halves, out, accumulate=accumulate)
        subjects.append(Subject(name, fused, wire, per=8))
    return subjects


def plain(values: torch.Tensor) -> list[Subject]:
    """The reference: what runs where nothing was compiled."""
    payload = encode(values, 4, key=KEY)
    room = Encoded(torch.empty_like(payload.buffer), values.numel(), 4, payload.statistics)
    out = torch.zeros_like(values)
    wire = 8 * payload_bytes(values.numel(), 4) / values.numel()
    return [
        Subject("encode: torch_qgc 4 bits, plain torch", lambda: reference.encode(values, KEY, False, 0, room), wire),
        Subject(
            "decode: torch_qgc 4 bits, plain torch",
            lambda: reference.decode_sum([payload], [0.5], out, True),
            wire,
        ),
    ]


def torch_quantize(values: torch.Tensor) -> list[Subject]:
    scale = float(values.abs().max()) / 127
    quantized = torch.quantize_per_tensor(values, scale, 0, torch.qint8)
    return [
        Subject(
            "encode: torch.quantize_per_tensor, scale given, rounds to nearest",
            lambda: torch.quantize_per_tensor(values, scale, 0, torch.qint8),
            8,
        ),
        Subject("decode: torch dequantize", lambda: quantized.dequantize(), 8),
    ]


def bitsandbytes(values: torch.Tensor) -> list[Subject]:
    import bitsandbytes.functional as bnb

    eight, four = bnb.quantize_blockwise(values), bnb.quantize_4bit(values, quant_type="nf4")
    return [
        Subject("encode: bitsandbytes 8 bits", lambda: bnb.quantize_blockwise(values), 8.06),
        Subject("decode: bitsandbytes 8 bits", lambda: bnb.dequantize_blockwise(*eight), 8.06),
        Subject("encode: bitsandbytes nf4", lambda: bnb.quantize_4bit(values, quant_type="nf4"), 4.5),
        Subject("decode: bitsandbytes nf4", lambda: bnb.dequantize_4bit(*four), 4.5),
    ]


def torchao(values: torch.Tensor) -> list[Subject]:
    from torchao.quantization import quant_primitives as ao

    rows, block = values.view(-1, 512), (1, 512)

    def quantize() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale, zero = ao.choose_qparams_affine(rows, ao.MappingType.SYMMETRIC, block, torch.int8, -127, 127)
        return ao.quantize_affine(rows, block, scale, zero, torch.int8, -127, 127), scale, zero

    q, scale, zero = quantize()
    return [
        Subject("encode: torchao int8 per block of 512", quantize, 8.06),
        Subject(
            "decode: torchao int8 per block of 512",
            lambda: ao.dequantize_affine(q, block, scale, zero, torch.int8, -127, 127),
            8.06,
        ),
    ]


def hivemind(values: torch.Tensor) -> list[Subject]:
    """Its quantizers without the serialization around them (whose reading breaks with NumPy 2.4)."""
    from hivemind.compression import Quantile8BitQuantization, Uniform8BitQuantization

    return [
        Subject(f"encode: hivemind {type(method).__name__}", lambda m=method: m.quantize(values), 8)
        for method in (Uniform8BitQuantization(), Quantile8BitQuantization())
    ]


def gather(values: torch.Tensor, console: Console) -> list[Subject]:
    subjects = copies(values) + codec(values) + plain(values)
    for peer in (torch_quantize, bitsandbytes, torchao, hivemind):
        try:
            found = peer(values)
        except (ImportError, NotImplementedError, AttributeError) as error:
            console.print(f"left out {peer.__name__}: {type(error).__name__}: {error}")
            continue
        if peer is not torch_quantize:
            version = importlib.metadata.version(peer.__name__)
            found = [Subject(f"{s.name} ({peer.__name__} {version})", s.run, s.wire, s.per) for s in found]
        subjects += found
    return subjects


def seconds(subject: Subject, device: torch.device) -> float:
    """Time one call. One CPU thread is timed by its own clock, which stops while others have the core."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    subject.run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / subject.per


def measure(subjects: list[Subject], rounds: int, device: torch.device) -> dict[str, list[tuple[float, float]]]:
    """Return (seconds, ratio to the floor of the same round) of each subject, one per round, after one to warm up.

    The floor is timed before and after every subject: its own ratio shows the noise of the measurement.
    """
    floor, times = subjects[0], {s.name: list[tuple[float, float]]() for s in subjects}
    for turn in range(rounds + 1):
        for subject in subjects:
            before, t, after = (seconds(s, device) for s in (floor, subject, floor))
            if turn:
                times[subject.name].append((t, 2 * t / (before + after)))
    return times


def quartiles(ratios: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def plot(results: Path, picture: Path) -> None:
    """Draw the medians and quartiles of a CSV that this script wrote."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with results.open(newline="") as file:
        table = list(csv.DictReader(file))
    ratios: dict[str, list[float]] = {}
    for row in table:
        ratios.setdefault(row["subject"], []).append(float(row["ratio_to_memcpy"]))
    rows = [(subject, *quartiles(measured)) for subject, measured in ratios.items()]
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for axis, kind in zip(axes, ("encode: ", "decode: ")):
        part = sorted((r for r in rows if r[0].startswith(kind)), key=lambda r: -r[2])
        names = [name.removeprefix(kind) for name, *_ in part]
        middles = [m for _, _, m, _ in part]
        spread = [[m - low for _, low, m, _ in part], [high - m for _, _, m, high in part]]
        colours = ["#1b6ca8" if "torch_qgc" in name else "#b0b7bf" for name in names]
        axis.barh(names, middles, xerr=spread, color=colours, error_kw={"lw": 1})
        axis.axvline(1, color="#444444", lw=1, ls="--")
        axis.set_xscale("log")
        axis.set_title(kind.strip(": "))
        axis.tick_params(axis="y", labelsize=8)
    figure.supxlabel("time divided by that of a memcpy of the tensor: median and quartiles", fontsize=10)
    figure.suptitle(table[0]["hardware"], fontsize=10)
    figure.savefig(picture, dpi=110)


def main(
    mebibytes: Annotated[int, typer.Option(help="size of the fp32 tensor")] = 100,
    rounds: Annotated[int, typer.Option(help="measured turns of every subject; at least 2")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    save: Annotated[bool, typer.Option(help="write CSV to benchmarks/results and the plot to docs/pictures")] = True,
    name: Annotated[str, typer.Option(help="of those files")] = "kernels",
    only_picture: Annotated[bool, typer.Option("--only-picture", help="draw the plot from the CSV and stop")] = False,
) -> None:
    """Time the codec against memcpy and other libraries."""
    stem = name if device == "cpu" else f"{name}_{device}"
    results, picture = RESULTS / f"{stem}.csv", PICTURES / f"benchmark_{stem}.png"
    if only_picture:
        plot(results, picture)
        return
    torch.set_num_threads(threads)
    console, place = Console(), torch.device(device)
    generator = torch.Generator().manual_seed(0)
    values = (1e-3 * torch.randn(mebibytes * 2**18, generator=generator)).to(place)
    subjects = gather(values, console)
    times = measure(subjects, rounds, place)

    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {report()['cpu']}"
    hardware = f"{machine}, torch {torch.__version__}, {threads} thread(s), {mebibytes} MiB fp32"
    command = "python benchmarks/kernels.py " + " ".join(sys.argv[1:])
    table = Table(title=f"time relative to {FLOOR}\n{hardware}")
    for column in ("subject", "bits sent", "median", "quartiles", "ms"):
        table.add_column(column, justify="left" if column == "subject" else "right")
    for subject in subjects:
        low, middle, high = quartiles([ratio for _, ratio in times[subject.name]])
        milliseconds = 1e3 * statistics.median(t for t, _ in times[subject.name])
        table.add_row(
            subject.name, f"{subject.wire:.2f}", f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{milliseconds:.1f}"
        )
    console.print(table)
    if not save:
        return
    RESULTS.mkdir(exist_ok=True)
    with results.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["subject", "bits_sent", "round", "seconds", "ratio_to_memcpy", "hardware", "command"])
        for subject in subjects:
            for turn, (t, ratio) in enumerate(times[subject.name]):
                row = [subject.name, f"{subject.wire:.4f}", turn, f"{t:.6f}", f"{ratio:.4f}", hardware, command]
                writer.writerow(row)
    plot(results, picture)


if __name__ == "__main__":
    typer.run(main)
