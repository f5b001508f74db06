"""Modulated deformable 3x3 convolution (Zhu et al. 2019), fast on a CPU, too.

On a GPU it is torchvision's. On a CPU that one takes five to ten times as long as a convolution; so
there a sample is a bag of the four rows around it, and of a large map few taps are sampled and
multiplied at a time: what they need stays in the caches, and none of it is kept.
"""

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

_TAPS = 9

# Samples that go together. Arrays above 32 MiB are fetched from the kernel page by page, each
# time anew, which takes longer than what is done with them.
_MOST_SAMPLES = 20_000


def deform_conv(
    x: Float[Tensor, "n c h w"],
    offset: Float[Tensor, "n 18 ho wo"],
    mask: Float[Tensor, "n 9 ho wo"],
    weight: Float[Tensor, "out c 3 3"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    stride: int = 1,
) -> Float[Tensor, "n out ho wo"]:
    """Convolve, with padding 1, a map that each tap reads at a place and with a gain of its own.

    Between its pixels the map is interpolated, outside it is zero. Under autocast the places and
    the interpolation keep full precision; on a CPU the products are of the reduced one.

    Args:
        x: The map.
        offset: Where each tap reads, in pixels of the map from where a convolution would: y and x
            of the first tap, then of the second, and so on along the kernel's rows.
        mask: What each tap's sample is multiplied by.
        weight: The kernel.
        bias: Added at the end.
        stride: Pixels of the map between the places of a convolution.
    """
    size = (x.shape[2], x.shape[3])
    return Sampling(offset, mask, size=size, stride=stride).conv(x, weight, bias)


def by_tap(weight: Float[Tensor, "out c 3 3"]) -> Float[Tensor, "out c 3 3"]:
    """Lay out a kernel as it is multiplied on a CPU; saves time if it is for several maps."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


class Sampling:
    """Where the taps of deformable convolutions read, and how much; for several maps of one pass.

    Args:
        offset: As in `deform_conv`.
        mask: As in `deform_conv`.
        size: Height and width of the maps that are read.
        stride: As in `deform_conv`.
    """

    def __init__(
        self,
        offset: Float[Tensor, "n 18 ho wo"],
        mask: Float[Tensor, "n 9 ho wo"],
        *,
        size: tuple[int, int],
        stride: int = 1,
    ) -> None:
        self.offset = _precise(offset)
        self.mask = _precise(mask)
        self.size = size
        self.stride = stride

    def conv(
        self,
        x: Float[Tensor, "n c h w"],
        weight: Float[Tensor, "out c 3 3"],
        bias: Float[Tensor, " out"] | None = None,
    ) -> Float[Tensor, "n out ho wo"]:
        """Convolve a map as `deform_conv` does, once it is of the right size.

        A map of another size is resized before, bilinearly and with its corners kept in place.
        """
        if not len(x):
            # Of no images there is no sample, but still a gradient, zero, for all parameters.
            unused = self.offset.sum() + self.mask.sum() + x.sum() + weight.sum()
            out = self.mask.new_zeros(0, len(weight), *self.mask.shape[2:]) + unused
        elif x.device.type == "cpu":
            parts = zip(self._parts, x.split(self._together), strict=True)
            outs = [part._sampled(images, weight) for part, images in parts]
            out = torch.cat(outs) if len(outs) > 1 else outs[0]
        else:
            with torch.autocast(x.device.type, enabled=False):
                out = deform_conv2d(
                    _resized(_precise(x), self.size),
                    self.offset,
                    _precise(weight),
                    stride=self.stride,
                    padding=1,
                    mask=self.mask,
                )
        return out if bias is None else out + bias[:, None, None]

    @property
    def _together(self) -> int:
        """How many images go together."""
        places = max(self.mask.shape[2] * self.mask.shape[3], self.size[0] * self.size[1])
        return max(1, _MOST_SAMPLES // places)

    @cached_property
    def _parts(self) -> list["Sampling"]:
        if len(self.mask) <= self._together:
            return [self]
        return [
            Sampling(offset, mask, size=self.size, stride=self.stride)
            for offset, mask in zip(
                self.offset.split(self._together), self.mask.split(self._together), strict=True
            )
        ]

    def _sampled(self, x: Tensor, weight: Tensor) -> Tensor:
        reduced = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if reduced else _precise(weight).dtype
        function: Any = _ProductsSampled
        if 2 * x.shape[2] * x.shape[3] > self.size[0] * self.size[1]:
            # No fewer products before resizing than after sampling; those are not made twice.
            function, x = _SamplesMultiplied, _resized(x, self.size)
        groups = len(self._corners[0])
        maps = _precise(x).permute(0, 2, 3, 1).contiguous()
        kernels = by_tap(_precise(weight)).permute(2, 3, 1, 0)
        kernels = kernels.view(groups, _TAPS // groups, *kernels.shape[2:])
        with torch.autocast("cpu", enabled=False):
            rows = function.apply(maps, kernels, *self._corners, *self._order, self.size, dtype)
        n, _, height, width = self.mask.shape
        return rows.view(n, height, width, -1).permute(0, 3, 1, 2)

    @cached_property
    def _corners(
        self,
    ) -> tuple[Int[Tensor, "groups places taps 4"], Float[Tensor, "groups places taps 4"]]:
        """The rows of the map around each sample, and their parts in it; by groups of taps."""
        n, _, height, width = self.mask.shape
        offset = self.offset.view(n, _TAPS, 2, height, width).permute(2, 1, 0, 3, 4)
        steps = torch.arange(-1, 2)
        start_y = (
            torch.arange(height)[:, None] * self.stride
            + steps.repeat_interleave(3)[:, None, None, None]
        )
        start_x = torch.arange(width) * self.stride + steps.repeat(3)[:, None, None, None]
        rows, parts_y = _neighbours(offset[0] + start_y, self.size[0])
        columns, parts_x = _neighbours(offset[1] + start_x, self.size[1])
        parts_y = parts_y * self.mask.transpose(0, 1)[..., None]
        gains = parts_y[..., :, None] * parts_x[..., None, :]
        first = torch.arange(n, dtype=torch.int32)[:, None, None, None] * self.size[0]
        corners = (rows + first)[..., :, None] * self.size[1] + columns[..., None, :]
        places = n * height * width
        taps = next(taps for taps in (9, 3, 1) if taps == 1 or taps * places <= _MOST_SAMPLES)
        grouped = (_TAPS // taps, taps, places, 4)
        return (
            corners.reshape(grouped).transpose(1, 2).contiguous(),
            gains.reshape(grouped).transpose(1, 2).contiguous(),
        )

    @cached_property
    def _order(self) -> tuple[Int[Tensor, "groups corners"] | None, Int[Tensor, "groups _"] | None]:
        """Where the corners are when sorted by row and tap, and where each of those begins.

        None without a graph: this is for gradients.
        """
        if not torch.is_grad_enabled():
            return None, None
        corners, _ = self._corners
        groups, _, taps, _ = corners.shape
        keys, order = _by_tap(corners).flatten(1).sort(dim=1)
        num_rows = len(self.mask) * self.size[0] * self.size[1]
        every = torch.arange(num_rows * taps, dtype=torch.int32).expand(groups, -1)
        return order, torch.searchsorted(keys, every.contiguous())


class _SamplesMultiplied(torch.autograd.Function):
    """Sum over taps of samples times kernel; samples are taken again in the backward pass."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        maps: Float[Tensor, "n h w c"],
        kernels: Float[Tensor, "groups taps c out"],
        corners: Int[Tensor, "groups places taps 4"],
        gains: Float[Tensor, "groups places taps 4"],
        order: Int[Tensor, "groups _"] | None,
        starts: Int[Tensor, "groups _"] | None,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> Float[Tensor, "places out"]:
        ctx.save_for_backward(maps, kernels, corners, gains, order, starts)
        ctx.dtype = dtype
        rows = maps.flatten(0, 2)
        out = maps.new_zeros(corners.shape[1], kernels.shape[-1])
        for corner, gain, kernel in zip(corners, gains, kernels.to(dtype), strict=True):
            samples = _bags(rows, corner.flatten(0, 1), gain.flatten(0, 1))
            out += samples.to(dtype).view(len(out), -1) @ kernel.flatten(0, 1)
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Float[Tensor, "places out"]) -> tuple[Tensor | None, ...]:
        maps, kernels, corners, gains, order, starts = ctx.saved_tensors
        taps = kernels.shape[1]
        rows = maps.flatten(0, 2)
        reduced = gradient.to(ctx.dtype)
        of_rows, of_kernels, of_gains = map(torch.zeros_like, (rows, kernels, gains))
        for group, kernel in enumerate(kernels.to(ctx.dtype).flatten(1, 2)):
            with torch.enable_grad():
                gain = gains[group].flatten(0, 1).detach().requires_grad_()
                samples = _bags(rows, corners[group].flatten(0, 1), gain)
            multiplied = samples.detach().to(ctx.dtype).view(len(reduced), -1)
            of_kernels[group] = (multiplied.T @ reduced).view_as(of_kernels[group])
            of_samples = (reduced @ kernel.T).to(rows.dtype).view_as(samples)
            (of_gain,) = torch.autograd.grad(samples, gain, of_samples)
            of_gains[group] = of_gain.view_as(of_gains[group])
            # A row's taps are neighbours.
            begins = starts[group, ::taps].contiguous()
            of_rows += _collected(of_samples, gain.detach(), order[group], begins)
        return of_rows.view_as(maps), of_kernels, None, of_gains, None, None, None, None


