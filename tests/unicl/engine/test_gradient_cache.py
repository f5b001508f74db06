"""The gradient cache gives the gradient of the whole batch, dropout included."""

from contextlib import nullcontext

import pytest
import torch

from tests.unicl.engine.toy import ToyLoader, ToyModel, ToyTask
from unicl.engine.gradient_cache import backward


def gradients(task, inputs, chunk):
    task.model.zero_grad()
    torch.manual_seed(5)
    loss, _ = backward(task, inputs, chunk=chunk, autocast=nullcontext)
    return loss, {name: p.grad.clone() for name, p in task.model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 3, 8, 11, 99])
def test_chunks_change_no_gradient(chunk):
    task = ToyTask(ToyModel(dropout=0.0).double())
    batch = ToyLoader(batch_size=11).batch(0)
    inputs = task.inputs(batch)
    inputs.towers.update({name: rows.double() for name, rows in inputs.towers.items()})
    whole_loss, whole = gradients(task, inputs, None)
    loss, cached = gradients(task, inputs, chunk)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
    for name, gradient in whole.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-9, atol=1e-12)


def test_dropout_is_replayed():
    """With dropout, the graph of the second pass must belong to the embeddings of the first.

    The oracle encodes the same chunks under one graph, drawing the same masks in the same order.
    """
    task = ToyTask(ToyModel(dropout=0.5).double())
    inputs = task.inputs(ToyLoader(batch_size=10).batch(0))
    inputs.towers.update({name: rows.double() for name, rows in inputs.towers.items()})
    _, cached = gradients(task, inputs, 4)

    task.model.zero_grad()
    torch.manual_seed(5)
    embeddings = {
        name: torch.cat([task.encode(name, part) for part in rows.split(4)])
        for name, rows in inputs.towers.items()
    }
    task.loss(embeddings, inputs.context)[0].backward()
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(cached[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_generator_ends_where_a_whole_forward_leaves_it():
    task = ToyTask(ToyModel())
    inputs = task.inputs(ToyLoader(batch_size=8).batch(0))
    gradients(task, inputs, 2)
    after = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, rows in inputs.towers.items():
            for part in rows.split(2):
                task.encode(name, part)
    torch.testing.assert_close(after, torch.rand(3), rtol=0, atol=0)


def test_the_scale_gets_its_gradient_once():
    task = ToyTask(ToyModel(dropout=0.0))
    inputs = task.inputs(ToyLoader(batch_size=12).batch(0))
    whole = gradients(task, inputs, None)[1]["logit_scale"]
    cached = gradients(task, inputs, 3)[1]["logit_scale"]
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-8)
    assert whole.abs() > 1e-6
