"""What one rank holds in each phase of a step, by who holds which part of the parameters.

Parameters, gradients and moments are fp32 under every precision (see `unicl.engine`), so with P
bytes of parameters on N ranks, and buckets of B bytes (what is copied together for an exchange):

    held                      torch     ZeRO 0       ZeRO 1        ZeRO 2      ZeRO 3
    parameters                P         P            P             P           P/N and those in use
    moments, 3P with EMA      2P        2P           2P/N          2P/N        2P/N
    copy that is updated      -         -            P/N           P/N         P/N
    gradients, one backward   P         P            P             B + L + K   B + L + P/N
    during the reduction      -         P (at most   B + P + K     -           -
                                        2 GB)
    during the update         -         -            P/N + K       P/N + K     P/N

L is the largest parameter, which is exchanged outside of the buckets if it is larger than one. K is
P/N rounded up to whole parameters: ZeRO 1 and 2 keep the whole gradient of every parameter of which
a rank updates a part, so tables of embeddings weigh on all ranks that share them. ZeRO 3 fetches
parameters until 4B are whole.

Several backwards in a step (gradient cache) hold the whole gradient from one to the next, unless
ZeRO 2 or 3 reduce after every chunk; ZeRO 2 then holds K twice, to add one to the other. DDP holds
the whole gradient twice: in its buckets, and beside them. gloo copies what it gathers. Evaluation
takes a whole copy of the model where there are averages, or parameters are shared out (ZeRO 3).
`python -m benchmarks zero_memory` compares all this with what 4 CPU ranks take.
ZeRO: Rajbhandari et al. 2020; the buffers are those of DeepSpeed's `stage_1_and_2.py`, `stage3.py`.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from unicl.config import EngineConfig

_FLOAT = 4
_MOMENTS = 2  # of AdamW
BUCKET = 2**23 * _FLOAT
"""Bytes of a bucket, as `unicl.engine.deepspeed_backend` sets it; that one imports DeepSpeed."""
LIVE_BUCKETS = 4
"""Buckets of parameters that ZeRO 3 holds whole; that module's, too."""
_FALLBACK_BUCKET = 500_000_000 * _FLOAT
"""Bytes that stage 0 reduces together; DeepSpeed has no setting for it."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a rank holds at one time, in bytes."""

    name: str
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    """Moments, and with ZeRO 1 to 3 the copy of this rank's part that is updated."""
    activations: int = 0
    loss: int = 0
    inputs: int = 0
    buffers: int = 0
    """Copies for exchanges, and the gradient of the largest parameter before it is added."""
    reserve: int = 0
    """What CUDA and its libraries take for themselves, and what fragments."""
    host: int = 0
    """Offloaded to the host's memory; not in the total."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the bytes on the device by what they are for."""
        names = [item.name for item in fields(self) if item.name not in ("name", "host")]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the memory of a step depends on, besides the engine's settings; bytes but for counts."""

    groups: tuple[tuple[int, ...], ...]
    """Elements of each parameter, by the optimizer's groups and in their order."""
    ranks: int
    chunks: int
    moments: int
    """What the optimizer keeps per element of a parameter: 2, or 3 with an average."""
    frozen: int
    """Parameters that are not trained."""
    activations: int
    loss: int
    inputs: int
    reserve: int = 0
    gloo: bool = False
    """Whether CPUs exchange; else NCCL does, in place."""

    @property
    def sizes(self) -> list[int]:
        """Elements of each parameter."""
        return list(itertools.chain.from_iterable(self.groups))

    @property
    def whole(self) -> int:
        """All parameters."""
        return _FLOAT * sum(self.sizes)

    @property
    def part(self) -> int:
        """One rank's part of them."""
        return -(-self.whole // self.ranks)

    @property
    def touched(self) -> int:
        """The parameters of which one rank updates a part, whole; of the rank that has most."""
        return _FLOAT * _touched(self.groups, self.ranks)

    @property
    def largest(self) -> int:
        """The largest parameter."""
        return _FLOAT * max(self.sizes)


def peak(load: Load, engine: EngineConfig) -> Phase:
    """Return the phase of a step that holds most."""
    return max(phases(load, engine), key=lambda phase: phase.total)


def phases(load: Load, engine: EngineConfig) -> Iterator[Phase]:
    """Yield what a rank holds in the phases of a step, from the second one on."""
    if engine.backend == "torch" or engine.zero_stage == 0:
        found = _replicated(load, engine)
    elif engine.zero_stage < 3:
        found = _zero_1_and_2(load, engine)
    else:
        found = _zero_3(load, engine)
    shared = engine.backend == "deepspeed" and engine.zero_stage == 3
    frozen = 0 if engine.offload_parameters else load.frozen // (load.ranks if shared else 1)
    for phase in found:
        yield replace(
            phase,
            parameters=phase.parameters + frozen,
            inputs=load.inputs,
            reserve=load.reserve,
        )


def _replicated(load: Load, engine: EngineConfig) -> Iterator[Phase]:
    state = {"parameters": load.whole, "optimizer": load.moments * load.whole}
    ddp = engine.backend == "torch" and load.ranks > 1
    yield Phase(
        name="forward and backward",
        **state,
        gradients=load.whole * (2 if ddp and load.chunks > 1 else 1),
        buffers=load.largest,
        **_forward(load),
    )
    if engine.backend == "deepspeed":
        bucket = min(load.whole, _FALLBACK_BUCKET)
        yield Phase(name="reduction", **state, gradients=load.whole, buffers=bucket)
    yield _evaluation(load, state, copied=load.moments > _MOMENTS)


def _zero_1_and_2(load: Load, engine: EngineConfig) -> Iterator[Phase]:
    bucket = min(load.whole, BUCKET)
    own = (load.moments + 1) * load.part
    state = {"parameters": load.whole, "optimizer": own}
    kept = load.touched  # of the gradient, once it is reduced
    if engine.offload_optimizer:
        # The reduced gradient goes to the host too, with a buffer of the updated parameters.
        state = {"parameters": load.whole, "optimizer": 0, "host": own + 2 * load.part}
        kept = load.largest
    if engine.zero_stage == 2 and _reduces_each_chunk(load, engine):
        yield Phase(
            name="forward and backward",
            **state,
            gradients=kept * (2 if load.chunks > 1 else 1),
            buffers=bucket + load.largest,
            **_forward(load),
        )
    else:
        yield Phase(
            name="forward and backward",
            **state,
            gradients=load.whole,
            buffers=load.largest,
            **_forward(load),
        )
        yield Phase(name="reduction", **state, gradients=load.whole + kept, buffers=bucket)
    yield Phase(name="update", **state, gradients=kept, buffers=min(kept, load.part))
    yield _evaluation(load, state, copied=load.moments > _MOMENTS)


def _zero_3(load: Load, engine: EngineConfig) -> Iterator[Phase]:
    bucket = min(load.whole, BUCKET)
    small = _FLOAT * sum(size for size in load.sizes if size < engine.persistence_threshold)
    # More is fetched as long as less than this is whole, then copied out of what came together.
    fetched = min(load.whole - small, LIVE_BUCKETS * bucket + load.largest) + bucket
    if load.gloo:
        fetched += max(bucket, load.largest)
    own = (load.moments + 1) * load.part
    on_device = {"parameters": load.part, "optimizer": own, "gradients": load.part}
    host = 0
    if engine.offload_optimizer:
        host += own + load.part
        on_device |= {"optimizer": 0, "gradients": 0}
    if engine.offload_parameters:
        host += load.part
        on_device["parameters"] = 0
    kept = on_device["gradients"]
    shared = _reduces_each_chunk(load, engine)
    yield Phase(
        name="forward and backward",
        parameters=on_device["parameters"] + small + fetched,
        gradients=kept + (0 if shared else load.whole),
        optimizer=on_device["optimizer"],
        buffers=bucket + load.largest,
        host=host,
        **_forward(load),
    )
    yield Phase(
        name="update",
        parameters=on_device["parameters"] + small,
        gradients=kept,
        optimizer=on_device["optimizer"],
        buffers=bucket + kept,
        host=host,
    )
    # The buffers of gradients stay from one step to the next.
    on_device["parameters"] += small
    yield _evaluation(load, {**on_device, "host": host}, copied=True, buffers=bucket)


def _evaluation(load: Load, state: dict[str, int], *, copied: bool, buffers: int = 0) -> Phase:
    """Return what is held while a copy is filled, bucket by bucket, and evaluated."""
    copy = load.whole + load.frozen + max(min(load.whole, BUCKET), load.largest) if copied else 0
    return Phase(name="evaluation", **state, buffers=copy + buffers)


@functools.cache
def _touched(groups: tuple[tuple[int, ...], ...], ranks: int) -> int:
    found = [0] * ranks
    for sizes in groups:
        part = -(-sum(sizes) // ranks)
        start = 0
        for size in sizes:
            for rank in range(start // part, (start + size - 1) // part + 1):
                found[rank] += size
            start += size
    return max(found)


def _forward(load: Load) -> dict[str, int]:
    # In chunks the loss is computed and gone before the first activations are kept.
    if load.chunks > 1:
        return {"activations": load.activations, "loss": 0}
    return {"activations": load.activations, "loss": load.loss}


def _reduces_each_chunk(load: Load, engine: EngineConfig) -> bool:
    return load.chunks == 1 or engine.reduce_every == "chunk"
