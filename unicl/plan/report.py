"""A plan as tables on the terminal."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from unicl.plan.planner import GIB, Plan

_UTILISATIONS = (0.3, 0.4, 0.5)
_LABELS = {"optimizer": "optimizer state", "reserve": "CUDA, NCCL, fragments"}


def show(plan: Plan, *, device: str) -> None:
    """Print a plan; `device` names the GPU that the days are reckoned for."""
    console = Console()
    console.print(Group(_memory(plan), *_verdict(plan), "", _work(plan, device)))


def _memory(plan: Plan) -> Table:
    title = (
        f"{plan.recipe.name}: GiB on each of {plan.gpus:,} GPUs, {plan.rows:,} samples each, "
        f"texts of {plan.text_length} tokens"
    )
    table = _table(title)
    for name, size in plan.memory.parts().items():
        table.add_row(_LABELS.get(name, name), f"{size / GIB:.2f}")
    table.add_section()
    table.add_row(f"total, at its most: {plan.memory.name}", f"{plan.memory.total / GIB:.2f}")
    if plan.memory.host:
        table.add_row("and in the host's memory", f"{plan.memory.host / GIB:.2f}")
    return table


def _verdict(plan: Plan) -> list[RenderableType]:
    limit = f"{plan.gpu_memory:g} GiB"
    if plan.fits:
        return [Text(f"It fits in {limit}.")]
    after = f"{plan.changed_memory.total / GIB:.2f} GiB"
    if plan.changes is None:
        return [
            Text(
                f"It does not fit in {limit}, and no setting makes it fit: the least is {after}. "
                "Take more or larger GPUs, a smaller model or smaller images."
            )
        ]
    return [
        Text(
            f"It does not fit in {limit}. The cheapest change is to add these flags: {after}, "
            f"and a step takes about {plan.slowdown:.2f} times as long."
        ),
        # Never wrapped: it is there to be copied.
        Text("  " + " ".join(plan.changes), no_wrap=True, overflow="ignore"),
    ]


def _work(plan: Plan, device: str) -> Table:
    table = _table(f"Work on {plan.gpus:,} {device}, {plan.peak_tflops:g} TFLOP/s each at best")
    table.add_row("parameters", f"{plan.parameters / 1e6:,.1f}M")
    table.add_row("forward of a pair", f"{plan.forward_flops / 1e9:,.1f} GFLOP")
    table.add_row("training on a pair", f"{plan.training_flops / 1e9:,.1f} GFLOP")
    table.add_row("samples seen", f"{plan.samples:,}")
    table.add_row("whole run", f"{plan.flops:.2e} FLOP")
    for share in _UTILISATIONS:
        table.add_row(f"days at {share:.0%} of the peak", f"{plan.days(share):,.1f}")
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("size", justify="right")
    return table
