"""What a tower costs, found by running it on tensors that have shapes, but no memory.

No formula knows an architecture: what a forward leaves alive is what its backward will need, so any
timm model can be planned. Nothing runs backward, for autograd wants a real GPU for that.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from unicl.config import Recipe
from unicl.engine.optimizer import parameter_groups
from unicl.errors import UsageError
from unicl.models import build_model
from unicl.towers.two_tower import TwoTower

# Two sizes give what grows with the rows and what does not; of one row some shapes are special.
_FEW, _MORE = 2, 4
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TowerMemory:
    """What a forward and backward of one tower holds, as a function of its rows."""

    fixed: int
    """Bytes alive when backward begins, whatever the rows: half-precision copies of weights."""
    per_row: int
    """Bytes that one row adds to it: activations, and what backward needs to work with them."""

    def activations(self, rows: int) -> int:
        """Return the bytes that are alive beside parameters and gradients."""
        return self.fixed + rows * self.per_row


class Towers:
    """The two towers of a recipe on tensors without memory, and what they cost.

    Args:
        recipe: What is planned; files of weights are not read.
        device: Where the model will run: attention takes another path on a GPU than on a CPU.
        precision: Autocast type of the towers.
        text_length: Tokens of a text.

    Raises:
        UsageError: The image tower cannot take the recipe's image size.
    """

    def __init__(self, recipe: Recipe, *, device: str, precision: str, text_length: int) -> None:
        self._recipe, self.device, self._precision = recipe, device, precision
        self._text_length = text_length
        self._mode = FakeTensorMode()
        self._model = _build(recipe, self._mode, device)
        self._memory: dict[tuple[str, bool], TowerMemory] = {}
        self._flops: dict[str, int] = {}
        self.frozen = {
            tower: sum(p.numel() for p in module.parameters() if not p.requires_grad)
            for tower, module in (("image", self._model.image), ("text", self._model.text))
        }
        groups = parameter_groups(self._model, recipe.optimizer)
        self.groups = tuple(tuple(p.numel() for p in group["params"]) for group in groups)

    def memory(self, tower: str, *, checkpointing: bool) -> TowerMemory:
        """Measure "image" or "text"; a second call is free."""
        key = tower, checkpointing
        if key not in self._memory:
            self._memory[key] = self._measure(tower, checkpointing)
        return self._memory[key]

    def flops(self, tower: str) -> int:
        """Return the operations of one row's forward; a product and a sum are two."""
        if tower not in self._flops:
            with torch.no_grad(), self._modes(), FlopCounterMode(display=False) as counter:
                self._run(tower, 1)
            self._flops[tower] = int(counter.get_total_flops())
        return self._flops[tower]

    def can_checkpoint(self, tower: str) -> bool:
        """Say whether the tower knows how to recompute its activations."""
        try:
            getattr(self._model, tower).set_grad_checkpointing(True)
        except UsageError:
            return False
        return True

    def _measure(self, tower: str, checkpointing: bool) -> TowerMemory:
        module = getattr(self._model, tower)
        if self.can_checkpoint(tower):
            module.set_grad_checkpointing(checkpointing)
        few, more = (self._bytes(tower, rows, checkpointing) for rows in (_FEW, _MORE))
        per_row = (more - few) // (_MORE - _FEW)
        return TowerMemory(max(0, few - _FEW * per_row), per_row)

    def _bytes(self, tower: str, rows: int, checkpointing: bool) -> int:
        with self._modes(), _Held(self._model) as held:
            output = self._run(tower, rows)
            total = held.now + held.largest  # working space: a gradient of the largest activation
        del output
        if checkpointing:
            # Backward recomputes one region at a time: the largest one counts.
            with self._modes(), _Held(self._model) as held, _unchecked_regions(held) as regions:
                self._run(tower, rows)
            total += max(regions, default=0)
        return total

    def _run(self, tower: str, rows: int) -> Tensor:
        if tower == "image":
            side = self._recipe.image_tower.image_size
            images = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=self.device)
            return self._model.encode_image(images)
        tokens = torch.zeros(rows, self._text_length, dtype=torch.int64, device=self.device)
        # The economies look at values, which there are none of.
        return self._model.encode_text(tokens, economies=False)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        with self._mode, _autocast(self._precision, self.device):
            if self.device == "cpu":
                yield
            else:
                with _FusedAttention():
                    yield


class _Held(TorchDispatchMode):
    """Counts the bytes of the storages that are alive and were not there before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.largest = 0
        given = [*model.parameters(), *model.buffers()]
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.now += size
        self.largest = max(self.largest, size)
        self._seen[key] = weakref.ref(storage, partial(self._forget, key, size))

    def _forget(self, key: int, size: int, _: object) -> None:
        self.now -= size
        del self._seen[key]


class _FusedAttention(TorchFunctionMode):
    """Takes the fused kernel that a GPU takes; tensors without memory would take none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the one function that chooses among kernels."""
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,
) -> Tensor:
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
        # The kernel wants rows of whole 16 bytes; torch pads the mask by as much.
        length = k.shape[-2]
        attn_mask = F.pad(attn_mask.to(q.dtype), (0, -length % 16))[..., :length]
        attn_mask = attn_mask.expand(*q.shape[:-1], length)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, True, dropout_p, is_causal
    )[0]


@contextmanager
def _autocast(precision: str, device: str) -> Iterator[None]:
    """Cast as `unicl.engine.precision.autocast`, also for a GPU that is not there."""
    if precision == "fp32":
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, _TYPES[precision])
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def _unchecked_regions(held: _Held) -> Iterator[list[int]]:
    """Let checkpointed regions keep what they would recompute, and note the bytes of each.

    Checkpointing hides a region's saved tensors behind hooks; without the hooks they stay alive.
    """
    sizes: list[int] = []
    starts: list[int] = []

    def enter(_: object) -> None:
        starts.append(held.now)

    def leave(*_: object) -> None:
        sizes.append(held.now - starts.pop())

    with mock.patch.multiple(saved_tensors_hooks, __enter__=enter, __exit__=leave):
        yield sizes


def _build(recipe: Recipe, mode: FakeTensorMode, device: str) -> TwoTower:
    try:
        with mode, torch.device(device):
            return build_model(recipe, start=False)
    except (DataDependentOutputException, UnsupportedFakeTensorException):
        # Some of timm's models read numbers out of tensors; they are built for real first.
        model = build_model(recipe, start=False)
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = _without_memory(tensor, mode, device)  # type: ignore[assignment]
        return model


def _without_memory(tensor: Tensor, mode: FakeTensorMode, device: str) -> Tensor:
    with mode:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake
