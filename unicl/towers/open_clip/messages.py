"""What open_clip says: kept out of the log, and where it fails one line of ours."""

import logging
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from unicl.errors import UniclError, UsageError

# Levels of loggers belong to all threads: each has to find them as they were.
_ONE_AT_A_TIME = threading.RLock()
# What open_clip says when it cannot download.
_DOWNLOAD_FAILED = (
    *("Failed to download", "Failed initial", "Required pretrained weights"),
    "couldn't connect",  # transformers, for the configuration of its text towers
)


def creation_error(
    error: Exception, *, full_name: str, address: str, cache: str, local: bool
) -> UniclError:
    """Say in one line why open_clip could not build a model."""
    reason = first_line(error)
    if "Required pretrained weights" in reason and local:
        return UsageError(
            f"{full_name}: the folder has no weights; add open_clip_model.safetensors"
        )
    if reason.startswith("Error(s) in loading state_dict"):
        missing = str(error).strip().splitlines()[1].strip()
        return UsageError(f"{full_name}: the weights are of another architecture: {missing[:200]}")
    if isinstance(error, pickle.UnpicklingError):
        return UsageError(
            f"{full_name}: the file holds more than weights, and is not executed; convert it where "
            "you trust it: safetensors.torch.save_file(weights, 'weights.safetensors')"
        )
    if isinstance(error, SafetensorError | EOFError):
        return UniclError(f"{full_name}: the weights are damaged: {reason}; fetch them again")
    if any(sign in reason for sign in _DOWNLOAD_FAILED):
        return no_download(full_name, address, cache, error)
    return UsageError(f"open_clip cannot build {full_name}: {reason}")


def no_download(full_name: str, address: str, cache: str, error: Exception) -> UniclError:
    """Say in one line from where to where a download failed, and the way out."""
    return UniclError(
        f"cannot download {full_name} from {address} to {cache}: {first_line(error)}; fetch it "
        "where there is a network and copy it there, or name a file: open_clip:ARCHITECTURE/PATH"
    )


def first_line(error: BaseException) -> str:
    """Return an error's first line, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def hub() -> str:
    """Return the address of the hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def hub_cache() -> str:
    """Return where the hub's files are kept."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


@contextmanager
def quiet() -> Iterator[None]:
    """Keep open_clip's talk out of the log, each step to the root logger, and the hub's of retries.

    The handler also keeps open_clip from installing one of its own, for good.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    with _ONE_AT_A_TIME:
        levels = {logger: logger.level for logger in (root, logging.getLogger("huggingface_hub"))}
        root.addHandler(handler)
        for logger in levels:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
            root.removeHandler(handler)
