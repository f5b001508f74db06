"""The bidirectional supervised contrastive loss of UniCL (Florence, section 2.2, equations 1 to 3).

`unicl_loss` computes it in tiles and never holds a batch x batch matrix; `reference_loss` is the
same loss written out densely, for tests and for reading.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicl.errors import UsageError


def unicl_loss(
    image_embeddings: Float[Tensor, "images dim"],
    text_embeddings: Float[Tensor, "texts dim"],
    labels: Int[Tensor, "images"],
    scale: float | Float[Tensor, ""],
    *,
    text_labels: Int[Tensor, "texts"] | None = None,
    tile: int = 2048,
) -> Float[Tensor, ""]:
    """Return the mean of image-to-text and text-to-image loss, each a mean over its own side.

    An image and a text are positives of each other when their labels are equal; if all labels
    differ this is exactly CLIP's loss. Images without any text of their label leave the
    image-to-text mean but remain negatives for the texts, and the other way round; a side with
    nothing left contributes 0.

    Memory grows with images + texts, not with their product. The logits are fp32, or fp64 if an
    input is, whatever autocast says.

    Args:
        image_embeddings: Unit-length image embeddings.
        text_embeddings: Unit-length text embeddings.
        labels: Any integers, hashes and negative ones included.
        scale: Multiplies the similarities; as a tensor it gets a gradient.
        text_labels: Labels of the texts; unset means text i has the label of image i.
        tile: Rows and columns of the logits that exist at one time; does not change the result.

    Raises:
        UsageError: Something is of the wrong kind or shape, labels do not fit the embeddings, or a
            batch or a tile is empty.
    """
    text_labels = labels if text_labels is None else text_labels
    _check(image_embeddings, text_embeddings, labels, text_labels, scale)
    if not isinstance(tile, Integral) or tile < 1:
        raise UsageError(f"tile must be a positive whole number, got {tile}")
    dtype = _work_dtype(image_embeddings, text_embeddings)
    scale = torch.as_tensor(scale, device=image_embeddings.device)
    # The casts lie outside of the function, so autograd casts the gradients back.
    return _TiledLoss.apply(
        image_embeddings.to(dtype).contiguous(),
        text_embeddings.to(dtype).contiguous(),
        scale.to(dtype),
        _Classes.match(labels, text_labels, dtype),
        tile,
    )


def reference_loss(
    image_embeddings: Float[Tensor, "images dim"],
    text_embeddings: Float[Tensor, "texts dim"],
    labels: Int[Tensor, "images"],
    scale: float | Float[Tensor, ""],
    *,
    text_labels: Int[Tensor, "texts"] | None = None,
    tile: int = 2048,
) -> Float[Tensor, ""]:
    """Compute `unicl_loss` as the paper prints it, with dense logits; `tile` is ignored."""
    text_labels = labels if text_labels is None else text_labels
    _check(image_embeddings, text_embeddings, labels, text_labels, scale)
    dtype = _work_dtype(image_embeddings, text_embeddings)
    with torch.autocast(image_embeddings.device.type, enabled=False):
        logits = scale * image_embeddings.to(dtype) @ text_embeddings.to(dtype).T
    positives = labels[:, None] == text_labels[None, :]
    image_to_text = _one_direction(logits, positives)  # equation 2
    text_to_image = _one_direction(logits.T, positives.T)  # equation 3
    return (image_to_text + text_to_image) / 2  # equation 1, as a mean of means


def _one_direction(logits: Tensor, positives: Tensor) -> Tensor:
    counts = positives.sum(dim=1)
    mean_of_logs = (logits.log_softmax(dim=1) * positives).sum(dim=1) / counts.clamp(min=1)
    return -mean_of_logs.sum() / (counts > 0).sum().clamp(min=1)


def _work_dtype(image_embeddings: Tensor, text_embeddings: Tensor) -> torch.dtype:
    return torch.promote_types(
        torch.promote_types(image_embeddings.dtype, text_embeddings.dtype), torch.float32
    )


def _check(
    image_embeddings: Any, text_embeddings: Any, labels: Any, text_labels: Any, scale: Any
) -> None:
    """Say what is wrong with a caller's inputs; their values, which a GPU holds, are not read."""
    for side, embeddings, given in (
        ("image", image_embeddings, labels),
        ("text", text_embeddings, text_labels),
    ):
        if not _is_tensor(embeddings, ndim=2, floating=True):
            raise UsageError(
                f"{side}_embeddings must be a tensor [{side}s, dim] of floats, {_got(embeddings)}"
            )
        if not _is_tensor(given, ndim=1, floating=False):
            raise UsageError(f"labels must be tensors of integers, one per {side}, {_got(given)}")
        if embeddings.numel() == 0:
            raise UsageError(f"the loss needs at least one {side} embedding, {_got(embeddings)}")
        if len(embeddings) != len(given):
            raise UsageError(
                f"the loss needs one label per {side} embedding, "
                f"got {len(given)} labels for {len(embeddings)} embeddings"
            )
    if image_embeddings.shape[1] != text_embeddings.shape[1]:
        raise UsageError(
            f"image and text embeddings must have one width, "
            f"got {image_embeddings.shape[1]} and {text_embeddings.shape[1]}"
        )
    if not (isinstance(scale, Real) or _is_tensor(scale, ndim=0, floating=True)):
        raise UsageError(f"scale must be a number or a float tensor without axes, {_got(scale)}")


