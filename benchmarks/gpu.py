"""How fast does a training step run on a GPU, and what does each economy cost and save there?"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accelerator import (
    Meter,
    fitting,
    matmul_flops,
    peak_flops,
    take_turns,
    utilisation,
)
from benchmarks.captions import describe, draw_tokens
from benchmarks.gpu_sides import COMPILED, PLAIN, Case, Own, Peer, Subject, TextSize
from benchmarks.harness import Ratio, Skipped
from benchmarks.record import Bar, Result
from unicl.loss import reference_loss, unicl_loss

_GIB = 1 << 30
# Compiling is the part whose time is hard to foresee; what comes too late is left out, and said.
_SECONDS = 450

CASES = (
    PLAIN,
    Case("checkpointing", checkpointing=True),
    Case("gradient cache, 4 chunks", chunks=4),
    Case("texts neither trimmed nor deduplicated", text_economies=False),
    Case("dense loss", dense_loss=True),
    COMPILED,
)
PEER_CASES = (PLAIN, COMPILED)


@dataclass(frozen=True)
class Plan:
    """Sizes of the whole measurement."""

    subjects: tuple[Subject, ...]
    rounds: int
    repeats: int
    """Timed steps in a row, each round."""
    matmul: int
    """Side of the product that the machine is measured by."""
    loss_batches: tuple[int, ...]
    compiler: str
    """Backend of torch.compile."""
    seconds: float = _SECONDS


_FULL = (
    Subject("CoSwin-T", "coswin_tiny", TextSize(512, 8, 2048), 384, 16, micro_batch_size=512),
    Subject(
        "CoSwin-B",
        "coswin_base",
        TextSize(768, 12, 3072),
        768,
        16,
        micro_batch_size=256,
        goal=50.0,
    ),
    Subject(
        "CoSwin-H",
        "coswin_huge",
        TextSize(1152, 18, 4864),
        1024,
        14,
        micro_batch_size=96,
        goal=50.0,
        embed_dim=1024,
    ),
)
_TINY = Subject(
    "CoSwin-nano",
    "coswin_nano",
    TextSize(64, 1, 128, num_layers=1),
    64,
    16,
    micro_batch_size=4,
    image_size=48,
    embed_dim=32,
)


def measure(*, quick: bool, device: torch.device | None = None) -> Iterator[Result]:
    """Steps of two towers in bf16, ours and open_clip's, on inputs that lie on the device.

    Yields all there is so far after each part, so that a cut leaves the parts before it.

    Raises:
        Skipped: There is no GPU; the smallest sizes run on a CPU, too.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        raise Skipped("there is no GPU here")
    return measure_plan(plan(quick, device), Meter(device))


def plan(quick: bool, device: torch.device) -> Plan:
    """Return the sizes; a CPU takes the smallest only, and no time to compile."""
    compiler = "eager" if device.type == "cpu" else "inductor"
    if quick:
        return Plan((_TINY,), 1, 1, 64, (64,), compiler)
    return Plan(_FULL, 5, 3, 8192, (8192, 32768), compiler)


def measure_plan(sizes: Plan, meter: Meter) -> Iterator[Result]:
    """Carry out a plan; see `measure`."""
    if meter.device.type == "cuda":
        # Cases of different sizes would leave the allocator with blocks that fit no other case.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    report = _Report(meter, sizes)
    report.losses = [row for batch in sizes.loss_batches for row in _loss_rows(meter, batch)]
    for subject in sizes.subjects:
        if report.late():
            _say(f"{subject.name} left out: {sizes.seconds:.0f} seconds have passed")
            continue
        try:
            yield from _measure_subject(subject, sizes, report)
        except torch.OutOfMemoryError:
            _say(f"{subject.name} left out: its weights and moments alone do not fit")
        # Code is compiled for one model's shapes; the next one would search through it.
        torch.compiler.reset()
        meter.release()
    yield report.result()


def _measure_subject(subject: Subject, sizes: Plan, report: "_Report") -> Iterator[Result]:
    meter = report.meter
    _say(f"{subject.name}: making it and its peer")
    own, own_bytes = _settled(meter, lambda: Own(subject, meter.device, sizes.compiler))
    peer, peer_bytes = _settled(
        meter, lambda: Peer(subject, own.ready_images(), own.image_flops, sizes.compiler)
    )
    report.towers.append({"model": subject.name, **own.describe(), **peer.describe()})
    # Compiled ones last: should compiling take all the time there is, the others are safe.
    for compiled in (False, True):
        tried = [
            *((own, case, peer_bytes) for case in CASES if case.compiled is compiled),
            *((peer, case, own_bytes) for case in PEER_CASES if case.compiled is compiled),
        ]
        found = [_try(side, case, others, report) for side, case, others in tried]
        runs = {index: each.run for index, each in enumerate(found) if each.run is not None}
        times = take_turns(meter, runs, rounds=sizes.rounds, repeats=sizes.repeats)
        for index, each in enumerate(found):
            each.seconds = times.get(index, [])
            each.run = None
            if index in runs and not each.seconds:
                each.note = "out of memory beside the other cases"
        report.add(subject, found)
        yield report.result()


