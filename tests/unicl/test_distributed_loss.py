"""The loss across ranks equals the dense loss of the whole batch, value and gradients."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.unicl.ranks import on_ranks
from tests.unicl.test_loss import LABELS, problem
from unicl.loss import reference_loss, unicl_loss

SHARES = {
    1: [[7]],
    2: [[6, 6], [13, 16], [0, 5]],
    3: [[4, 4, 4], [2, 0, 9]],
    4: [[5, 5, 5, 5], [13, 16, 19, 22], [0, 1, 0, 3]],
}


@pytest.mark.slow
def test_ranks_change_neither_loss_nor_gradients():
    on_ranks(4, compare_with_the_whole_batch)


def compare_with_the_whole_batch():
    for size, shares in SHARES.items():
        group = dist.new_group(list(range(size)))
        if dist.get_rank() >= size:
            continue
        for share, kind, tile, more_texts in itertools.product(
            shares, LABELS, (1, 3, 64), (False, True)
        ):
            texts = [count + more_texts for count in share]
            check(group, kind, tile, share, texts, torch.float64, 1e-12)
        check(group, "random", 4, shares[-1], shares[-1], torch.float32, 2e-6)


def check(group, kind, tile, num_images, num_texts, dtype, tolerance):
    """Compare this rank's part with autograd through the dense loss, averaged as DDP does."""
    rank, size = group.rank(), group.size()
    u, v, labels, scale, text_labels = problem(sum(num_images), sum(num_texts), kind, dtype)
    if num_images == num_texts:  # the shared labels of pairs
        text_labels = labels
    whole = reference_loss(u, v, labels, scale, text_labels=text_labels)
    whole_u, whole_v, whole_scale = torch.autograd.grad(whole, (u, v, scale))
    mine = [torch.arange(sum(n)).split(n)[rank] for n in (num_images, num_texts)]
    parts = [x[rows].detach().requires_grad_() for x, rows in zip((u, v), mine, strict=True)]
    loss = unicl_loss(
        parts[0],
        parts[1],
        labels[mine[0]],
        scale,
        text_labels=text_labels[mine[1]] if num_images != num_texts else None,
        tile=tile,
        group=group,
    )
    own_u, own_v, own_scale = torch.autograd.grad(3 * loss, (*parts, scale))
    close = {"rtol": tolerance, "atol": tolerance, "msg": f"{kind} {tile} {num_images}"}
    torch.testing.assert_close(loss, whole, **close)
    torch.testing.assert_close(own_u, 3 * size * whole_u[mine[0]], **close)
    torch.testing.assert_close(own_v, 3 * size * whole_v[mine[1]], **close)
    torch.testing.assert_close(own_scale, 3 * whole_scale, **close)