class _ProductsSampled(torch.autograd.Function):
    """The same of a small map that would be resized first: its products are, which are fewer.

    Both are linear in the map. The products are made again in the backward pass.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        maps: Float[Tensor, "n h w c"],
        kernels: Float[Tensor, "groups taps c out"],
        corners: Int[Tensor, "groups places taps 4"],
        gains: Float[Tensor, "groups places taps 4"],
        order: Int[Tensor, "groups _"] | None,
        starts: Int[Tensor, "groups _"] | None,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> Float[Tensor, "places out"]:
        ctx.save_for_backward(maps, kernels, corners, gains, order, starts)
        ctx.size, ctx.dtype = size, dtype
        reduced = maps.to(dtype)
        out = maps.new_zeros(corners.shape[1], kernels.shape[-1])
        keys = _by_tap(corners).flatten(2)
        for key, gain, kernel in zip(keys, gains.flatten(2), kernels.to(dtype), strict=True):
            products = (reduced @ _side_by_side(kernel)).to(maps.dtype)
            out += _bags(_resized_rows(products, size, len(kernel)), key, gain)
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Float[Tensor, "places out"]) -> tuple[Tensor | None, ...]:
        maps, kernels, corners, gains, order, starts = ctx.saved_tensors
        taps, out = kernels.shape[1], kernels.shape[-1]
        # Bags of rows that do not lie one after the other in memory are several times slower.
        gradient = gradient.contiguous()
        reduced = maps.to(ctx.dtype)
        of_maps, of_kernels, of_gains = map(torch.zeros_like, (maps, kernels, gains))
        keys = _by_tap(corners).flatten(2)
        for group, each in enumerate(kernels.to(ctx.dtype)):
            kernel = _side_by_side(each)
            products = (reduced @ kernel).to(maps.dtype).requires_grad_()
            with torch.enable_grad():
                rows = _resized_rows(products, ctx.size, taps)
                gain = gains[group].flatten(1).detach().requires_grad_()
                samples = _bags(rows.detach(), keys[group], gain)
            (of_gain,) = torch.autograd.grad(samples, gain, gradient)
            of_gains[group] = of_gain.view_as(of_gains[group])
            of_rows = _collected(gradient, gain.detach(), order[group], starts[group])
            (of_products,) = torch.autograd.grad(rows, products, of_rows)
            of_products = of_products.to(ctx.dtype)
            of_kernel = reduced.flatten(0, 2).T @ of_products.flatten(0, 2)
            of_kernels[group] = of_kernel.view(-1, taps, out).transpose(0, 1)
            of_maps += of_products @ kernel.T
        return of_maps, of_kernels, None, of_gains, None, None, None, None


def _bags(
    rows: Float[Tensor, "rows c"], numbers: Int[Tensor, "bags k"], gains: Float[Tensor, "bags k"]
) -> Float[Tensor, "bags c"]:
    """Sum rows, each times its gain."""
    return F.embedding_bag(numbers, rows, per_sample_weights=gains, mode="sum")


def _collected(
    gradient: Float[Tensor, "bags c"],
    gains: Float[Tensor, "bags k"],
    order: Int[Tensor, "_"],
    starts: Int[Tensor, "rows"],
) -> Float[Tensor, "rows c"]:
    """Bring the gradient of bags to the rows that were summed: bags again, one for each row."""
    return F.embedding_bag(
        order // gains.shape[1],
        gradient,
        starts,
        per_sample_weights=gains.flatten()[order],
        mode="sum",
    )


def _by_tap(corners: Int[Tensor, "groups places taps 4"]) -> Int[Tensor, "groups places taps 4"]:
    """Number the rows of a map anew, where each of them is one for each tap."""
    taps = corners.shape[2]
    return corners * taps + torch.arange(taps, dtype=corners.dtype)[:, None]


def _side_by_side(kernel: Float[Tensor, "taps c out"]) -> Float[Tensor, "c _"]:
    """Lay out a kernel so that one product is that of all taps."""
    return kernel.transpose(0, 1).flatten(1)


def _neighbours(
    places: Float[Tensor, "*places"], size: int
) -> tuple[Int[Tensor, "*places 2"], Float[Tensor, "*places 2"]]:
    """Return the two pixels of an axis around each place, and their parts; none is outside."""
    first = places.detach().floor()
    behind = places - first
    pixels = torch.stack([first, first + 1], -1)
    inside = (pixels >= 0) & (pixels < size)
    parts = torch.stack([1 - behind, behind], -1) * inside
    # A place that is no number shows in the parts; its pixel must still be one.
    return pixels.nan_to_num().clamp(0, size - 1).int(), parts


def _resized_rows(
    maps: Float[Tensor, "n h w _"], size: tuple[int, int], taps: int
) -> Float[Tensor, "rows out"]:
    resized = _resized(maps.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    return resized.reshape(-1, maps.shape[-1] // taps)


def _resized(x: Float[Tensor, "n c h w"], size: tuple[int, int]) -> Float[Tensor, "n c h2 w2"]:
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