def _settled(meter: Meter, make: Callable[[], Any]) -> tuple[Any, int]:
    """Make a side and let it take a small step; return it and the bytes that it holds on to."""
    before = meter.allocated()
    side = make()
    side.prepare(PLAIN, 2)()  # from its first step on, AdamW holds two moments
    meter.release()
    return side, meter.allocated() - before


@dataclass
class _Found:
    """What is known of a case."""

    side: str
    case: Case
    batch_size: int
    flops: float = 0.0
    peak_bytes: int = 0
    note: str = ""
    run: Callable[[], object] | None = None
    seconds: list[float] = field(default_factory=list)

    def flops_per_second(self) -> list[float]:
        """Return the model FLOP/s of each round."""
        return [3 * self.flops / seconds for seconds in self.seconds]


def _try(side: "Own | Peer", case: Case, others: int, report: "_Report") -> _Found:
    """Run a case twice, with the batch halved until it fits, and see what memory it takes.

    Args:
        side: Whose step it is.
        case: How it is run.
        others: Bytes that do not belong to this side.
        report: Knows how late it is, and the meter.
    """
    meter, wanted = report.meter, side.subject.micro_batch_size
    _say(f"{side.subject.name}, {side.name}, {case.name}")
    if report.late():
        return _Found(side.name, case, wanted, note="left out: no time left")

    def attempt(batch_size: int) -> tuple[Callable[[], object], int]:
        side.drop()
        run = side.prepare(case, batch_size)
        run()  # compiles
        return run, meter.peak(run)

    try:
        fit = fitting(meter, wanted, attempt)
    except RuntimeError as error:
        if not case.compiled:
            raise
        # Compilers need more of a machine than eager steps do, whose figures must not be lost.
        side.drop()
        return _Found(side.name, case, wanted, note=f"does not compile: {type(error).__name__}")
    if fit is None:
        return _Found(side.name, case, 1, note="out of memory")
    batch_size, (run, peak) = fit
    return _Found(
        side.name,
        case,
        batch_size,
        side.flops(case, batch_size),
        max(0, peak - others),
        "" if batch_size == wanted else f"out of memory at {wanted}",
        run,
    )


def _loss_rows(meter: Meter, batch_size: int) -> list[dict[str, object]]:
    """Forward and backward of the loss alone: at one GPU's batch its tiles hardly matter."""
    torch.manual_seed(0)
    shape = (2, batch_size, 512)
    unit = nn.functional.normalize(torch.randn(shape, device=meter.device), dim=-1)
    images, texts = (side.clone().requires_grad_() for side in unit)
    labels = torch.arange(batch_size, device=meter.device)
    scale = torch.tensor(100.0, device=meter.device)
    rows = []
    for name, loss in (("tiled", unicl_loss), ("dense", reference_loss)):

        def run(loss: Callable[..., Tensor] = loss) -> None:
            torch.autograd.grad(loss(images, texts, labels, scale), [images, texts])

        _say(f"{name} loss at batch {batch_size:,}")
        before = meter.allocated()
        row: dict[str, object] = {"loss": name, "batch_size": batch_size}
        try:
            run()
            peak = (meter.peak(run) - before) / (1 << 20)
            row |= {"seconds": meter.seconds(run, 3), "peak_mib": peak, "note": ""}
        except torch.OutOfMemoryError:
            row |= {"seconds": "", "peak_mib": "", "note": "out of memory"}
        meter.release()
        rows.append(row)
    return rows


