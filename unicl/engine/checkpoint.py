"""Checkpoints: folders of safetensors and JSON, complete or absent, and nothing to unpickle.

    checkpoints/step-00000500/
        model.safetensors       the weights, all that is needed to use the model
        optimizer.safetensors   the moments, by parameter name
        state.json              step, position in the data, running means, best metric
        SHA256SUMS              of the three files, as `sha256sum -c` reads them

A checkpoint is written beside its final name, flushed to disk and renamed, so that a run killed
at any instant finds either the whole of it or the one before. What a disk damages later, the
digests tell.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unicl.errors import UniclError

logger = logging.getLogger("unicl")

_NAME = re.compile(r"step-(\d{8})")
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_SUMS = "SHA256SUMS"


class DamagedCheckpointError(UniclError):
    """A checkpoint is not as it was written."""


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of a step atomically and return its folder.

    Raises:
        UniclError: the disk is full, or the folder cannot be written; older checkpoints are whole.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():  # equal steps hold equal values: the run is a function of its recipe
        return final
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_contiguous(model.state_dict()), partial / "model.safetensors")
        save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        sums = [f"{_digest(partial / name)}  {name}\n" for name in _FILES]
        (partial / _SUMS).write_text("".join(sums))
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UniclError(
            f"cannot write checkpoint {final}: {_reason(error)}; older checkpoints are whole: "
            f"make room, repeat the command, and the run goes on from the newest"
        ) from error
    return final


def load_newest(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole and return its state; None where there is none.

    Damaged ones that are newer are set aside: the run will write those steps again.

    Raises:
        UniclError: no checkpoint is whole, or the newest whole one is of another architecture.
    """
    damaged: list[tuple[Path, DamagedCheckpointError]] = []
    for path in reversed(checkpoints(folder)):
        try:
            state = load_checkpoint(path, model=model, optimizer=optimizer)
        except DamagedCheckpointError as error:
            damaged.append((path, error))
            continue
        for bad, why in damaged:
            logger.warning("%s; set aside, going on from %s", why, path.name)
            _set_aside(bad)
        return state
    if damaged:
        _, newest = damaged[0]
        raise UniclError(
            f"no checkpoint in {folder} is whole ({newest}); "
            f"remove that folder to train from the start"
        )
    return None


def load_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load a checkpoint into model and optimizer, and return its state.

    Raises:
        DamagedCheckpointError: a file is missing or not as it was written.
        UniclError: the checkpoint is of another architecture.
    """
    verify_checkpoint(path)
    load_weights(path / "model.safetensors", model)
    tensors = _read(path / "optimizer.safetensors")
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split(":", 1)
        moments.setdefault(name, {})[kind] = tensor
    for name, parameter in model.named_parameters():
        if name in moments:
            values = moments[name]
            device = parameter.device
            optimizer.state[parameter] = {
                # The step counter of fused AdamW must live where the kernel runs.
                kind: value.to(device)
                for kind, value in values.items()
            }
    return load_state(path)


def verify_checkpoint(path: Path, *, only: str | None = None) -> None:
    """Compare a checkpoint's files, or only one of them, with the digests written beside them.

    A folder without digests, put together by hand, is taken as it is.

    Raises:
        DamagedCheckpointError: a file is missing or not as it was written.
        UniclError: a file cannot be read for now.
    """
    sums = path / _SUMS
    with _damage(path):
        digests = {name: _digest(path / name) for name in ([only] if only else _FILES)}
        if not sums.exists():
            logger.warning("%s has no %s; its files are taken as they are", path, _SUMS)
            return
        lines = (line.split(maxsplit=1) for line in sums.read_text().splitlines())
        expected = {name: digest for digest, name in lines}
        for name, digest in digests.items():
            if expected.get(name) != digest:
                raise DamagedCheckpointError(
                    f"{path / name} is damaged: its SHA-256 is not the one in {_SUMS}"
                )


def load_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's `state.json`, unverified.

    Raises:
        DamagedCheckpointError: it is missing or no JSON.
    """
    with _damage(path):
        return dict(json.loads((path / "state.json").read_text()))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Tell damage from what may be well the next time, such as too many open files."""
    try:
        yield
    except OSError as error:
        name = Path(error.filename or path).name
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
            raise DamagedCheckpointError(
                f"{path} is damaged: cannot read {name}: {_reason(error)}"
            ) from error
        raise UniclError(f"cannot read {path / name}: {_reason(error)}; try again") from error
    except (ValueError, TypeError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {_reason(error)}") from error


def load_weights(path: Path, model: nn.Module) -> None:
    """Load weights that fit the model exactly.

    Raises:
        UniclError: unreadable file, or names or shapes of another architecture.
    """
    tensors = _read(path)
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise UniclError(f"{path} is of another architecture: it has no {name}")
        if tensors[name].shape != tensor.shape:
            found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UniclError(
                f"{path} is of another architecture: {name} is {found}, the model's is {wanted}"
            )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UniclError(
            f"{path} is of another architecture: the model has no {unknown[0]} "
            f"({len(unknown)} tensors too many)"
        )
    model.load_state_dict(tensors)


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def checkpoint_step(path: Path) -> int:
    """Return the step that a checkpoint's name gives."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise UniclError(f"{path} is not a checkpoint; its name should look like step-00000500")
    return int(match[1])


def prune_checkpoints(folder: Path, *, keep_last: int, keep: set[int]) -> None:
    """Remove all but the newest `keep_last` checkpoints and those of the steps in `keep`."""
    for path in checkpoints(folder)[:-keep_last]:
        if checkpoint_step(path) not in keep:
            # Renamed first: a removal that is interrupted must not leave half a checkpoint.
            doomed = path.with_name(f".{path.name}.removed")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return _contiguous(
        {
            f"{kind}:{name}": value
            for name, parameter in model.named_parameters()
            for kind, value in optimizer.state.get(parameter, {}).items()
        }
    )


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read(path: Path) -> dict[str, Tensor]:
    with _damage(path.parent):
        return load_file(path)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that its step can be written again."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        if aside.is_dir():
            shutil.rmtree(aside)
        path.rename(aside)
    except OSError as error:
        raise UniclError(f"cannot rename {path} to {aside.name}: {_reason(error)}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
