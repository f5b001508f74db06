"""CoSwin: Swin with convolutional embeddings; Florence's tower for images (2.3) and video (2.6)."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn

from cosswin.attention import WindowAttention
from cosswin.embedding import ConvEmbedding, ConvShape
from cosswin.resize import resize_bias_table
from cosswin.stage import Stage

WindowSize = int | Sequence[int] | Sequence[Sequence[int]]

STEM = ConvShape((7, 7), (4, 4), (2, 2))
MERGE = ConvShape((3, 3), (2, 2), (1, 1))


class CoSwin(nn.Module):
    """Convolutional Swin transformer for images or, with a stem of three numbers, for clips.

    Any input size runs; maps and pooled features follow timm's conventions, channels last inside.

    Args:
        num_classes: Classes of the linear head; 0 leaves it out.
        in_chans: Channels of the input.
        img_size: Nominal input size, which timm records; it changes no weight and no result.
        embed_dim: Channels of the first stage; each further stage doubles them.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: One side, or one side per axis, or those per stage.
        mlp_ratio: Hidden width of the MLPs over their input.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block; earlier blocks get proportionally less.
        layer_scale: Initial LayerScale; None for none.
        global_pool: "avg", "max", or "" to leave the map as it is.
        stem: Kernel, stride, padding of the first embedding; their length is that of a map's size.
        merge: The same of the embeddings between stages.
    """

    output_fmt = "NHWC"

    def __init__(  # noqa: PLR0913 - timm's vocabulary is what its callers pass
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: WindowSize = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        global_pool: str = "avg",
        stem: ConvShape = STEM,
        merge: ConvShape = MERGE,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"{len(depths)} depths but {len(num_heads)} num_heads")
        self.dims = len(stem.kernel)
        self.in_chans = in_chans
        self.img_size = img_size
        self.embed_dim = embed_dim
        widths = [embed_dim * 2**index for index in range(len(depths))]
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            {
                "num_chs": width,
                "reduction": stem.stride[-1] * merge.stride[-1] ** index,
                "module": f"layers.{index}",
            }
            for index, width in enumerate(widths)
        ]
        windows = stage_windows(window_size, dims=self.dims, num_stages=len(depths))
        last = max(sum(depths) - 1, 1)
        drop_paths = [drop_path_rate * index / last for index in range(sum(depths))]
        self.patch_embed = ConvEmbedding(in_chans, embed_dim, shape=stem)
        self.layers = nn.ModuleList(
            Stage(
                width,
                drop_paths=drop_paths[sum(depths[:index]) : sum(depths[: index + 1])],
                num_heads=num_heads[index],
                window_size=windows[index],
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                downsample=ConvEmbedding(width, 2 * width, shape=merge)
                if index < len(depths) - 1
                else None,
            )
            for index, width in enumerate(widths)
        )
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(_initialise)
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Float[Tensor, "n c *size"]) -> Float[Tensor, "n *out"]:
        """Classify, or return the pooled features where there is no head."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "n c *size"]) -> Float[Tensor, "n *map features"]:
        """Return the last map, after the final norm, channels last."""
        for stage_map in self._stage_maps(x):
            last = stage_map
        return self.norm(last)

    def forward_head(
        self, x: Float[Tensor, "n *map features"], pre_logits: bool = False
    ) -> Float[Tensor, "n *out"]:
        """Pool the last map and classify; `pre_logits` stops before the head."""
        axes = tuple(range(1, x.ndim - 1))
        if self.global_pool == "avg":
            x = x.mean(axes)
        elif self.global_pool == "max":
            x = x.amax(axes)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def pyramid(self, images: Float[Tensor, "n c *size"]) -> list[Float[Tensor, "n c_map *map"]]:
        """Return each stage's map, channels first: strides 4, 8, 16, 32 for the default stem.

        Maps are taken before the embedding that leads to the next stage; the last one is after the
        final norm.
        """
        maps = list(self._stage_maps(images))
        maps[-1] = self.norm(maps[-1])
        return [stage_map.movedim(-1, 1) for stage_map in maps]

    def forward_intermediates(
        self,
        x: Float[Tensor, "n c *size"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of chosen stages, after the final map unless `intermediates_only`.

        Args:
            x: Images or clips.
            indices: Stages, from the end where negative; a number n takes the last n.
            norm: Apply the final norm to the last stage's map.
            stop_early: Leave out the stages after the last chosen one.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: Leave out the final map.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt}")
        taken = _chosen(indices, len(self.layers))
        maps = []
        for index, stage_map in enumerate(self._stage_maps(x)):
            final = index == len(self.layers) - 1
            if index in taken:
                chosen = self.norm(stage_map) if norm and final else stage_map
                maps.append(chosen.movedim(-1, 1) if output_fmt == "NCHW" else chosen)
            if stop_early and index == max(taken):
                break
        if intermediates_only:
            return maps
        return (self.norm(stage_map) if final else stage_map), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of the chosen stages do not need; return the stages' indices."""
        taken = _chosen(indices, len(self.layers))
        last = max(taken)
        shortened = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        self._stages()[-1].downsample = None
        if shortened or prune_norm:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if shortened or prune_head:
            self.reset_classifier(0, "")
        return taken

    def set_input_size(
        self,
        img_size: int | Sequence[int] | None = None,
        window_size: WindowSize | None = None,
    ) -> None:
        """Record another nominal input size; carry the bias tables to another window, if given.

        Any input size runs without this call, and the window does not change with the input size.
        """
        if img_size is not None:
            self.img_size = img_size
        if window_size is None:
            return
        windows = stage_windows(window_size, dims=self.dims, num_stages=len(self.layers))
        for stage, window in zip(self.layers, windows, strict=True):
            for attention in stage.modules():
                if isinstance(attention, WindowAttention):
                    _set_window(attention, window)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head in place; 0 classes leave it out."""
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if global_pool not in ("avg", "max", "", None):
            raise ValueError(f"global_pool must be avg, max or empty, got {global_pool}")
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            self.head = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )
            _initialise(self.head)

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        for stage in self._stages():
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's rules for parameter groups: by stage if `coarse`, else by block."""
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the matrices that take no weight decay."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.endswith("relative_position_bias_table")}

    def _stages(self) -> list[Stage]:
        return cast(list[Stage], list(self.layers))

    def _stage_maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x)
        for stage in self._stages():
            x = stage(x)
            yield x
            if stage.downsample is not None:
                x = stage.downsample(x.movedim(-1, 1))


