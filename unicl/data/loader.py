"""Batches of decoded images, tokens and labels, identical for any number of worker processes.

The plan of a run is a sequence of stream positions, cut into batches and those into pieces; a piece
is a pure function of its positions. The loader's whole state is the number of samples consumed.
"""

import atexit
import functools
import gc
import logging
import multiprocessing
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.context import BaseContext
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch.utils.data import DataLoader, Sampler

from unicl.data.order import SampleOrder
from unicl.data.prompts import PromptSampler
from unicl.data.reader import Batch, Decode, Reader, SampleSet, Skipped, Tokenize
from unicl.distributed import ALONE, Ranks
from unicl.errors import UniclError, UsageError

logger = logging.getLogger("unicl")

AnyBatch = TypeVar("AnyBatch")

# What a worker hands over at a time: small enough to keep shared memory and latency low however
# large the batch is, large enough that handing over costs nothing beside the decoding.
_PIECE = 64
_PIECE_BYTES = 1 << 25
_BATCHES_AHEAD = 2
_FEWEST_TO_JUDGE = 100
_SECONDS_AFTER_SIGTERM = 60


@runtime_checkable
class PieceReader(Protocol):
    """Maps (first stream position, count) to a piece; `unicl.data.reader.Reader` is one.

    A piece is consecutive samples without the bad ones: it has `keys`, and what was `skipped`.
    """

    @property
    def samples(self) -> SampleSet:
        """What is read from."""

    def sample_bytes(self) -> int:
        """About how many bytes a decoded sample takes."""

    def prepare(self) -> None:
        """Load once for all workers what loads when it is first used."""

    def __getitem__(self, positions: tuple[int, int]) -> Any:
        """Read the samples at `count` stream positions from the first one on."""

    def join(self, parts: Sequence[Any], *, consumed: int, skipped: dict[str, int]) -> Any:
        """Make a batch of its pieces, of which some or all may have no samples."""


class _Plan(Sampler[tuple[int, int]]):
    """The pieces (first position, count) from `start` on, none across a batch's end.

    Args:
        piece: samples of a piece, but for a batch's last.
        ranks: they share each batch, the first rank's part before the second's.
    """

    def __init__(
        self, start: int, stop: int | None, batch_size: int, piece: int, ranks: Ranks = ALONE
    ) -> None:
        self.start = start
        self.stop = stop
        self.batch_size = batch_size
        self.piece = piece
        self.ranks = ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for own, _ in self.batches():
            for position in own[:: self.piece]:
                yield position, min(self.piece, own.stop - position)

    def batches(self) -> Iterator[tuple[range, int]]:
        """Yield this rank's positions of each batch, and where the whole batch ends."""
        position = self.start
        while self.stop is None or position < self.stop:
            last = position + self.batch_size
            last = last if self.stop is None else min(last, self.stop)
            share = self.ranks.share(last - position)
            yield range(position + share.start, position + share.stop), last
            position = last


class _Tally:
    """Counts what was skipped, and stops the run when it becomes too much."""

    def __init__(self, samples: SampleSet, max_skipped_share: float | None) -> None:
        self._locate = samples.locate
        self._max_skipped_share = max_skipped_share
        self._num_read = 0
        self._reasons: Counter[str] = Counter()
        self._shards: Counter[str] = Counter()
        self._example: dict[str, Skipped] = {}

    def add(self, num_read: int, skipped: Sequence[Skipped]) -> None:
        self._num_read += num_read
        for sample in skipped:
            shard, _ = self._locate(sample.index)
            self._reasons[sample.reason] += 1
            self._shards[shard] += 1
            self._example.setdefault(shard, sample)

    def check(self, *, last: bool = False) -> None:
        """Raise if too large a share was skipped; `last` says that no more samples will come."""
        num_skipped = self._reasons.total()
        if not num_skipped or not (last or self._num_read >= _FEWEST_TO_JUDGE):
            return
        limit = self._max_skipped_share
        if limit is not None and (
            num_skipped > limit * self._num_read or num_skipped == self._num_read
        ):
            raise UniclError(
                f"{self._message(num_skipped)}: prepare the data again, or raise "
                f"data.max_skipped_share from {limit:g}"
            )
        if last:
            logger.warning("%s", self._message(num_skipped))

    def _message(self, num_skipped: int) -> str:
        shard, in_shard = self._shards.most_common(1)[0]
        example = self._example[shard]
        reasons = ", ".join(f"{reason}: {n}" for reason, n in self._reasons.most_common())
        sample = f"sample {example.key!r}" if example.key else f"sample number {example.index}"
        where = f"such as {sample}"
        if example.key != shard:  # an image that is a file of its own is its own shard
            where = f"{in_shard} of them in {shard}, {where}"
        return (
            f"{num_skipped} of {self._num_read} samples were skipped ({reasons}), {where} "
            f"({example.reason})"
        )


