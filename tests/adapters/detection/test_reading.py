import itertools
from dataclasses import replace

import pytest
import torch
from PIL import Image

from adapters.detection.reading import DetectionReader, JoinedSets
from adapters.detection.transforms import EvalTransform, TrainTransform
from adapters.detection.vocabulary import Vocabulary
from tests.adapters.detection.painted import COLOURS, paint, write_painted
from unicl.data.loader import BatchLoader
from unicl.data.order import SampleOrder
from unicl.distributed import Ranks
from unicl.errors import UniclError

NAMES = ["red", "green", "blue"]
IMAGES = [
    [("red", (4, 4, 24, 30)), ("blue", (40, 10, 70, 50))],
    [],
    [("green", (10, 20, 40, 60))],
    [("green", (2, 2, 20, 20)), ("green", (30, 30, 60, 60)), ("red", (60, 2, 80, 20))],
    [("blue", (0, 0, 84, 64))],
    [("red", (50, 20, 80, 60))],
    [("blue", (20, 20, 40, 40)), ("green", (44, 2, 80, 30))],
]
TRAINING = TrainTransform((64, 48), 96, flip=True, crop_scale=(0.6, 1.0))


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    return write_painted(tmp_path_factory.mktemp("painted"), IMAGES, NAMES)


class Rank(Ranks):
    """One of several ranks that exchange nothing."""

    def __init__(self, rank, size):
        self.__dict__.update(group=None, of=(rank, size))

    rank = property(lambda self: self.of[0])
    size = property(lambda self: self.of[1])


def loader_of(samples, *, transform=TRAINING, shuffle=True, max_pixels=10**6, **changes):
    samples = samples if isinstance(samples, JoinedSets) else JoinedSets([samples])
    order = SampleOrder(samples.shard_sizes, seed=3, window=1, shuffle=shuffle)
    reader = DetectionReader(samples, order, transform, 3, max_pixels, 64 * 96)
    given = {"batch_size": 5, "num_workers": 0, "max_skipped_share": None, **changes}
    return BatchLoader(reader, **given)


def take(loader, count):
    batches = loader.batches()
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def epoch(samples, **changes):
    """Read all images in one batch, in order, as they are."""
    given = {"transform": EvalTransform(64, 10**4), "shuffle": False, "batch_size": 100, **changes}
    (batch,) = loader_of(samples, **given).epoch()
    return batch


def objects_of(batch, number):
    own = batch.owners == number
    return batch.boxes[own].tolist(), batch.labels[own].tolist()


def assert_painted(batch, names):
    """Look up the colour in the middle of each box, and that boxes are in their images."""
    for box, label, owner in zip(batch.boxes, batch.labels, batch.owners, strict=True):
        height, width = batch.sizes[owner].tolist()
        assert (box >= 0).all()
        assert (box <= torch.tensor([width, height] * 2)).all()
        x, y = ((box[:2] + box[2:]) / 2).long().tolist()
        colour = torch.tensor(COLOURS[names[int(label)].lower()])
        assert (batch.images[owner, :, y, x] - colour).abs().max() <= 6


def assert_same(one, other):
    fields = ("images", "sizes", "originals", "boxes", "labels", "owners", "judged", "rows")
    for name in fields:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.keys, one.consumed, one.skipped) == (other.keys, other.consumed, other.skipped)


def test_boxes_and_labels_are_those_of_their_images(painted):
    batches = take(loader_of(painted), 12)
    assert {len(batch) for batch in batches} == {5}
    for batch in batches:
        assert_painted(batch, NAMES)
        assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
        for number, row in enumerate(batch.rows.tolist()):
            assert batch.keys[number] == f"{row}.png"
            assert batch.originals[number].tolist() == [64, 80 + row]
            boxes, labels = objects_of(batch, number)
            assert set(labels) <= {NAMES.index(name) for name, _ in IMAGES[row]}
            assert bool(boxes) == bool(IMAGES[row])
    assert len({tuple(batch.rows.tolist()) for batch in batches}) > 1
    seen = torch.cat([batch.rows for batch in batches])
    assert seen.bincount(minlength=7).min() >= 8
    assert [batch.consumed for batch in batches] == [*range(5, 65, 5)]


