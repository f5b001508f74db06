"""Checkpoints are complete or absent, and refuse what does not fit."""

import pytest
import torch
from torch import nn

from unicl.engine import checkpoint
from unicl.engine.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_state,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from unicl.errors import UniclError


def model_and_optimizer(width=4):
    model = nn.Linear(3, width)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, step, model=None, optimizer=None):
    if model is None:
        model, optimizer = model_and_optimizer()
    return save_checkpoint(folder, step, model=model, optimizer=optimizer, state={"note": "x"})


def test_round_trip(tmp_path):
    model, optimizer = model_and_optimizer()
    path = save(tmp_path, 3, model, optimizer)
    other, other_optimizer = model_and_optimizer()
    state = load_checkpoint(path, model=other, optimizer=other_optimizer)
    assert state == {"step": 3, "note": "x"}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for kind, value in optimizer.state[p].items():
            assert torch.equal(value, other_optimizer.state[q][kind])


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    names = sorted(path.name for path in save(tmp_path, 1).iterdir())
    assert names == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_another_architecture_is_refused_by_name(tmp_path):
    path = save(tmp_path, 1) / "model.safetensors"
    with pytest.raises(UniclError, match=r"another architecture: weight is \(4, 3\), .*\(5, 3\)"):
        load_weights(path, nn.Linear(3, 5))
    with pytest.raises(UniclError, match=r"another architecture: it has no 0\.weight"):
        load_weights(path, nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(UniclError, match=r"another architecture: the model has no bias"):
        load_weights(path, nn.Linear(3, 4, bias=False))


def test_a_damaged_or_missing_file_is_named(tmp_path):
    path = save(tmp_path, 1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UniclError, match=r"cannot read .*model\.safetensors"):
        load_weights(path, nn.Linear(3, 4))
    path.unlink()
    with pytest.raises(UniclError, match=r"model\.safetensors is missing"):
        load_weights(path, nn.Linear(3, 4))


@pytest.mark.parametrize("text", ["", "{}", "[]", "{"])
def test_a_damaged_state_is_one_line_with_the_way_out(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "state.json").write_text(text)
    with pytest.raises(UniclError, match=r"cannot read .*state\.json: .*; remove .*step-00000001"):
        load_state(path)


def test_a_full_disk_leaves_the_older_checkpoints_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UniclError, match=r"step-00000002: No space left on device; .*repeat"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.partial").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]


def test_pruning_keeps_the_newest_and_the_named(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep_last=2, keep={3})
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "5", "6"]
    assert len(list(tmp_path.iterdir())) == 3
