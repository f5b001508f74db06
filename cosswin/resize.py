"""Carry weights to another window, number of channels or number of dimensions.

Inflation from images to video follows Florence 2.6: kernels are copied along time and divided by
their extent, bias tables are copied along time. State dicts in the layout of the public CoSwin code
are read. Nothing here opens a file, so nothing is unpickled.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cosswin.attention import WindowAttention

MoreChannels = Literal["repeat", "zero"]

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
    weight: Float[Tensor, "c_out c_in *kernel"], *, in_chans: int, more: MoreChannels = "repeat"
) -> Float[Tensor, "c_out new_c_in *kernel"]:
    """Carry the stem's kernel to another number of input channels.

    By timm's rule one channel gets the sum, and more channels repeat the old ones, scaled to keep
    the response. With `more="zero"` those that are added have no effect until they are trained.
    """
    old = weight.shape[1]
    if in_chans == old:
        return weight
    if in_chans > old and more == "zero":
        zeros = weight.new_zeros(len(weight), in_chans - old, *weight.shape[2:])
        return torch.cat([weight, zeros], dim=1)
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    index = torch.arange(in_chans, device=weight.device) % old
    return weight.index_select(1, index) * (old / in_chans)


def carry_weights(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    *,
    window_size: Sequence[int] | Sequence[Sequence[int]] | None = None,
    more_channels: MoreChannels = "repeat",
) -> dict[str, Tensor]:
    """Return the weights of any CoSwin in the shapes and names of `model`.

    A common prefix and buffers that are derived are dropped; of one norm per output (the detection
    variant) the last is kept; a head of another number of classes is left as `model` has it.

    Args:
        state_dict: Weights in the key layout of the public CoSwin code, of two or three dimensions.
        model: The CoSwin that is to take them; it is not changed.
        window_size: The window that the weights were trained with, or one for each stage; needed
            where a table's length does not tell.
        more_channels: Whether input channels that the model has besides repeat those of the
            weights, as timm does, or start at zero.

    Raises:
        ValueError: The weights are of another architecture.
    """
    target = model.state_dict()
    weights = _normalise_names(state_dict, target)
    dims, own = weights[_STEM].ndim - 2, target[_STEM].ndim - 2
    if dims > own:
        raise ValueError(f"weights of {dims} dimensions cannot be carried to a model of {own}")
    for name, module in model.named_modules():
        key = f"{name}.{_TABLE}"
        if isinstance(module, WindowAttention) and key in weights:
            rows = weights[key].shape[0]
            source = _stage_window(window_size, stage=int(name.split(".")[1]))
            source = source or _infer_window(rows, module.window_size, dims=dims)
            weights[key] = resize_bias_table(weights[key], source=source, target=module.window_size)
        elif isinstance(module, nn.Conv2d | nn.Conv3d) and f"{name}.weight" in weights:
            key = f"{name}.weight"
            if key == _STEM:
                weights[key] = adapt_channels(
                    weights[key], in_chans=module.in_channels, more=more_channels
                )
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


def _stage_window(
    window_size: Sequence[int] | Sequence[Sequence[int]] | None, *, stage: int
) -> tuple[int, ...] | None:
    if window_size is None:
        return None
    sides = [side for side in window_size if isinstance(side, int)]
    if len(sides) == len(window_size):
        return tuple(sides)
    windows = [window for window in window_size if not isinstance(window, int)]
    if stage >= len(windows):
        raise ValueError(f"window_size is given for {len(windows)} stages, not for {stage + 1}")
    return tuple(windows[stage])


def _infer_window(rows: int, target: tuple[int, ...], *, dims: int) -> tuple[int, ...]:
    """Guess the window of a table in weights of `dims` dimensions.

    The target's if the length fits; else a square over the same time, or the same sides over
    another time, if only one of the two fits.
    """
    own = target[-dims:]
    if rows == math.prod(_sides(own)):
        return own
    time, space = own[:-2], own[-2:]
    fits = []
    area, rest = divmod(rows, math.prod(_sides(time)))
    side = math.isqrt(area)
    if rest == 0 and side * side == area and side % 2:
        fits.append((*time, side // 2 + 1, side // 2 + 1))
    extent, rest = divmod(rows, math.prod(_sides(space)))
    if time and rest == 0 and extent % 2:
        fits.append((extent // 2 + 1, *space))
    if len(fits) != 1:
        raise ValueError(
            f"cannot tell the window of a bias table with {rows} rows: pass window_size"
        )
    return fits[0]


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