def test_without_augmentation_boxes_are_the_annotated_ones(painted):
    batch = epoch(painted)
    assert batch.rows.tolist() == [*range(7)]
    assert batch.sizes.tolist() == [[64, 80 + row] for row in range(7)]
    for row, objects in enumerate(IMAGES):
        boxes, labels = objects_of(batch, row)
        assert boxes == [list(box) for _, box in objects]
        assert labels == [NAMES.index(name) for name, _ in objects]
        assert torch.equal(
            batch.images[row, :, :64, : 80 + row],
            torch.frombuffer(bytearray(paint(objects, 80 + row, 64).tobytes()), dtype=torch.uint8)
            .view(64, 80 + row, 3)
            .movedim(-1, 0),
        )
    assert batch.judged.all()
    assert batch.images[0, :, 0, 95].tolist() == [124, 116, 104]  # padding


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_do_not_depend_on_workers(painted, num_workers):
    expected = take(loader_of(painted), 4)
    for one, other in zip(
        expected, take(loader_of(painted, num_workers=num_workers), 4), strict=True
    ):
        assert_same(one, other)


@pytest.mark.parametrize("size", [2, 7])
def test_ranks_share_a_batch(painted, size):
    wholes = take(loader_of(painted), 3)
    parts = [take(loader_of(painted, ranks=Rank(rank, size)), 3) for rank in range(size)]
    for whole, *own in zip(wholes, *parts, strict=True):
        assert torch.equal(torch.cat([part.boxes for part in own]), whole.boxes)
        assert torch.equal(torch.cat([part.labels for part in own]), whole.labels)
        assert torch.equal(torch.cat([part.rows for part in own]), whole.rows)
        assert sum((part.keys for part in own), ()) == whole.keys
        assert {part.consumed for part in own} == {whole.consumed}
        images = iter(whole.images)
        for part in own:  # padded to the largest of its own
            for image, (height, width) in zip(part.images, part.sizes.tolist(), strict=True):
                assert torch.equal(image[:, :height, :width], next(images)[:, :height, :width])


def test_a_batch_may_be_empty(painted):
    batch = next(loader_of(painted, batch_size=1, ranks=Rank(0, 2)).batches())
    assert len(batch) == 0
    assert batch.images.shape == (0, 3, 64, 64)
    assert batch.judged.shape == (0, 3)
    assert batch.boxes.shape == (0, 4)
    for name in ("sizes", "originals", "labels", "owners", "rows"):
        assert getattr(batch, name).dtype == torch.int64, name
        assert len(getattr(batch, name)) == 0


def test_images_without_objects_are_read(tmp_path):
    batch = epoch(write_painted(tmp_path, [[], []], NAMES))
    assert len(batch) == 2
    assert batch.boxes.shape == (0, 4)
    assert batch.owners.tolist() == batch.labels.tolist() == []
    assert batch.judged.all()


def test_a_box_of_a_crowd_is_no_object(tmp_path):
    crowd = [("red", (4, 4, 24, 30), "crowd"), ("blue", (40, 10, 70, 50))]
    batch = epoch(write_painted(tmp_path, [crowd, [crowd[0]]], NAMES))
    assert batch.labels.tolist() == [2]
    assert batch.owners.tolist() == [0]


def test_bad_images_are_left_out_and_counted(tmp_path):
    painted = write_painted(tmp_path, IMAGES, NAMES)
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").write_bytes(b"no image")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    paint(IMAGES[4], 90, 64).save(tmp_path / "4.png")
    for workers in (0, 2):
        batch = epoch(painted, num_workers=workers)
        assert batch.keys == ("1.png", "5.png", "6.png")
        assert batch.rows.tolist() == [1, 5, 6]
        assert batch.owners.tolist() == [1, 2, 2]
        assert_painted(batch, NAMES)
        assert batch.skipped == {
            "missing file": 1,
            "undecodable image": 2,
            "size differs from the annotations": 1,
        }
    with pytest.raises(UniclError, match=r"4 of 7 samples were skipped \(undecodable image: 2"):
        epoch(painted, max_skipped_share=0.1)


