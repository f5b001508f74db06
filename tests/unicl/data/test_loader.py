import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from unicl.data import loader as loader_module
from unicl.data.augment import EvalTransform, TrainTransform
from unicl.data.hash_table import TextHashTable, text_label
from unicl.data.loader import Loader
from unicl.data.order import SampleOrder
from unicl.data.prompts import PromptSampler
from unicl.data.reader import ImageDecoder
from unicl.data.shards import ShardSet, ShardWriter, index_shards
from unicl.distributed import Ranks
from unicl.errors import UniclError, UsageError

NAMES = ("cat", "dog", "a bird on a wire", "", "grinning face", "CAT")


def tokenize(texts):
    """One token per character: short, and as pure a function as the real one."""
    rows = [list(text.encode())[:24] for text in texts]
    return torch.tensor([row + [0] * (24 - len(row)) for row in rows])


def picture(number, width=20, height=16, format="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, samples_per_shard=40) as writer:
        for number in range(210):
            writer.write(f"k{number:03d}", picture(number), "png", NAMES[number % len(NAMES)])
    return ShardSet.open(folder)


def make_loader(shards, *, shuffle=True, **changes):
    order = SampleOrder(shards.shard_sizes, seed=3, window=2, shuffle=shuffle)
    settings = {
        "decode": ImageDecoder(
            changes.pop("transform", TrainTransform(12, flip=True)),
            changes.pop("max_image_pixels", 10_000),
        ),
        "tokenize": tokenize,
        "prompts": PromptSampler("clip", short_text_words=2, seed=3),
        "batch_size": 70,
        "num_workers": 0,
        "seed": 3,
        "max_skipped_share": 0.1,
    }
    return Loader(shards, order, **(settings | changes))


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_equal(one, two):
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left.images, right.images)
        assert torch.equal(left.tokens, right.tokens)
        assert torch.equal(left.labels, right.labels)
        assert (left.keys, left.texts) == (right.keys, right.texts)
        assert (left.consumed, left.skipped) == (right.consumed, right.skipped)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_do_not_depend_on_workers(shards, num_workers):
    alone = take(make_loader(shards).batches(30), 5)
    assert_equal(take(make_loader(shards, num_workers=num_workers).batches(30), 5), alone)
    assert not multiprocessing.active_children()
    epoch = list(make_loader(shards).epoch())
    assert_equal(list(make_loader(shards, num_workers=num_workers).epoch()), epoch)


def test_consumed_is_the_whole_state(shards):
    batches = take(make_loader(shards).batches(), 6)
    assert [batch.consumed for batch in batches] == [70, 140, 210, 280, 350, 420]
    assert_equal(take(make_loader(shards).batches(batches[2].consumed), 3), batches[3:])


def test_an_epoch_holds_every_sample_once(shards):
    batches = list(make_loader(shards, shuffle=False, batch_size=64).epoch())
    assert [len(batch) for batch in batches] == [64, 64, 64, 18]
    keys = [key for batch in batches for key in batch.keys]
    assert keys == [f"k{number:03d}" for number in range(210)]


def test_samples_are_what_was_written(shards):
    transform = EvalTransform(16)
    none = PromptSampler("none", short_text_words=0, seed=0)
    loader = make_loader(shards, shuffle=False, transform=transform, prompts=none)
    batch = take(loader.batches(), 1)[0]
    for row in (0, 1, 63, 64, 69):
        expected = transform(Image.open(BytesIO(picture(row))))
        assert torch.equal(batch.images[row], expected)
        text = NAMES[row % len(NAMES)]
        assert batch.texts[row] == text
        assert torch.equal(batch.tokens[row], tokenize([text])[0])
        assert batch.labels[row] == text_label(text, f"k{row:03d}")


def test_labels_are_those_of_texts_before_templates(shards):
    batch = take(make_loader(shards, shuffle=False).batches(), 1)[0]
    labels = batch.labels.tolist()
    assert len(set(labels[0::6])) == 1
    assert labels[0] != labels[5]
    assert len(set(labels[3::6])) == len(labels[3::6])
    templated = {bytes(row[row > 0].tolist()) for row in batch.tokens[0::6]}
    assert len(templated) > 3
    assert all(b"cat" in text or len(text) == 24 for text in templated)


def test_recorded_collisions_are_honoured(tmp_path):
    texts = [f"text number {number}" for number in range(60)]
    with ShardWriter(tmp_path) as writer:
        for number, text in enumerate(texts):
            writer.write(f"k{number}", picture(number), "png", text)
    table = TextHashTable(bits=8)
    for number, text in enumerate(texts):
        table.add(text, f"k{number}")
    assert table.collisions
    table.save(tmp_path)
    batch = next(make_loader(ShardSet.open(tmp_path), shuffle=False, batch_size=60).epoch())
    labels = dict(zip(batch.texts, batch.labels.tolist(), strict=True))
    assert all(labels[text] == label for text, label in table.collisions.items())


