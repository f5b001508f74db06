"""The gradient cache gives the gradient of the whole batch, dropout included."""

import dataclasses

import pytest
import torch

from tests.unicl.engine.toy import ToyLoader, ToyModel, ToyTask
from unicl.config import OptimizerConfig
from unicl.data.order import mix
from unicl.distributed import ALONE
from unicl.engine.gradient_cache import backward, num_chunks
from unicl.engine.torch_backend import TorchBackend


def problem(rows, dropout):
    task = ToyTask(ToyModel(dropout=dropout).double())
    inputs = task.inputs(ToyLoader(batch_size=rows).batch(0))
    return task, dataclasses.replace(
        inputs, towers={name: rows.double() for name, rows in inputs.towers.items()}
    )


def gradients(task, inputs, chunks):
    task.model.zero_grad()
    backend = TorchBackend(task, OptimizerConfig(), ALONE)
    loss, _ = backward(task, backend, inputs, chunks=chunks, seed=5)
    return loss, {name: p.grad.clone() for name, p in task.model.named_parameters()}


@pytest.mark.parametrize("chunks", [2, 3, 11, 14])
def test_chunks_change_no_gradient(chunks):
    task, inputs = problem(11, dropout=0.0)
    whole_loss, whole = gradients(task, inputs, 1)
    loss, cached = gradients(task, inputs, chunks)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
    for name, gradient in whole.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-9, atol=1e-12)
    assert whole["logit_scale"].abs() > 1e-6


@pytest.mark.parametrize("chunks", [2, 5, 13])
def test_a_tower_of_several_tensors_is_cut_sample_by_sample(chunks):
    class Halved(ToyTask):
        """Takes the left tower's input in two parts, as an image and its question."""

        def encode(self, tower, rows):
            rows = torch.cat([rows["one"], rows["other"]], 1) if tower == "left" else rows
            return super().encode(tower, rows)

    task, inputs = problem(11, dropout=0.0)
    whole_loss, whole = gradients(task, inputs, 1)
    one, other = inputs.towers["left"].split([2, 4], 1)
    halved = {**inputs.towers, "left": {"one": one, "other": other}}
    inputs = dataclasses.replace(inputs, towers=halved).to(torch.device("cpu"))
    for count in (1, chunks):
        loss, found = gradients(Halved(task.model), inputs, count)
        torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "chunk", "expected"), [(7, None, 1), (7, 7, 1), (8, 7, 2), (96, 32, 3), (0, 4, 1)]
)
def test_number_of_chunks(rows, chunk, expected):
    assert num_chunks(rows, chunk) == expected


def test_no_chunk_has_more_rows_than_allowed():
    for rows in range(1, 60):
        for chunk in range(1, 20):
            count = num_chunks(rows, chunk)
            assert max(len(part) for part in torch.zeros(rows).tensor_split(count)) <= chunk


def test_dropout_is_replayed():
    """With dropout, the graph of the second pass must belong to the embeddings of the first.

    The oracle encodes the same chunks under one graph, drawing the same masks.
    """
    task, inputs = problem(10, dropout=0.5)
    _, cached = gradients(task, inputs, 3)

    task.model.zero_grad()
    encoder = TorchBackend(task, OptimizerConfig(), ALONE).encoder
    towers = {name: rows for name, rows in inputs.towers.items() if name != "scale"}
    encoded = []
    for part in range(3):
        rows = {name: rows.tensor_split(3)[part] for name, rows in towers.items()}
        encoded.append(encoder(rows, mix(5, part)))
    embeddings = {name: torch.cat([rows[name] for rows in encoded]) for name in towers}
    embeddings["scale"] = task.encode("scale", inputs.towers["scale"])
    task.loss(embeddings, inputs.context)[0].backward()
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(cached[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_towers_and_chunks_draw_different_masks():
    task, _ = problem(10, dropout=0.5)
    encoder = TorchBackend(task, OptimizerConfig(), ALONE).encoder
    task.model.right.load_state_dict(task.model.left.state_dict())
    rows = torch.ones(1, 6, dtype=torch.float64)
    first, second = (encoder({"left": rows, "right": rows}, mix(5, part)) for part in range(2))
    assert not torch.equal(first["left"], first["right"])
    assert not torch.equal(first["left"], second["left"])


def test_a_frozen_tower_is_encoded_once():
    task, inputs = problem(9, dropout=0.0)
    _, whole = gradients(task, inputs, 1)
    for parameter in task.model.left.parameters():
        parameter.requires_grad_(False)
    calls = []
    encode = task.encode
    task.encode = lambda tower, rows: calls.append(tower) or encode(tower, rows)
    task.model.zero_grad()
    backend = TorchBackend(task, OptimizerConfig(), ALONE)
    inputs = dataclasses.replace(inputs, frozen=frozenset({"left"}))
    backward(task, backend, inputs, chunks=3)
    assert (calls.count("left"), calls.count("right")) == (3, 6)
    for name, parameter in task.model.named_parameters():
        if name.startswith("left"):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-9, atol=1e-12)