def test_large_images_are_left_out(painted):
    batch = epoch(painted, max_pixels=64 * 83)
    assert batch.rows.tolist() == [0, 1, 2, 3]
    assert batch.skipped == {"image too large": 3}


STORED = [(turn, "as it is stored") for turn in range(5, 9)]  # of others the sizes are equal
SEEN = itertools.product(range(1, 9), ("as it is seen", "without a size"))


@pytest.mark.parametrize(("orientation", "annotated"), [*STORED, *SEEN])
def test_boxes_of_turned_images(tmp_path, orientation, annotated):
    """Tools see an image turned or not; the size in the annotations tells which."""
    objects = [("red", (10, 4, 50, 20)), ("blue", (60, 30, 76, 60))]
    painted = write_painted(tmp_path, [objects], NAMES)
    seen = paint(objects, 80, 64)
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # by Pillow's transpose
    turned = undone is not None and annotated != "as it is stored"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = seen.transpose(Image.Transpose(undone)) if turned else seen
    stored.save(tmp_path / "0.png", exif=exif)
    if annotated == "without a size":
        painted = replace(painted, sizes=0 * painted.sizes)
    batch = epoch(painted)
    assert batch.labels.tolist() == [0, 2]
    assert batch.originals.tolist() == [[64, 80]]
    assert batch.boxes.tolist() == [list(box) for _, box in objects]
    assert_painted(batch, NAMES)


def test_sets_are_joined_by_name(tmp_path):
    own = write_painted(tmp_path / "own", IMAGES, NAMES)
    other_images = [[("White", (4, 4, 20, 20)), ("Green", (30, 30, 60, 60))], []]
    other = write_painted(tmp_path / "other", other_images, ["White", "Green"])
    joined = JoinedSets([own, other])
    assert joined.vocabulary.names == ("red", "green", "blue", "White")
    assert joined.num_samples == 9
    batch = epoch(joined)
    assert batch.rows.tolist() == [*range(9)]
    assert batch.keys[-2:] == ("0.png", "1.png")
    assert_painted(batch, joined.vocabulary.names)
    assert objects_of(batch, 7) == ([[4, 4, 20, 20], [30, 30, 60, 60]], [3, 1])
    assert batch.judged.tolist() == 7 * [[True, True, True, False]] + 2 * [
        [False, True, False, True]
    ]
    assert joined.locate(7) == ("0.png", 0)
    assert joined.digest() != JoinedSets([other, own]).digest() != own.digest()


def test_classes_that_nobody_looked_for(tmp_path):
    federated = [
        {"neg_category_ids": [7], "not_exhaustive_category_ids": []},
        {"neg_category_ids": [], "not_exhaustive_category_ids": []},
        {"neg_category_ids": [5, 7], "not_exhaustive_category_ids": []},
    ]
    painted = write_painted(tmp_path, IMAGES[:3], NAMES, federated=federated)
    batch = epoch(painted)
    assert batch.judged.tolist() == [[True, False, True], [False] * 3, [True] * 3]
    batch = epoch(JoinedSets([painted], Vocabulary.of_objects([painted])))
    assert batch.judged.shape == (3, 1)
    assert batch.labels.tolist() == [0, 0, 0]


def test_the_stream_goes_on_where_it_was_left(painted):
    whole = take(loader_of(painted), 4)
    batches = loader_of(painted).batches(10)
    assert_same(next(batches), whole[2])
    batches.close()


def test_many_small_images_need_few_files(tmp_path):
    """What workers hand over in shared memory is an open file each."""
    import resource

    images = [[("red", (4, 4, 24, 30))] for _ in range(64)]
    painted = write_painted(tmp_path, images, NAMES, sizes=[(row, (64, 64)) for row in range(64)])
    loader = loader_of(painted, batch_size=64, num_workers=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert len(take(loader, 3)[-1]) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