def test_epochs_are_augmented_differently(shards):
    first, second = (take(make_loader(shards, shuffle=False).batches(n), 1)[0] for n in (0, 210))
    assert first.keys == second.keys
    same = (first.images == second.images).flatten(1).all(1)
    assert same.float().mean() < 0.2


def test_random_state_of_the_trainer_is_left_alone(shards):
    state = torch.get_rng_state()
    take(make_loader(shards, num_workers=1).batches(), 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_to_moves_the_tensors(shards):
    batch = take(make_loader(shards).batches(), 1)[0]
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.tokens.device.type, moved.labels.device.type} == {
        "meta"
    }
    assert (moved.keys, moved.texts, moved.consumed) == (batch.keys, batch.texts, batch.consumed)


# Bad samples


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def good(numbers):
    for number in numbers:
        yield f"g{number:03d}.png", picture(number)
        yield f"g{number:03d}.txt", b"fine"


BAD = {
    "undecodable image": [("x.png", picture(1)[:100]), ("x.txt", b"cut")],
    "image too large": [("x.png", picture(1, 101, 100)), ("x.txt", b"large")],
    "no text": [("x.png", picture(1))],
    "text is not UTF-8": [("x.png", picture(1)), ("x.txt", b"caf\xe9")],
    "no image": [("x.txt", b"lonely")],
}


def folder_of(path, *shards):
    for number, members in enumerate(shards):
        write_tar(path / f"part-{number}.tar", members)
    index_shards(path)
    return ShardSet.open(path)


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_sample_is_left_out_and_counted(tmp_path, reason, num_workers):
    members = [*good(range(70)), *BAD[reason], *good(range(70, 80))]
    shards = folder_of(tmp_path, members)
    loader = make_loader(shards, shuffle=False, batch_size=75, num_workers=num_workers)
    batches = list(loader.epoch())
    assert [batch.skipped for batch in batches] == [{reason: 1}, {}]
    assert [len(batch) for batch in batches] == [74, 6]
    assert [batch.consumed for batch in batches] == [75, 81]
    assert "x" not in batches[0].keys
    assert batches[0].keys[69:71] == ("g069", "g070")
    # The neighbours look as if it had not been bad: randomness belongs to positions.
    clean = Image.open(BytesIO(picture(70)))
    assert torch.equal(
        batches[0].images[70],
        loader._reader.decode.transform(clean, _seed(loader, position=71)),
    )


def _seed(loader, position):
    from unicl.data.order import mix
    from unicl.data.reader import _AUGMENTATION

    return mix(loader._reader.seed, _AUGMENTATION, position)


def test_a_truncated_tar_loses_only_what_was_cut(tmp_path):
    folder_of(tmp_path, list(good(range(95))), list(good(range(95, 100))))
    path = tmp_path / "part-1.tar"
    os.truncate(path, 3 * 2048 + 1000)
    batches = list(make_loader(ShardSet.open(tmp_path), shuffle=False).epoch())
    skipped = sum(batch.skipped.get("truncated tar", 0) for batch in batches)
    assert 1 <= skipped < 5
    assert sum(len(batch) for batch in batches) == 100 - skipped


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(tmp_path, num_workers):
    bad = [(f"b{number}.png", b"broken") for number in range(30)]
    texts = [(f"b{number}.txt", b"text") for number in range(30)]
    pairs = [member for pair in zip(bad, texts, strict=True) for member in pair]
    shards = folder_of(tmp_path, list(good(range(80))), pairs)
    loader = make_loader(shards, shuffle=False, batch_size=50, num_workers=num_workers)
    pattern = r"20 of 100 samples .*undecodable image: 20.*part-1\.tar.*'b0'.*max_skipped_share"
    batches = loader.batches()
    assert len(next(batches)) == 50
    with pytest.raises(UniclError, match=pattern) as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()
    # Half of the samples may be bad by this limit; then the stream goes on.
    lenient = make_loader(shards, shuffle=False, batch_size=50, max_skipped_share=0.5)
    assert [len(batch) for batch in take(lenient.batches(), 3)] == [50, 30, 40]


def test_a_batch_of_bad_samples_is_empty(tmp_path):
    bad = [member for n in range(4) for member in ((f"b{n}.png", b"x"), (f"b{n}.txt", b"t"))]
    shards = folder_of(tmp_path, [*good(range(4)), *bad, *good(range(4, 60))])
    loader = make_loader(shards, shuffle=False, batch_size=4)
    one, two, three = take(loader.batches(), 3)
    assert (one.consumed, one.skipped) == (4, {})
    assert (two.consumed, two.skipped) == (8, {"undecodable image": 4})
    assert (len(two), two.images.shape, two.tokens.shape) == (0, (0, 3, 12, 12), (0, 24))
    assert len(three) == 4