class BatchLoader(Generic[AnyBatch]):
    """Reads what a reader makes of the samples, in the planned order, in other processes.

    A sample that cannot be used is left out of its batch and counted by reason.

    Args:
        reader: Makes pieces of batches.
        num_workers: Processes that do the work; 0 does it in this one. The batches do not differ.
        max_skipped_share: More skipped samples than this share, of at least 100 or of a whole pass,
            end the run; None tells what was skipped, and lets the caller judge.
        ranks: The processes that share the data; this one reads its own part only.

    Raises:
        UsageError: The batch size is not positive, or the number of workers is negative.
    """

    def __init__(
        self,
        reader: PieceReader,
        *,
        batch_size: int,
        num_workers: int,
        max_skipped_share: float | None,
        ranks: Ranks = ALONE,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be positive, got {batch_size}")
        if num_workers < 0:
            raise UsageError(f"data.num_workers must not be negative, got {num_workers}")
        self._reader = reader
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.ranks = ranks
        self._max_skipped_share = max_skipped_share

    @property
    def samples(self) -> Any:
        """What is read from, a `unicl.data.reader.SampleSet`."""
        return self._reader.samples

    def batches(self, start: int = 0) -> Generator[AnyBatch, None, None]:
        """Yield this rank's part of batches without end, from a stream position on.

        Raises:
            UniclError: Too large a share of the samples is bad, or a worker was killed.
        """
        return self._load(_Plan(start, None, self.batch_size, self._piece, self.ranks))

    def epoch(self, span: range | None = None) -> Generator[AnyBatch, None, None]:
        """Yield every sample once, or every one of a span; the last batch may be smaller.

        Of several ranks each gets a run of consecutive samples, the first rank the first.

        Raises:
            UniclError: Too large a share of the samples is bad, or a worker was killed.
        """
        span = range(self._reader.samples.num_samples) if span is None else span
        own = self.ranks.share(len(span))
        start, stop = span.start + own.start, span.start + own.stop
        return self._load(_Plan(start, stop, self.batch_size, self._piece))

    @functools.cached_property
    def _piece(self) -> int:
        return max(1, min(_PIECE, _PIECE_BYTES // max(1, self._reader.sample_bytes())))

    def _load(self, plan: _Plan) -> Generator[AnyBatch, None, None]:
        tally = _Tally(self._reader.samples, self._max_skipped_share)
        with closing(self._pieces(plan)) as pieces:
            for own, consumed in plan.batches():
                parts = [next(pieces) for _ in own[:: plan.piece]]
                skipped = [sample for part in parts for sample in part.skipped]
                tally.add(len(own), skipped)
                tally.check()
                reasons = Counter(sample.reason for sample in skipped)
                yield self._reader.join(parts, consumed=consumed, skipped=dict(reasons))
        tally.check(last=True)

    def _pieces(self, plan: _Plan) -> Generator[Any, None, None]:
        if self.num_workers == 0:
            yield from map(self._reader.__getitem__, plan)
            return
        pieces = self._start_workers(plan)
        close = pieces._shutdown_workers
        # At exit torch would wait in vain, then send a SIGTERM, which the workers let pass.
        atexit.register(close)
        try:
            yield from pieces
        except (RuntimeError, ConnectionError, EOFError) as error:
            # A worker that dies while it hands something over breaks the connection first.
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            cause = " ".join(str(error).split())
            raise UniclError(
                f"a data worker died, perhaps for lack of memory; lower data.num_workers ({cause})"
            ) from error
        finally:
            atexit.unregister(close)
            close()

    def _start_workers(self, plan: _Plan) -> Any:
        self._reader.prepare()
        own_size = -(-self.batch_size // self.ranks.size)
        pieces_ahead = _BATCHES_AHEAD * -(-own_size // plan.piece)
        with _quiet_start():
            loader = DataLoader(
                cast(Any, self._reader),
                sampler=plan,
                batch_size=None,
                num_workers=self.num_workers,
                prefetch_factor=max(2, -(-pieces_ahead // self.num_workers)),
                multiprocessing_context=_context(),
                worker_init_fn=_leave_signals_to_trainer,
                # The default generator is the trainer's, and starting would advance it.
                generator=torch.Generator(),
            )
            return iter(loader)


class Loader(BatchLoader[Batch]):
    """Reads, decodes, augments and tokenizes samples in the planned order.

    Args:
        samples: Encoded images with their texts.
        order: Which sample comes at which position.
        decode: Makes a uint8 tensor of an encoded image or clip, given an integer seed.
        tokenize: Makes token ids of texts; must depend on nothing but the texts.
        prompts: Puts texts into templates.
        seed: Of augmentation.
        how: As in `BatchLoader`.
    """

    def __init__(
        self,
        samples: SampleSet,
        order: SampleOrder,
        *,
        decode: Decode,
        tokenize: Tokenize,
        prompts: PromptSampler,
        seed: int,
        **how: Any,
    ) -> None:
        super().__init__(Reader(samples, order, decode, tokenize, prompts, seed), **how)


def _context() -> BaseContext:
    """Fork on Linux, the platform's own way elsewhere.

    A forked worker starts at once, shares the index and needs no importable main module. The
    danger of forking beside threads is a lock that one of them holds; a worker takes none of the
    trainer's: it reads files, runs Pillow and the tokenizer, and one thread of torch.
    """
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


@contextmanager
def _quiet_start() -> Iterator[None]:
    before = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # Python 3.12 on: see `_context`. torch: more workers than cores is the user's choice.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield
    # torch's handler would raise a worker's death anywhere in the trainer, even amid an update;
    # without it, the next batch raises it.
    if signal.getsignal(signal.SIGCHLD) is not before is not None:
        signal.signal(signal.SIGCHLD, before)


def _leave_signals_to_trainer(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A SIGTERM to the whole job must leave the trainer its batches until it has saved.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_AFTER_SIGTERM))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # What was inherited is not the worker's to collect; it would only be copied page by page.
    gc.freeze()
