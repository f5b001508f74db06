"""Carry weights to another window, number of channels or number of dimensions.

Inflation from images to video follows Florence 3.8: kernels are copied along time and divided by
their extent, bias tables are copied along time. State dicts in the layout of the public CoSwin code
are read. Nothing here opens a file, so nothing is unpickled.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cosswin.attention import WindowAttention

_STEM = "patch_embed.proj.weight"
_TABLE = "relative_position_bias_table"
_DERIVED = ("relative_position_index", "attn_mask")


def resize_bias_table(
    table: Float[Tensor, "rows heads"], *, source: tuple[int, ...], target: tuple[int, ...]
) -> Float[Tensor, "new_rows heads"]:
    """Carry a bias table from the window `source` to the window `target`.

    Space is resized bicubically, time linearly; a table without time is copied along it.
    """
    if len(source) > len(target):
        raise ValueError(f"a window {source} cannot be carried to fewer dimensions, {target}")
    old, new = _sides(source), _sides(target)
    if table.shape[0] != math.prod(old):
        raise ValueError(f"a bias table of window {source} has {math.prod(old)} rows, "
                         f"got {table.shape[0]}")  # fmt: skip
    grid = table.t().reshape(-1, 1, *old).flatten(1, -3)  # heads, time, height, width
    if old[-2:] != new[-2:]:
        grid = F.interpolate(grid.float(), size=new[-2:], mode="bicubic", align_corners=False)
    if len(new) == 3 and grid.shape[1] != new[0]:
        flat = grid.flatten(2).transpose(1, 2).float()
        flat = F.interpolate(flat, size=new[0], mode="linear", align_corners=False)
        grid = flat.transpose(1, 2)
    return grid.reshape(table.shape[1], -1).t().contiguous().to(table.dtype)


def inflate_kernel(
    weight: Float[Tensor, "c_out c_in *kernel"], *, kernel: tuple[int, ...]
) -> Float[Tensor, "c_out c_in *new_kernel"]:
    """Carry a 2-D kernel to three dimensions: copied along time, divided by the extent."""
    if weight.shape[2:] == kernel:
        return weight
    if weight.ndim != 4 or len(kernel) != 3 or weight.shape[2:] != kernel[1:]:
        raise ValueError(f"a kernel {tuple(weight.shape[2:])} cannot be carried to {kernel}")
    return weight[:, :, None].repeat(1, 1, kernel[0], 1, 1) / kernel[0]


def adapt_channels(
    weight: Float[Tensor, "c_out c_in *kernel"], *, in_chans: int
) -> Float[Tensor, "c_out new_c_in *kernel"]:
    """Carry the stem's kernel to another number of input channels, by timm's rule.

    One channel gets the sum; more channels repeat the old ones, scaled to keep the response.
    """
    old = weight.shape[1]
    if in_chans == old:
        return weight
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    index = torch.arange(in_chans, device=weight.device) % old
    return weight.index_select(1, index) * (old / in_chans)


def carry_weights(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    *,
    window_size: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """Return the weights of any CoSwin in the shapes and names of `model`.

    A common prefix and buffers that are derived are dropped; of one norm per output (the detection
    variant) the last is kept; a head of another number of classes is left as `model` has it.

    Args:
        state_dict: Weights in the key layout of the public CoSwin code, of two or three dimensions.
        model: The CoSwin that is to take them; it is not changed.
        window_size: The window that the weights were trained with; needed where a table's length
            does not tell.

    Raises:
        ValueError: The weights are of another architecture.
    """
    target = model.state_dict()
    weights = _normalise_names(state_dict, target)
    for name, module in model.named_modules():
        key = f"{name}.{_TABLE}"
        if isinstance(module, WindowAttention) and key in weights:
            rows = weights[key].shape[0]
            source = window_size or _infer_window(rows, module.window_size)
            weights[key] = resize_bias_table(weights[key], source=source, target=module.window_size)
        elif isinstance(module, nn.Conv2d | nn.Conv3d) and f"{name}.weight" in weights:
            key = f"{name}.weight"
            if key == _STEM:
                weights[key] = adapt_channels(weights[key], in_chans=module.in_channels)
            weights[key] = inflate_kernel(weights[key], kernel=tuple(module.kernel_size))
    _take_head(weights, target)
    _check_shapes(weights, target)
    return weights


def _sides(window: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(2 * side - 1 for side in window)


def _normalise_names(
    state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    stems = [key for key in state_dict if key.endswith(_STEM)]
    if len(stems) != 1:
        raise ValueError(f"expected the weights of one CoSwin, found {len(stems)} keys *{_STEM}")
    prefix = stems[0].removesuffix(_STEM)
    weights = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix) and not key.endswith(_DERIVED)
    }
    last = max(int(key.split(".")[1]) for key in target if key.startswith("layers."))
    for part in ("weight", "bias"):
        per_output = [weights.pop(f"norm{stage}.{part}", None) for stage in range(last + 1)]
        if per_output[-1] is not None:
            weights.setdefault(f"norm.{part}", per_output[-1])
    return weights


def _infer_window(rows: int, target: tuple[int, ...]) -> tuple[int, ...]:
    """Guess a table's window: the target's, a square, or the target's in another extent of time."""
    if rows == math.prod(_sides(target)):
        return target
    side = math.isqrt(rows)
    if side * side == rows and side % 2:
        return (side // 2 + 1,) * 2
    time, rest = divmod(rows, math.prod(_sides(target[-2:])))
    if rest == 0 and time % 2:
        return (time // 2 + 1, *target[-2:])
    raise ValueError(f"cannot tell the window of a bias table with {rows} rows: pass window_size")


def _take_head(weights: dict[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Keep the model's head where the weights' is missing or of other classes."""
    found, wanted = weights.get("head.weight"), target.get("head.weight")
    if found is None or wanted is None or found.shape != wanted.shape:
        for key in ("head.weight", "head.bias"):
            weights.pop(key, None)
            if key in target:
                weights[key] = target[key]


def _check_shapes(weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(target.keys() - weights), sorted(weights.keys() - target)
    for what, keys in (("lack", missing), ("have the unknown", unknown)):
        if keys:
            raise ValueError(f"the weights {what} {keys[0]} (and {len(keys) - 1} more)")
    for key, value in target.items():
        if weights[key].shape != value.shape:
            raise ValueError(
                f"{key} has shape {list(weights[key].shape)}, the model needs {list(value.shape)}"
            )
