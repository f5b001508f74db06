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
from torch.distributed import ProcessGroup

from unicl.distributed import Ranks
from unicl.errors import UsageError


def unicl_loss(
    image_embeddings: Float[Tensor, "images dim"],
    text_embeddings: Float[Tensor, "texts dim"],
    labels: Int[Tensor, "images"],
    scale: float | Float[Tensor, ""],
    *,
    text_labels: Int[Tensor, "texts"] | None = None,
    tile: int = 2048,
    group: ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Return the mean of image-to-text and text-to-image loss, each a mean over its own side.

    An image and a text are positives of each other when their labels are equal; if all labels
    differ this is exactly CLIP's loss. Images without any text of their label leave the
    image-to-text mean but remain negatives for the texts, and the other way round; a side with
    nothing left contributes 0.

    Memory grows with images + texts, not with their product. The logits are fp32, or fp64 if an
    input is, whatever autocast says.

    With a `group`, the batch is what all its ranks hold together, in parts of any size, and every
    rank gets the whole batch's loss. The gradients fit what averages over ranks (DDP, DeepSpeed):
    the embeddings' is that of the whole loss times the number of ranks, the scale's is that of the
    whole loss on every rank. Texts are gathered, images stay; memory per rank grows with all texts.

    Args:
        image_embeddings: Unit-length image embeddings.
        text_embeddings: Unit-length text embeddings.
        labels: Any integers, hashes and negative ones included.
        scale: Multiplies the similarities; as a tensor it gets a gradient.
        text_labels: Labels of the texts; unset means text i has the label of image i.
        tile: Rows and columns of the logits that exist at one time; does not change the result.
        group: The ranks that share the batch, such as `torch.distributed.group.WORLD`; all of them
            must call. Unset means that this process has the whole batch.

    Raises:
        UsageError: Something is of the wrong kind or shape, labels do not fit the embeddings, or a
            batch or a tile is empty.
    """
    ranks = Ranks(group)
    text_labels = labels if text_labels is None else text_labels
    alone = ranks.size == 1  # a rank among others may be left without samples
    _check(image_embeddings, text_embeddings, labels, text_labels, scale, may_be_empty=not alone)
    if not isinstance(tile, Integral) or tile < 1:
        raise UsageError(f"tile must be a positive whole number, got {tile}")
    dtype = _work_dtype(image_embeddings, text_embeddings)
    scale = torch.as_tensor(scale, device=image_embeddings.device)
    # The casts lie outside of the function, so autograd casts the gradients back.
    return _TiledLoss.apply(
        image_embeddings.to(dtype).contiguous(),
        text_embeddings.to(dtype).contiguous(),
        scale.to(dtype),
        _Columns.gather(labels, text_labels, dtype, ranks),
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
    image_embeddings: Any,
    text_embeddings: Any,
    labels: Any,
    text_labels: Any,
    scale: Any,
    *,
    may_be_empty: bool = False,
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
        if embeddings.shape[1] == 0 or (len(embeddings) == 0 and not may_be_empty):
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
class _Columns:
    """The texts of all ranks, and which of them share a label with which images.

    Labels become class numbers; the positives of an image are the texts of its class. Their logits
    enter the loss only as sums, and such a sum is one product with the class's summed embeddings.
    Everything here is linear in the batch; what is as wide as an embedding is kept for the classes
    of this rank's own images only, and all others share one row that stays zero.
    """

    ranks: Ranks
    sizes: list[int]
    """Number of texts of each rank."""
    of_images: Int[Tensor, "images"]
    """Class of each image of this rank."""
    of_texts: Int[Tensor, "all_texts"]
    """Class of each text of all ranks."""
    num_images: Float[Tensor, "classes"]
    num_texts: Float[Tensor, "classes"]
    own: Int[Tensor, "own"]
    """The classes of this rank's images."""
    row_of_class: Int[Tensor, "classes"]
    """Where `own` has a class; the row after its last for all others."""

    @classmethod
    def gather(
        cls, labels: Tensor, text_labels: Tensor, dtype: torch.dtype, ranks: Ranks
    ) -> "_Columns":
        """Number the labels that occur; sorts them, so hashes cost the same as small numbers."""
        counts = ranks.gather_numbers(len(labels), len(text_labels), device=labels.device)
        num_images, sizes = ([int(row[side]) for row in counts] for side in (0, 1))
        all_labels = ranks.gather_rows(labels, num_images)
        all_text_labels = all_labels
        if text_labels is not labels:
            all_text_labels = ranks.gather_rows(text_labels, sizes)
        unique, classes = torch.cat([all_labels, all_text_labels]).unique(return_inverse=True)
        all_images, of_texts = classes.split([len(all_labels), len(all_text_labels)])
        of_images = all_images.split(num_images)[ranks.rank]
        present = torch.zeros_like(unique, dtype=torch.bool)
        present[of_images] = True
        own = present.nonzero()[:, 0]
        row_of_class = torch.where(present, present.cumsum(0) - 1, len(own))
        return cls(
            ranks,
            sizes,
            of_images,
            of_texts,
            all_images.bincount(minlength=len(unique)).to(dtype),
            of_texts.bincount(minlength=len(unique)).to(dtype),
            own,
            row_of_class,
        )

    @property
    def row_of_image(self) -> Int[Tensor, "images"]:
        """Row of each image's class in what the sums return."""
        return self.row_of_class[self.of_images]

    @property
    def row_of_text(self) -> Int[Tensor, "all_texts"]:
        """Row of each text's class in what the sums return."""
        return self.row_of_class[self.of_texts]

    def sum_images(self, images: Tensor, weight: Tensor) -> Float[Tensor, "own_and_rest dim"]:
        """Sum this rank's images per class, times the class's weight."""
        return self._weigh(self._zeros(images).index_add_(0, self.row_of_image, images), weight)

    def sum_texts(self, texts: Tensor, weight: Tensor) -> Float[Tensor, "own_and_rest dim"]:
        """Sum all ranks' texts per class that this rank has images of, times the class's weight."""
        return self._weigh(self._zeros(texts).index_add_(0, self.row_of_text, texts), weight)

    def _zeros(self, embeddings: Tensor) -> Tensor:
        return embeddings.new_zeros(len(self.own) + 1, embeddings.shape[1])

    def _weigh(self, sums: Tensor, weight: Tensor) -> Tensor:
        sums[:-1] *= weight[self.own, None]
        sums[-1] = 0
        return sums

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

    Across ranks each one has its rows and all columns. Rows need nobody else; the columns'
    log-sum-exps are merged in forward, and the columns' gradients go home in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, own_texts: Tensor, scale: Tensor, columns: _Columns, tile: int
    ) -> Tensor:
        """Return the loss and keep what is linear in the batch."""
        ranks = columns.ranks
        texts = ranks.gather_rows(own_texts, columns.sizes)
        with torch.autocast(images.device.type, enabled=False):
            row_sums, column_sums = _sums_of_exps(images, texts, scale, tile)
            row_weight, column_weight = columns.weights()
            means = columns.sum_texts(texts, 1 / columns.num_texts.clamp(min=1))
            row_means = scale * _dot_with_class(images, means, columns.row_of_image, tile)
            del means  # as large as the embeddings
            row_part = _one_side(row_sums, row_means) @ row_weight[columns.of_images]
            # The mean logit of a column's positives differs from column to column, but only its sum
            # over a class enters the loss, and that is the sum of the rows' means.
            class_sums = torch.zeros_like(columns.num_images)
            class_sums.index_add_(0, columns.of_images, row_means)
            row_part, class_sums, column_sums = _merge(ranks, row_part, class_sums, column_sums)
            class_means = class_sums / columns.num_images.clamp(min=1)
            column_part = (
                _one_side(column_sums, class_means[columns.of_texts])
                @ column_weight[columns.of_texts]
            )
        ctx.save_for_backward(images, texts, scale, *row_sums, *column_sums)
        ctx.columns, ctx.tile = columns, tile
        return row_part + column_part

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of images, texts and scale."""
        if torch.is_grad_enabled():  # create_graph=True would get a constant, silently
            raise UsageError("unicl_loss has no second derivative; reference_loss has")
        needs_images, needs_texts, needs_scale, *_ = ctx.needs_input_grad
        images, texts, scale, row_max, row_sum, column_max, column_sum = ctx.saved_tensors
        columns, tile = ctx.columns, ctx.tile
        ranks = columns.ranks
        # d scale = sum_i <images_i, grad_images_i> / scale: no further look at the tiles.
        grad_images = torch.zeros_like(images) if needs_images or needs_scale else None
        grad_texts = torch.zeros_like(texts) if needs_texts else None
        grad_scale = None
        with torch.autocast(images.device.type, enabled=False):
            row_weight, column_weight = columns.weights()
            rows = (row_max, row_weight[columns.of_images] / row_sum)
            factors = (column_max, column_weight[columns.of_texts] / column_sum)
            _add_softmax((images, texts, scale), rows, factors, (grad_images, grad_texts), tile)
            # What one positive pair weighs is the same for all pairs of a class.
            pair = row_weight / columns.num_texts.clamp(min=1)
            pair += column_weight / columns.num_images.clamp(min=1)
            if grad_images is not None:
                sums = columns.sum_texts(texts, pair)
                _subtract_class(grad_images, sums, columns.row_of_image, tile)
                if needs_scale:
                    grad_scale = grad * ranks.sum_(_sum_of_products(images, grad_images, tile))
                grad_images.mul_(ranks.size * scale * grad)
            if grad_texts is not None:
                sums = columns.sum_images(images, pair)
                _subtract_class(grad_texts, sums, columns.row_of_text, tile)
                grad_texts = ranks.scatter_sum(grad_texts, columns.sizes)
                grad_texts.mul_(ranks.size * scale * grad)
        return grad_images if needs_images else None, grad_texts, grad_scale, None, None


def _merge(
    ranks: Ranks, row_part: Tensor, class_sums: Tensor, column_sums: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Sum over the ranks; sums of exponentials are brought to the common maximum first."""
    column_max, column_sum = column_sums
    if ranks.size == 1:
        return row_part, class_sums, column_sums
    maximum = ranks.maximum_(column_max.clone())
    column_sum = column_sum * (column_max - maximum).exp()
    sums = ranks.sum_(torch.cat([row_part[None], class_sums, column_sum]))
    row_part, class_sums, column_sum = sums.split([1, len(class_sums), len(column_sum)])
    return row_part[0], class_sums, (maximum, column_sum)


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


def _dot_with_class(embeddings: Tensor, vectors: Tensor, rows: Tensor, tile: int) -> Tensor:
    """Return each embedding's product with its class's vector; in blocks: the gather is a copy."""
    products = embeddings.new_empty(len(embeddings))
    for block in _blocks(len(embeddings), tile):
        torch.sum(embeddings[block] * vectors[rows[block]], dim=1, out=products[block])
    return products


def _subtract_class(grads: Tensor, sums: Tensor, rows: Tensor, tile: int) -> None:
    for block in _blocks(len(grads), tile):
        grads[block].sub_(sums[rows[block]])


def _sum_of_products(left: Tensor, right: Tensor, tile: int) -> Tensor:
    total = left.new_zeros(())
    for block in _blocks(len(left), tile):
        total += (left[block] * right[block]).sum()
    return total
