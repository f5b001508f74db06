import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unicl.errors import UsageError
from unicl.loss import _check, reference_loss, unicl_loss

LABELS = ("unique", "random", "same", "no match")
INT64 = torch.iinfo(torch.int64)


def problem(images, texts, kind, dtype=torch.float64, dim=6, seed=0):
    """Embeddings that require gradients, a scale that does, and both sides' labels."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        normalize(torch.randn(n, dim, generator=generator, dtype=dtype), dim=1).requires_grad_()
        for n in (images, texts)
    )
    scale = torch.tensor(9.0, dtype=dtype, requires_grad=True)
    if kind == "unique":
        pool = torch.randperm(max(images, texts), generator=generator) - 3
        labels, text_labels = pool[:images], pool[:texts]
    elif kind == "random":
        # Far apart and of both signs, as hashes are; some occur on one side only.
        values = torch.tensor([INT64.min, -(2**40), -1, 0, 2**40 + 1, INT64.max])
        labels = values[torch.randint(0, 5, (images,), generator=generator)]
        text_labels = values[torch.randint(1, 6, (texts,), generator=generator)]
    else:
        labels = torch.zeros(images, dtype=torch.int64)
        text_labels = torch.full((texts,), int(kind == "no match"))
    return u, v, labels, scale, text_labels


def loss_and_gradients(loss, u, v, labels, scale, text_labels, **options):
    value = loss(u, v, labels, scale, text_labels=text_labels, **options)
    return value.detach(), *torch.autograd.grad(value, (u, v, scale))


def plain_loops(u, v, labels, scale, text_labels):
    """Equations 2 and 3 term by term, sharing nothing with the package."""

    def direction(queries, keys, query_labels, key_labels):
        terms = []
        for query, label in zip(queries, query_labels, strict=True):
            logs = torch.stack([scale * query @ key for key in keys])
            logs = logs - torch.logsumexp(logs, 0)
            chosen = [log for log, other in zip(logs, key_labels, strict=True) if other == label]
            if chosen:
                terms.append(-sum(chosen) / len(chosen))
        return sum(terms) / len(terms) if terms else torch.zeros((), dtype=u.dtype)

    return (direction(u, v, labels, text_labels) + direction(v, u, text_labels, labels)) / 2


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("texts", [7, 4])
def test_reference_is_the_papers_formula(kind, texts):
    arguments = problem(7, texts, kind)
    torch.testing.assert_close(
        reference_loss(*arguments[:4], text_labels=arguments[4]), plain_loops(*arguments)
    )


@pytest.mark.parametrize("tile", [64, 5, 1])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(("images", "texts"), [(13, 13), (13, 9), (8, 17)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_tiles_agree_with_the_dense_loss(tile, kind, images, texts, dtype, bound):
    arguments = problem(images, texts, kind, dtype)
    tiled = loss_and_gradients(unicl_loss, *arguments, tile=tile)
    dense = loss_and_gradients(reference_loss, *arguments)
    for ours, theirs in zip(tiled, dense, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= bound * max(theirs.norm(), 1)


@given(
    labels=st.lists(st.integers(INT64.min, INT64.max) | st.integers(0, 3), min_size=1, max_size=9),
    text_labels=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    tile=st.integers(1, 10),
)
@settings(max_examples=60, deadline=None)
def test_any_labels_agree_with_the_dense_loss(labels, text_labels, tile):
    u, v, _, scale, _ = problem(len(labels), len(text_labels), "same")
    arguments = (u, v, torch.tensor(labels), scale, torch.tensor(text_labels))
    tiled = loss_and_gradients(unicl_loss, *arguments, tile=tile)
    for ours, theirs in zip(tiled, loss_and_gradients(reference_loss, *arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", LABELS)
def test_gradcheck(kind):
    u, v, labels, scale, text_labels = problem(5, 4, kind, dim=3)

    def loss(u, v, scale):
        return unicl_loss(u, v, labels, scale, text_labels=text_labels, tile=2)

    assert torch.autograd.gradcheck(loss, (u, v, scale))


def test_distinct_labels_give_the_clip_loss():
    u, v, labels, scale, _ = problem(12, 12, "unique", torch.float32)
    ours = unicl_loss(u, v, labels, scale, tile=5)
    theirs = ClipLoss()(u, v, scale)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (u, v, scale)),
        torch.autograd.grad(theirs, (u, v, scale)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_batch_of_one_label_cannot_fall_below_the_logarithm_of_its_size():
    u = normalize(torch.ones(8, 4), dim=1)
    loss = unicl_loss(u, u, torch.full((8,), -7), 100.0)
    torch.testing.assert_close(loss, torch.tensor(8.0).log())


@pytest.mark.parametrize("sign", [1, -1])
def test_scale_100_does_not_overflow(sign):
    u = normalize(torch.randn(6, 4), dim=1).requires_grad_()
    v = (sign * u).detach().requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    labels = torch.arange(6)
    tiled = loss_and_gradients(unicl_loss, u, v, labels, scale, labels, tile=4)
    dense = loss_and_gradients(reference_loss, u, v, labels, scale, labels)
    for ours, theirs in zip(tiled, dense, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_any_match_loss_and_gradients_are_zero():
    value, *gradients = loss_and_gradients(unicl_loss, *problem(5, 4, "no match"))
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


def test_images_without_a_text_are_negatives_only():
    u, v, _, scale, _ = problem(4, 3, "same")
    alone = unicl_loss(u, v, torch.tensor([0, 1, 2, 9]), scale, text_labels=torch.arange(3))
    logits = scale * u @ v.T
    rows = torch.nn.functional.cross_entropy(logits[:3], torch.arange(3))
    columns = torch.nn.functional.cross_entropy(logits.T, torch.arange(3))
    torch.testing.assert_close(alone, (rows + columns) / 2)


def test_saved_memory_is_linear_in_the_batch():
    def saved_elements(batch):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        u, v, labels, scale, _ = problem(batch, batch, "random", torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unicl_loss(u, v, labels, scale, text_labels=labels, tile=16).backward()
        return sum(sizes)

    small, large = saved_elements(64), saved_elements(256)
    assert small > 0
    assert large <= 4 * small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_get_fp32_logits(dtype):
    u, v, labels, scale, text_labels = problem(9, 9, "random", torch.float32)
    half = [x.detach().to(dtype).requires_grad_() for x in (u, v)]
    exact = [x.detach().float().requires_grad_() for x in half]
    scale = scale.detach().clone().fill_(100.0).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = unicl_loss(*half, labels, scale, text_labels=text_labels, tile=4)
    expected = reference_loss(*exact, labels, scale, text_labels=text_labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(value, half)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs.to(dtype))


def test_upstream_gradient_of_any_sign():
    arguments = problem(7, 7, "random")
    u, v, labels, scale, text_labels = arguments
    _, *plain = loss_and_gradients(unicl_loss, *arguments)
    value = unicl_loss(u, v, labels, scale, text_labels=text_labels) * -2.5
    for ours, theirs in zip(torch.autograd.grad(value, (u, v, scale)), plain, strict=True):
        torch.testing.assert_close(ours, -2.5 * theirs)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_one_input_requires_a_gradient(wanted):
    u, v, labels, scale, text_labels = problem(6, 6, "random")
    _, *full = loss_and_gradients(unicl_loss, u, v, labels, scale, text_labels)
    inputs = [x.detach() for x in (u, v, scale)]
    inputs[wanted].requires_grad_()
    u, v, scale = inputs
    unicl_loss(u, v, labels, scale, text_labels=text_labels, tile=4).backward()
    torch.testing.assert_close(inputs[wanted].grad, full[wanted])
    assert [x.grad is None for x in inputs].count(False) == 1


def test_scale_may_be_a_number():
    u, v, labels, scale, _ = problem(5, 5, "unique")
    torch.testing.assert_close(unicl_loss(u, v, labels, 9.0), unicl_loss(u, v, labels, scale))
    assert not unicl_loss(u.detach(), v.detach(), labels, 9.0).requires_grad


def test_second_derivative_is_refused():
    u, v, labels, scale, _ = problem(3, 3, "unique")
    with pytest.raises(UsageError, match="no second derivative; reference_loss has"):
        torch.autograd.grad(unicl_loss(u, v, labels, scale), u, create_graph=True)


def test_nan_is_not_hidden():
    u, v, labels, scale, _ = problem(4, 4, "unique")
    u = u.detach().clone().index_fill_(0, torch.tensor([2]), torch.nan)
    assert unicl_loss(u, v, labels, scale, tile=3).isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_labels": None}, "one label per text embedding, got 3 labels for 2"),
        ({"tile": 0}, "tile must be a positive whole number, got 0"),
    ],
)
def test_misuse_is_one_line(change, message):
    u, v = torch.eye(4)[:3], torch.eye(4)[:2]
    options = {"text_labels": torch.arange(2)} | change
    with pytest.raises(UsageError, match=message):
        unicl_loss(u, v, torch.arange(3), 1.0, **options)


EYE, THREE = torch.eye(4)[:3], torch.arange(3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((EYE.numpy(), EYE, THREE, THREE, 1.0), "image_embeddings must be .* got ndarray"),
        ((EYE, EYE[0], THREE, THREE, 1.0), r"text_embeddings must be .* float32 of shape \[4\]"),
        ((EYE, EYE.long(), THREE, THREE, 1.0), "text_embeddings must be .* got int64"),
        ((EYE * 1j, EYE, THREE, THREE, 1.0), "image_embeddings must be .* got complex64"),
        ((EYE, EYE[:, :2], THREE, THREE, 1.0), "one width, got 4 and 2"),
        ((EYE[:, :0], EYE, THREE, THREE, 1.0), r"at least one image embedding, .*\[3, 0\]"),
        ((EYE, EYE, [0, 1, 2], THREE, 1.0), "labels must be .* one per image, got list"),
        ((EYE, EYE, None, None, 1.0), "labels must be .* got NoneType"),
        ((EYE, EYE, THREE.float(), THREE, 1.0), "labels must be .* got float32"),
        ((EYE, EYE, THREE, THREE > 1, 1.0), "labels must be .* one per text, got bool"),
        ((EYE, EYE, THREE[:, None], THREE, 1.0), r"labels must be .* of shape \[3, 1\]"),
        ((EYE, EYE, THREE, THREE, None), "scale must be a number .* got NoneType"),
        ((EYE, EYE, THREE, THREE, "1"), "scale must be a number .* got str"),
        ((EYE, EYE, THREE, THREE, torch.ones(3)), r"scale must be .* of shape \[3\]"),
    ],
)
def test_inputs_of_the_wrong_kind_are_named(inputs, message):
    # Called alone, for the suite's type checks would refuse these earlier, with other words.
    with pytest.raises(UsageError, match=message):
        _check(*inputs)


def test_empty_batch_is_refused():
    with pytest.raises(UsageError, match="at least one image embedding"):
        unicl_loss(torch.ones(0, 4), torch.ones(0, 4), torch.arange(0), 1.0)


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", LABELS)
def test_no_tensor_is_larger_than_the_embeddings_or_two_tiles(kind):
    u, v, labels, scale, text_labels = problem(256, 192, kind, torch.float32)
    with Largest() as largest:
        unicl_loss(u, v, labels, scale, text_labels=text_labels, tile=32).backward()
    assert 2 * 32 * 32 <= largest.elements <= (256 + 192) * 6