def _is_tensor(value: Any, *, ndim: int, floating: bool) -> bool:
    if not isinstance(value, Tensor) or value.ndim != ndim or value.dtype == torch.bool:
        return False
    return value.is_floating_point() == floating and not value.is_complex()


def _got(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"got {type(value).__name__}"
    return f"got {str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"


@dataclass(frozen=True)
class _Classes:
    """Which images and texts share a label, in memory linear in both.

    Labels become class numbers; the positives of an image are the texts of its class. Their logits
    enter the loss only as sums, and such a sum is one product with the class's summed embeddings.
    """

    of_images: Int[Tensor, "images"]
    of_texts: Int[Tensor, "texts"]
    num_images: Float[Tensor, "classes"]
    num_texts: Float[Tensor, "classes"]

    @classmethod
    def match(cls, labels: Tensor, text_labels: Tensor, dtype: torch.dtype) -> "_Classes":
        """Number the labels that occur; sorts them, so hashes cost the same as small numbers."""
        unique, classes = torch.cat([labels, text_labels]).unique(return_inverse=True)
        of_images, of_texts = classes.split([len(labels), len(text_labels)])
        return cls(
            of_images,
            of_texts,
            of_images.bincount(minlength=len(unique)).to(dtype),
            of_texts.bincount(minlength=len(unique)).to(dtype),
        )

    def sum_images(self, embeddings: Float[Tensor, "images dim"]) -> Float[Tensor, "classes dim"]:
        """Sum the image embeddings of each class."""
        sums = embeddings.new_zeros(len(self.num_images), embeddings.shape[1])
        return sums.index_add_(0, self.of_images, embeddings)

    def sum_texts(self, embeddings: Float[Tensor, "texts dim"]) -> Float[Tensor, "classes dim"]:
        """Sum the text embeddings of each class."""
        sums = embeddings.new_zeros(len(self.num_texts), embeddings.shape[1])
        return sums.index_add_(0, self.of_texts, embeddings)

    def weights(self) -> tuple[Float[Tensor, "classes"], Float[Tensor, "classes"]]:
        """Return the weight of an image and of a text: 1 / (2 * number that have a positive)."""
        matched = (self.num_images > 0) & (self.num_texts > 0)
        return (
            matched / (2 * (self.num_images * matched).sum().clamp(min=1)),
            matched / (2 * (self.num_texts * matched).sum().clamp(min=1)),
        )


class _TiledLoss(torch.autograd.Function):
    """Loss and gradient without the matrix of logits: two passes over its tiles.

    With logits S = scale * images @ texts.T, with w and w' the weights of rows and columns, and
    with n and n' their numbers of positives:

        loss        = sum_i w_i (lse_i - mean of S over i's positives) + the same over columns
        dloss/dS_ij = w_i exp(S_ij - lse_i) + w'_j exp(S_ij - lse'_j)
                      - (w_i / n_i + w'_j / n'_j if j is a positive of i)

    Forward finds the log-sum-exps of rows and columns in one pass, backward recomputes S.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, classes: _Classes, tile: int
    ) -> Tensor:
        """Return the loss and keep what is linear in the batch."""
        with torch.autocast(images.device.type, enabled=False):
            rows, columns = _sums_of_exps(images, texts, scale, tile)
            row_weight, column_weight = classes.weights()
            text_means = classes.sum_texts(texts).div_(classes.num_texts.clamp(min=1)[:, None])
            row_means = scale * _dot_with_class(images, text_means, classes.of_images, tile)
            del text_means  # as large as the embeddings
            image_means = classes.sum_images(images).div_(classes.num_images.clamp(min=1)[:, None])
            column_means = scale * _dot_with_class(texts, image_means, classes.of_texts, tile)
            row_part = _one_side(rows, row_means) @ row_weight[classes.of_images]
            column_part = _one_side(columns, column_means) @ column_weight[classes.of_texts]
        ctx.save_for_backward(images, texts, scale, *rows, *columns)
        ctx.classes, ctx.tile = classes, tile
        return row_part + column_part

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of images, texts and scale."""
        if torch.is_grad_enabled():  # create_graph=True would get a constant, silently
            raise UsageError("unicl_loss has no second derivative; reference_loss has")
        needs_images, needs_texts, needs_scale, *_ = ctx.needs_input_grad
        images, texts, scale, row_max, row_sum, column_max, column_sum = ctx.saved_tensors
        classes, tile = ctx.classes, ctx.tile
        # d scale = sum_i <images_i, grad_images_i> / scale: no further look at the tiles.
        grad_images = torch.zeros_like(images) if needs_images or needs_scale else None
        grad_texts = torch.zeros_like(texts) if needs_texts else None
        grad_scale = None
        with torch.autocast(images.device.type, enabled=False):
            row_weight, column_weight = classes.weights()
            rows = (row_max, row_weight[classes.of_images] / row_sum)
            columns = (column_max, column_weight[classes.of_texts] / column_sum)
            _add_softmax((images, texts, scale), rows, columns, (grad_images, grad_texts), tile)
            # What one positive pair weighs is the same for all pairs of a class.
            pair = row_weight / classes.num_texts.clamp(min=1)
            pair += column_weight / classes.num_images.clamp(min=1)
            if grad_images is not None:
                sums = classes.sum_texts(texts).mul_(pair[:, None])
                _subtract_class(grad_images, sums, classes.of_images, tile)
                if needs_scale:
                    grad_scale = grad * _sum_of_products(images, grad_images, tile)
                grad_images.mul_(scale * grad)
            if grad_texts is not None:
                sums = classes.sum_images(images).mul_(pair[:, None])
                _subtract_class(grad_texts, sums, classes.of_texts, tile)
                grad_texts.mul_(scale * grad)
        return grad_images if needs_images else None, grad_texts, grad_scale, None, None


def _blocks(length: int, tile: int) -> Iterator[slice]:
    for start in range(0, length, tile):
        yield slice(start, min(start + tile, length))


def _tiles(
    images: Tensor, texts: Tensor, scale: Tensor, tile: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield rows, columns, their logits and a spare buffer; the next tile overwrites both."""
    size = min(tile, len(images)) * min(tile, len(texts))
    buffer, spare = images.new_empty(2, size)
    for rows in _blocks(len(images), tile):
        # Scaling a block of images costs less than scaling its logits.
        scaled = images[rows] * scale
        for columns in _blocks(len(texts), tile):
            block = texts[columns]
            shape = (len(scaled), len(block))
            logits = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(scaled, block.T, out=logits)
            yield rows, columns, logits, spare[: logits.numel()].view(shape)


def _sums_of_exps(
    images: Tensor, texts: Tensor, scale: Tensor, tile: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Find (maximum, sum of exp(logit - maximum)) of every row and of every column.

    The pair stays apart: their log-sum-exp, rounded to fp32, would cost two digits at scale 100.
    """
    row_max, column_max = (images.new_full((len(x),), -torch.inf) for x in (images, texts))
    row_sum, column_sum = torch.zeros_like(row_max), torch.zeros_like(column_max)
    for rows, columns, logits, spare in _tiles(images, texts, scale, tile):
        _add_exps(logits, spare, 1, row_max[rows], row_sum[rows])
        _add_exps(logits, spare, 0, column_max[columns], column_sum[columns])
    return (row_max, row_sum), (column_max, column_sum)


def _add_exps(
    logits: Tensor, spare: Tensor, dim: int, running_max: Tensor, running_sum: Tensor
) -> None:
    """Update the running maximum and sum of exponentials, both in place, by one tile."""
    maximum = torch.maximum(running_max, logits.amax(dim))
    torch.sub(logits, maximum.unsqueeze(dim), out=spare).exp_()
    running_sum.mul_((running_max - maximum).exp_()).add_(spare.sum(dim))
    running_max.copy_(maximum)


def _one_side(sums_of_exps: tuple[Tensor, Tensor], mean_of_positives: Tensor) -> Tensor:
    """Return lse - mean of the positive logits, per row or per column."""
    maximum, total = sums_of_exps
    return (maximum - mean_of_positives) + total.log()


def _add_softmax(
    inputs: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    tile: int,
) -> None:
    """Add the products with the softmax part of dloss/dS to the gradients of images and texts.

    Rows and columns come as (maximum, weight / sum of exponentials).
    """
    (images, texts, _), (grad_images, grad_texts) = inputs, grads
    (row_max, row_factor), (column_max, column_factor) = rows, columns
    for i, j, logits, spare in _tiles(*inputs, tile):
        torch.sub(logits, row_max[i, None], out=spare).exp_().mul_(row_factor[i, None])
        spare.addcmul_(logits.sub_(column_max[j]).exp_(), column_factor[j])
        if grad_images is not None:
            grad_images[i].addmm_(spare, texts[j])
        if grad_texts is not None:
            grad_texts[j].addmm_(spare.T, images[i])


def _dot_with_class(embeddings: Tensor, vectors: Tensor, classes: Tensor, tile: int) -> Tensor:
    """Return each embedding's product with its class's vector; in blocks: the gather is a copy."""
    blocks = _blocks(len(embeddings), tile)
    return torch.cat([(embeddings[b] * vectors[classes[b]]).sum(dim=1) for b in blocks])


def _subtract_class(grads: Tensor, sums: Tensor, classes: Tensor, tile: int) -> None:
    for block in _blocks(len(grads), tile):
        grads[block].sub_(sums[classes[block]])


def _sum_of_products(left: Tensor, right: Tensor, tile: int) -> Tensor:
    blocks = _blocks(len(left), tile)
    return torch.stack([(left[b] * right[b]).sum() for b in blocks]).sum()
