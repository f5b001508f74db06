"""Checkpoints are complete or absent, and refuse what does not fit."""

import errno
import os
import shutil
import subprocess

import pytest
import torch
from torch import nn

from tests.unicl.engine.toy import ToyTask
from unicl.config import OptimizerConfig
from unicl.distributed import ALONE
from unicl.engine import checkpoint
from unicl.engine.checkpoint import (
    DamagedCheckpointError,
    checkpoints,
    load_moments,
    load_state,
    load_weights,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    sweep,
    verify_checkpoint,
)
from unicl.engine.optimizer import MOMENTS
from unicl.engine.torch_backend import TorchBackend
from unicl.errors import UniclError

SHARD = "optimizer-00001-of-00001.safetensors"


class Task(ToyTask):
    def encode(self, tower, rows):
        return self.model(rows)


def backend_of(width=4):
    """A small model that has done one update."""
    backend = TorchBackend(Task(nn.Linear(3, width)), OptimizerConfig(), ALONE)
    backend.backward(backend.encode({"": torch.ones(1, 3)}, 0)[""].sum())
    backend.step(0.1, norm=1.0)
    return backend


def save(folder, step, backend=None):
    return save_checkpoint(folder, step, backend or backend_of(), {"note": "x"})


def load(path, backend):
    verify_checkpoint(path)
    load_weights(path / "model.safetensors", backend.encoder.model)
    load_moments(path, backend, updates=1)
    return load_state(path)


def load_newest(folder, backend):
    path = newest_checkpoint(folder)
    return path and load(path, backend)


def weight(backend):
    return backend.encoder.model.weight.detach().clone()


def test_round_trip(tmp_path):
    backend, other = backend_of(), backend_of()
    assert load(save(tmp_path, 3, backend), other) == {"step": 3, "note": "x"}
    for name, value in backend.weights().items():
        assert torch.equal(value, other.weights()[name])
    moments, others = backend.moments(backend.sizes), other.moments(other.sizes)
    assert sorted(moments) == [f"{m}:{n}" for m in MOMENTS for n in ("bias", "weight")]
    for name, value in moments.items():
        assert torch.equal(value, others[name])


def test_missing_moments_are_noticed(tmp_path):
    path = save(tmp_path, 1)
    (path / "SHA256SUMS").unlink()
    (path / SHARD).unlink()
    with pytest.raises(DamagedCheckpointError, match="it has no moments of weight"):
        load(path, backend_of())


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    names = sorted(path.name for path in save(tmp_path, 1).iterdir())
    assert names == ["SHA256SUMS", "model.safetensors", SHARD, "state.json"]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_the_digests_are_in_the_format_of_coreutils(tmp_path):
    path = save(tmp_path, 1)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=path, capture_output=True).returncode == 0


def test_another_architecture_is_refused_by_name(tmp_path):
    path = save(tmp_path, 1) / "model.safetensors"
    with pytest.raises(UniclError, match=r"another architecture: weight is \(4, 3\), .*\(5, 3\)"):
        load_weights(path, nn.Linear(3, 5))
    with pytest.raises(UniclError, match=r"another architecture: it has no 0\.weight"):
        load_weights(path, nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(UniclError, match=r"another architecture: the model has no bias"):
        load_weights(path, nn.Linear(3, 4, bias=False))


def overwrite(path):
    """Change bytes in the middle, as a disk might; the size and the format stay."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(byte ^ 1 for byte in data[middle : middle + 8])
    path.write_bytes(data)


DAMAGES = {
    "overwritten": overwrite,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}
FILES = ["model.safetensors", SHARD, "state.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_noticed_before_anything_is_loaded(tmp_path, file, damage):
    backend = backend_of()
    before = weight(backend)
    path = save(tmp_path, 1)
    DAMAGES[damage](path / file)
    with pytest.raises(DamagedCheckpointError, match=f"{file}.*its SHA-256|cannot read {file}"):
        load(path, backend)
    assert torch.equal(weight(backend), before)


@pytest.mark.parametrize("text", ["", "no digest", "0  model.safetensors\n", b"\xff"])
def test_damaged_digests_are_noticed(tmp_path, text):
    backend = backend_of()
    path = save(tmp_path, 1)
    (path / "SHA256SUMS").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DamagedCheckpointError, match="damaged"):
        load(path, backend)


def test_without_digests_a_checkpoint_is_taken_as_it_is(tmp_path, caplog):
    backend = backend_of()
    path = save(tmp_path, 1)
    (path / "SHA256SUMS").unlink()
    assert load(path, backend)["step"] == 1
    assert "has no SHA256SUMS" in caplog.text
    for file in FILES:
        DAMAGES["cut"](path / file)
        with pytest.raises(DamagedCheckpointError, match="damaged"):
            load(path, backend)
        path = save(tmp_path / file, 1)
        (path / "SHA256SUMS").unlink()


def test_what_fails_for_now_is_no_damage(tmp_path, monkeypatch):
    backend = backend_of()
    save(tmp_path, 1)

    def busy(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(checkpoint, "_digest", busy)
    with pytest.raises(UniclError, match="Too many open files; try again"):
        load_newest(tmp_path, backend)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_newest_whole_checkpoint_is_taken(tmp_path, caplog):
    saved = {step: backend_of() for step in (1, 2, 3, 4)}
    for step, backend in saved.items():
        save(tmp_path, step, backend)
    overwrite(tmp_path / "step-00000003" / "model.safetensors")
    (tmp_path / "step-00000004" / "state.json").unlink()
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000006").touch()
    backend = backend_of()
    state = load_newest(tmp_path, backend)
    assert state["step"] == 2
    assert torch.equal(weight(backend), weight(saved[2]))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    assert sum("set aside, going on from step-00000002" in line for line in caplog.messages) == 4
    # Their steps can be written, and damaged, again.
    for _ in range(2):
        overwrite(save(tmp_path, 3) / "model.safetensors")
        assert load_newest(tmp_path, backend)["step"] == 2


def test_without_a_whole_checkpoint_nothing_is_touched(tmp_path):
    for step in (1, 2):
        overwrite(save(tmp_path, step) / "model.safetensors")
    backend = backend_of()
    with pytest.raises(UniclError, match=r"no checkpoint in .* is whole \(.*2/model\.safe.*remove"):
        load_newest(tmp_path, backend)
    assert len(checkpoints(tmp_path)) == 2
    assert load_newest(tmp_path / "none", backend) is None


def test_a_full_disk_leaves_the_older_checkpoints_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UniclError, match=r"step-00000002: No space left on device; .*repeat"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / ".step-00000000.removed" / "half").mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_pruning_keeps_the_newest_and_the_named(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep_last=2, keep={3})
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "5", "6"]
    assert len(list(tmp_path.iterdir())) == 3