@pytest.mark.parametrize("limit", [0.1, 1.0])
def test_nothing_but_bad_samples_is_an_error(tmp_path, limit):
    members = [member for n in range(5) for member in ((f"b{n}.png", b"x"), (f"b{n}.txt", b"t"))]
    loader = make_loader(folder_of(tmp_path, members), max_skipped_share=limit)
    with pytest.raises(UniclError, match="5 of 5 samples"):
        list(loader.epoch())
    with pytest.raises(UniclError, match="undecodable image"):
        take(loader.batches(), 3)


# Ranks


class Rank(Ranks):
    """One of several ranks, without the processes."""

    def __init__(self, rank, size):
        self.__dict__.update(group=None, of=(rank, size))

    rank = property(lambda self: self.of[0])
    size = property(lambda self: self.of[1])


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_each_batch_in_order(shards, size, num_workers):
    whole = take(make_loader(shards).batches(30), 3)
    parts = [
        take(make_loader(shards, ranks=Rank(r, size), num_workers=num_workers).batches(30), 3)
        for r in range(size)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
        assert torch.equal(torch.cat([share.tokens for share in shares]), batch.tokens)
        assert sum((share.keys for share in shares), ()) == batch.keys
        assert {share.consumed for share in shares} == {batch.consumed}
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_samples(shards):
    batches = [
        take(make_loader(shards, batch_size=2, ranks=Rank(r, 3)).batches(), 2) for r in (0, 1, 2)
    ]
    assert [[len(batch) for batch in own] for own in batches] == [[0, 0], [1, 1], [1, 1]]
    assert batches[0][0].images.shape == (0, 3, 12, 12)


def test_ranks_share_an_epoch_in_order(shards):
    whole = [key for batch in make_loader(shards).epoch() for key in batch.keys]
    parts = [make_loader(shards, ranks=Rank(r, 4)).epoch() for r in range(4)]
    assert [key for part in parts for batch in part for key in batch.keys] == whole


# Worker processes


class Exploding:
    def __call__(self, image, seed):
        raise KeyError("a bug in the transform")


class Threads:
    def __call__(self, image, seed):
        return torch.full((3, 2, 2), torch.get_num_threads(), dtype=torch.uint8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bug_surfaces_with_its_message(shards, num_workers):
    loader = make_loader(shards, transform=Exploding(), num_workers=num_workers)
    with pytest.raises(KeyError, match="a bug in the transform"):
        next(loader.batches())
    assert not multiprocessing.active_children()


def test_a_worker_is_one_thread(shards):
    loader = make_loader(shards, transform=Threads(), num_workers=1)
    assert (take(loader.batches(), 1)[0].images == 1).all()


def test_workers_leave_signals_to_the_trainer(shards):
    batches = make_loader(shards, num_workers=2).batches()
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(8):
        assert len(next(batches)) == 70
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 5
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_one_line(shards):
    before = signal.getsignal(signal.SIGCHLD)
    batches = make_loader(shards, num_workers=1).batches()
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(UniclError, match=r"a data worker died.*data\.num_workers") as caught:
        list(itertools.islice(batches, 100))
    assert "\n" not in str(caught.value)


SCRIPT = """
    import multiprocessing, sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests.unicl.data.test_loader import make_loader
    from unicl.data.shards import ShardSet

    batches = make_loader(ShardSet.open(Path({folder!r})), num_workers=2).batches()
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {then}
"""


def start_script(shards, then):
    from pathlib import Path

    root = str(Path(__file__).parents[3])
    script = textwrap.dedent(SCRIPT).format(root=root, folder=str(shards.folder), then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    return process, workers


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(running, pids)):
        assert time.monotonic() < deadline, "workers outlive the trainer"
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_do_not_outlive_a_killed_trainer(shards):
    process, workers = start_script(shards, "time.sleep(60)")
    process.kill()
    process.communicate()
    wait_until_gone(workers, 15)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_leaving_amid_the_stream_is_quick_and_silent(shards):
    process, workers = start_script(shards, "")
    start = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert (process.returncode, errors) == (0, "")
    wait_until_gone(workers, 1)


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"num_workers": -1}])
def test_senseless_settings_are_usage_errors(shards, changes):
    with pytest.raises(UsageError):
        make_loader(shards, **changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_of_fewer_bytes_give_the_same_batches(shards, monkeypatch, workers):
    """A clip has as many bytes as dozens of images; pieces of 64 would be too much at once."""
    expected = take(make_loader(shards).batches(), 4)
    monkeypatch.setattr(loader_module, "_PIECE_BYTES", 5 * 3 * 12 * 12)
    loader = make_loader(shards, num_workers=workers)
    assert loader._piece == 5
    for one, other in zip(expected, take(loader.batches(), 4), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.labels, other.labels)
        assert (one.keys, one.consumed) == (other.keys, other.consumed)
    monkeypatch.setattr(loader_module, "_PIECE_BYTES", 1)
    assert make_loader(shards)._piece == 1
