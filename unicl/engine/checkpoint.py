"""Checkpoints: folders of safetensors and JSON, complete or absent, and nothing to unpickle.

    checkpoints/step-00000500/
        model.safetensors                      all weights
        ema.safetensors                        their average, if the run keeps one
        optimizer-00001-of-00002.safetensors   moments by parameter name, some on each rank
        state.json                             step, position in the data, running means, ...
        SHA256SUMS                             of all files, as `sha256sum -c` reads them

Every tensor is whole, whatever ranks and ZeRO stage wrote it, so any others can go on from it. A
checkpoint is written beside its final name, flushed to disk and renamed, so that a run killed at
any instant finds either the whole of it or the one before. What a disk damages later, the digests
tell.
"""

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unicl.data.tensors import write_tensors
from unicl.distributed import ALONE, Ranks
from unicl.engine.backend import Backend
from unicl.engine.optimizer import AVERAGE
from unicl.errors import UniclError

logger = logging.getLogger("unicl")

_NAME = re.compile(r"step-(\d{8})")
_FILES = ("model.safetensors", "state.json")
_SUMS = "SHA256SUMS"


class DamagedCheckpointError(UniclError):
    """A checkpoint is not as it was written."""


def save_checkpoint(folder: Path, step: int, backend: Backend, state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step atomically, on all ranks together, and return its folder.

    Raises:
        UniclError: the disk is full, or the folder cannot be written; older checkpoints are whole.
    """
    ranks = backend.ranks
    final = folder / f"step-{step:08d}"
    unfinished = folder / f".{final.name}.partial"
    # Equal steps hold equal values: the run is a function of its recipe.
    if any(ranks.gather_objects(final.exists())):
        return final

    def clear() -> None:
        if ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def write() -> list[str]:
        shard = f"optimizer-{ranks.rank + 1:05d}-of-{ranks.size:05d}.safetensors"
        write_tensors(unfinished / shard, moments)
        written = [unfinished / shard]
        if ranks.first:
            for name, tensors in weights.items():
                write_tensors(unfinished / name, tensors)
            written += [unfinished / name for name in (*weights, "state.json")]
            (unfinished / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        for path in written:
            _flush(path)
        return [f"{_digest(path)}  {path.name}\n" for path in written]

    def finish() -> None:
        if ranks.first:
            (unfinished / _SUMS).write_text("".join(itertools.chain.from_iterable(sums)))
            _flush(unfinished / _SUMS)
            _flush(unfinished)
            unfinished.rename(final)
            _flush(folder)

    try:
        ranks.together(clear)
        weights = {"model.safetensors": backend.weights()}
        if AVERAGE in backend.kinds:
            weights["ema.safetensors"] = backend.weights(averaged=True)
        moments = backend.moments(_share(backend.sizes, ranks))
        sums = ranks.gather_objects(ranks.together(write))
        ranks.together(finish)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UniclError(
            f"cannot write checkpoint {final}: {_reason(error)}; older checkpoints are whole: "
            f"make room, repeat the command, and the run goes on from the newest"
        ) from error
    return final


def newest_checkpoint(folder: Path, ranks: Ranks = ALONE) -> Path | None:
    """Return the newest checkpoint that is whole, the same one on all ranks; None if there is none.

    Damaged ones that are newer are set aside: the run will write those steps again.

    Raises:
        UniclError: there are checkpoints, but none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    (found,) = ranks.gather_objects(checkpoints(folder) if ranks.first else None)[:1]
    for path in reversed(found or []):
        # The ranks share the reading: each one looks at some of the files.
        found_here = ranks.together(partial(_damage_of, path, ranks))
        why = [each for each in ranks.gather_objects(found_here) if each]
        if why:
            damaged.append((path, why[0]))
            continue
        ranks.together(partial(_set_aside, damaged if ranks.first else [], path))
        return path
    if damaged:
        raise UniclError(
            f"no checkpoint in {folder} is whole ({damaged[0][1]}); "
            f"remove that folder to train from the start"
        )
    return None


def load_moments(path: Path, backend: Backend, *, updates: int) -> None:
    """Load the moments and averages of a checkpoint, whichever ranks have written them.

    Raises:
        DamagedCheckpointError: a file cannot be read, or moments are missing.
    """
    if updates == 0:
        return
    moments: dict[str, Tensor] = {}
    for shard in sorted(path.glob("optimizer-*.safetensors")):
        moments |= _read(shard)
    if AVERAGE in backend.kinds:
        averages = _read(path / "ema.safetensors")
        moments |= {f"{AVERAGE}:{name}": average for name, average in averages.items()}
    for name in backend.sizes:
        if not all(f"{kind}:{name}" in moments for kind in backend.kinds):
            raise DamagedCheckpointError(f"{path} is damaged: it has no moments of {name}")
    backend.load_moments(moments, updates=updates)


def verify_checkpoint(path: Path, *, only: str | None = None, ranks: Ranks = ALONE) -> None:
    """Compare a checkpoint's files, or only one of them, with the digests written beside them.

    A folder without digests, put together by hand, is taken as it is. Of several ranks each looks
    at its share of the files, and may find nothing wrong where another one does.

    Raises:
        DamagedCheckpointError: a file is missing or not as it was written.
        UniclError: a file cannot be read for now.
    """
    sums = path / _SUMS
    with _damage(path):
        if not sums.exists():
            for name in [only] if only else _FILES:
                _digest(path / name)
            if ranks.first:
                logger.warning("%s has no %s; its files are taken as they are", path, _SUMS)
            return
        lines = (line.split(maxsplit=1) for line in sums.read_text().splitlines())
        expected = {name: digest for digest, name in lines}
        names = [only] if only else sorted({*expected, *_FILES})[ranks.rank :: ranks.size]
        for name in names:
            if expected.get(name) != _digest(path / name):
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
    set_weights(_read(path), model, source=path)


def set_weights(tensors: Mapping[str, Tensor], model: nn.Module, *, source: Path) -> None:
    """Put weights into a model that they fit exactly.

    Raises:
        UniclError: names or shapes of another architecture; `source` is where they are from.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise UniclError(f"{source} is of another architecture: it has no {name}")
        if tensors[name].shape != tensor.shape:
            found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UniclError(
                f"{source} is of another architecture: {name} is {found}, the model's is {wanted}"
            )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UniclError(
            f"{source} is of another architecture: the model has no {unknown[0]} "
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


def sweep(folder: Path) -> None:
    """Remove what a killed run has left: checkpoints half written or half removed."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _share(sizes: Mapping[str, int], ranks: Ranks) -> set[str]:
    """Return the parameters whose moments this rank writes, such that files are of one size."""
    loads = [0] * ranks.size
    own = set()
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name]
        if rank == ranks.rank:
            own.add(name)
    return own


def _damage_of(path: Path, ranks: Ranks) -> str | None:
    try:
        verify_checkpoint(path, ranks=ranks)
    except DamagedCheckpointError as error:
        return str(error)
    return None


def _read(path: Path) -> dict[str, Tensor]:
    with _damage(path.parent):
        return load_file(path)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside(damaged: list[tuple[Path, str]], whole: Path) -> None:
    """Rename damaged checkpoints, so that their steps can be written again."""
    for path, why in damaged:
        logger.warning("%s; set aside, going on from %s", why, whole.name)
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
