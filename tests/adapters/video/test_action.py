"""The head's loss against torch's on the whole batch, on one rank and on several."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from adapters.video.action import ActionRecognition, Classes
from adapters.video.towers import VideoClassifier
from tests.unicl.ranks import on_ranks
from unicl.distributed import Ranks
from unicl.errors import UsageError

LABELS = (40, -7, 3)


def batch(rows: slice) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([3, 40, -7, -7, 3, 40, 40])
    return SimpleNamespace(images=images[rows], labels=labels[rows])


def head() -> VideoClassifier:
    """A head on features that are the clips themselves."""
    torch.manual_seed(0)
    return VideoClassifier(nn.Identity(), num_classes=3, width=4, view_dims=1).double()


def whole() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return torch's loss of the whole batch, its gradient, and the share named right."""
    model, all_ = head(), batch(slice(None))
    targets = torch.tensor([LABELS.index(label) for label in all_.labels.tolist()])
    logits = model.logits(all_.images)
    loss = cross_entropy(logits, targets, label_smoothing=0.1)
    loss.backward()
    return loss.detach(), model.head.weight.grad, (logits.argmax(-1) == targets).double().mean()


def own(rows: slice, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    task = ActionRecognition(head(), LABELS, label_smoothing=0.1, ranks=ranks)
    inputs = task.inputs(batch(rows))
    logits = task.encode("image", inputs.towers["image"])
    loss, metrics = task.loss({"image": logits}, inputs.context)
    loss.backward()
    return loss.detach(), task.model.head.weight.grad, metrics["top1"]


def test_the_loss_is_cross_entropy_with_label_smoothing() -> None:
    for found, expected in zip(own(slice(None), Ranks()), whole(), strict=True):
        assert torch.allclose(found.double(), expected.double(), atol=1e-6)


def check_ranks() -> None:
    ranks = Ranks(torch.distributed.group.WORLD)
    # Unequal shares: the first rank has 5 of the 7 clips.
    loss, gradient, top1 = own(slice(0, 5) if ranks.rank == 0 else slice(5, 7), ranks)
    expected_loss, expected_gradient, expected_top1 = whole()
    assert torch.allclose(loss, expected_loss, atol=1e-6)
    assert torch.allclose(ranks.sum_(gradient) / ranks.size, expected_gradient, atol=1e-6)
    assert torch.allclose(top1.double(), expected_top1)


def test_ranks_share_a_batch() -> None:
    on_ranks(2, check_ranks)


def test_labels_become_numbers_of_classes() -> None:
    classes = Classes(LABELS)
    assert classes.of(torch.tensor([3, 40, -7, 3])).tolist() == [2, 0, 1, 2]
    assert classes.of(torch.tensor([], dtype=torch.int64)).tolist() == []
    for stranger in (-8, 5, 41):
        with pytest.raises(UsageError, match="none of the head's classes"):
            classes.of(torch.tensor([3, stranger]))