def stage_windows(
    window_size: WindowSize, *, dims: int, num_stages: int
) -> tuple[tuple[int, ...], ...]:
    """Write out a window size as one side per axis for each stage.

    Raises:
        ValueError: The sides match neither the axes nor the stages, or are not positive.
    """
    if isinstance(window_size, int):
        window_size = (window_size,) * dims
    if all(isinstance(side, int) for side in window_size):
        window_size = (window_size,) * num_stages  # type: ignore[assignment]
    windows = tuple(tuple(window) for window in window_size)  # type: ignore[arg-type]
    if len(windows) != num_stages or any(len(window) != dims for window in windows):
        raise ValueError(
            f"window_size needs {dims} sides, or {num_stages} times {dims}, got {window_size}"
        )
    if any(side < 1 for window in windows for side in window):
        raise ValueError(f"window_size must be positive, got {window_size}")
    return windows


def _chosen(indices: int | Sequence[int] | None, num_stages: int) -> list[int]:
    if indices is None or isinstance(indices, int):
        indices = range(-(num_stages if indices is None else indices), 0)
    if not indices or not all(-num_stages <= index < num_stages for index in indices):
        raise ValueError(f"no such stages in a model of {num_stages}: {list(indices)}")
    return [index % num_stages for index in indices]


def _set_window(attention: WindowAttention, window: tuple[int, ...]) -> None:
    table = attention.relative_position_bias_table
    resized = resize_bias_table(table.detach(), source=attention.window_size, target=window)
    attention.relative_position_bias_table = nn.Parameter(resized, table.requires_grad)
    attention.shift = tuple(side // 2 if any(attention.shift) else 0 for side in window)
    attention.window_size = window


def _initialise(module: nn.Module) -> None:
    """Initialise linear layers as Swin does; convolutions keep torch's default, as published."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