class _Report:
    """Collects what is found, and makes the result of it."""

    def __init__(self, meter: Meter, sizes: Plan) -> None:
        self.meter = meter
        self.begin, self.allowed = time.perf_counter(), sizes.seconds
        self.matmul = matmul_flops(meter, sizes.matmul)
        on_gpu = meter.device.type == "cuda"
        self.gpu = torch.cuda.get_device_name(meter.device) if on_gpu else "none, this is the CPU"
        self.sheet = peak_flops(self.gpu)
        self.peak = self.sheet or self.matmul
        self.compiler = sizes.compiler
        self.towers: list[dict[str, object]] = []
        self.steps: list[dict[str, object]] = []
        self.losses: list[dict[str, object]] = []
        self._bars: list[Bar] = []
        self._fastest: dict[str, tuple[float, float, str]] = {}
        """Per model images/s, utilisation in per cent and name of our fastest case."""
        self._goals: dict[str, float | None] = {}
        self._texts = describe(draw_tokens(sizes.subjects[0].micro_batch_size))
        _say(f"{self.gpu}: {self.matmul / 1e12:,.3g} TFLOP/s in a large product")

    def late(self) -> bool:
        """Say whether the time for beginning something new is over."""
        return time.perf_counter() - self.begin > self.allowed

    def add(self, subject: Subject, found: Sequence[_Found]) -> None:
        """Take in the cases of one model that were measured in turns."""
        self._goals[subject.name] = subject.goal
        rows = [self._row(subject, each) for each in found]
        self.steps += rows
        for row, each in zip(rows, found, strict=True):
            if each.seconds:
                _say(f"  {each.side}, {each.case.name}: MFU {row['mfu_percent']:.3g}%")
            if each.seconds and each.side == Own.name:
                speed, use = (float(str(row[key])) for key in ("images_per_second", "mfu_percent"))
                best = self._fastest.get(subject.name, (0.0, 0.0, ""))
                self._fastest[subject.name] = max(best, (speed, use, each.case.name))
        gain = _gain(found)
        if gain is not None:
            how = "blocks compiled" if found[0].case.compiled else "both eager"
            what = f"{subject.name}, model FLOP/s over open_clip's ViT of equal FLOPs, {how}"
            spread = (gain.low, gain.high)
            self._bars.append(Bar(what, gain.median, 1.0, "x", "at least", spread))

    def result(self) -> Result:
        """Return all there is so far."""
        return Result(bars=self._all_bars(), tables=self._tables(), facts=self._facts())

    def _row(self, subject: Subject, each: _Found) -> dict[str, object]:
        row: dict[str, object] = {
            "model": subject.name,
            "step": each.side,
            "case": each.case.name,
            "micro_batch_size": each.batch_size,
            **dict.fromkeys(("images_per_second", "gflops_per_sample", "tflops_per_second"), ""),
            **dict.fromkeys(("mfu_percent", "percent_of_product", "peak_gib"), ""),
            "note": each.note,
        }
        if each.seconds:
            seconds = median(each.seconds)
            row |= {
                "images_per_second": each.batch_size / seconds,
                "gflops_per_sample": each.flops / each.batch_size / 1e9,
                "tflops_per_second": median(each.flops_per_second()) / 1e12,
                "mfu_percent": 100 * utilisation(each.flops, seconds, self.peak),
                "percent_of_product": 100 * utilisation(each.flops, seconds, self.matmul),
                "peak_gib": each.peak_bytes / _GIB,
            }
        return row

    def _all_bars(self) -> list[Bar]:
        best = [
            Bar(
                f"{name}, model-FLOP utilisation in bf16, fastest case",
                percent,
                self._goals[name],
                "%",
                "at least",
            )
            for name, (_, percent, _) in self._fastest.items()
        ]
        return [*best, *self._bars]

    def _tables(self) -> dict[str, list[dict[str, object]]]:
        tables = {"Towers": self.towers, "Steps": self.steps, "Loss alone": self.losses}
        return {title: rows for title, rows in tables.items() if rows}

    def _facts(self) -> dict[str, object]:
        return {
            "gpu": self.gpu,
            "peak_tflops_of_the_data_sheet": self.sheet and self.sheet / 1e12,
            "tflops_of_a_large_product": self.matmul / 1e12,
            "cuda": torch.version.cuda or "none",
            "compiler": self.compiler,
            "fastest_cases": {name: case for name, (*_, case) in self._fastest.items()},
            **self._texts,
            "seconds": time.perf_counter() - self.begin,
        }


def _gain(found: Sequence[_Found]) -> Ratio | None:
    """Compare the plain or compiled cases of the two sides, round by round."""
    rates = {each.side: each.flops_per_second() for each in found if each.case in PEER_CASES}
    own, peer = (rates.get(side.name, []) for side in (Own, Peer))
    if not own or not peer:
        return None
    ratios = [a / b for a, b in zip(own, peer, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def _say(text: str) -> None:
    print(f"gpu: {text}", flush=True)
