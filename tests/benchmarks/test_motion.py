"""The composed clips: what they show, and that only the order of the frames tells the motion."""

from collections import Counter
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.ensemble import RandomForestClassifier

from benchmarks.motion import (
    COLOURS,
    COMBINATIONS,
    MOTIONS,
    SHAPES,
    draw_clip,
    draw_tracks,
    encode,
    motion_captions,
    write_class_folder,
    write_clip_shards,
    write_image_shards,
)
from unicl.data.shards import ShardSet

NAMES = list(MOTIONS)
OPPOSITES = (
    ("moving left", "moving right"),
    ("moving up", "moving down"),
    ("growing", "shrinking"),
)


def decode(video: bytes) -> np.ndarray:
    with av.open(BytesIO(video)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def object_of(frames: np.ndarray, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Find the pixels near the object's colour: their centre [time, (x, y)], their number."""
    near = np.abs(frames.astype(float) - COLOURS[colour]).max(-1) < 40
    centres = [np.argwhere(mask).mean(0)[::-1] for mask in near]
    return np.array(centres), near.sum((1, 2))


def tracks_of(motion: str, count: int, *, num_frames: int = 8) -> np.ndarray:
    rngs = (np.random.default_rng((NAMES.index(motion), i)) for i in range(count))
    return np.stack([draw_tracks(rng, motion, num_frames) for rng in rngs])


def test_a_clip_is_a_pure_function_of_seed_and_index():
    clips = [draw_clip(3, index) for index in (5, 149)]
    again = [draw_clip(3, index) for index in (149, 5)][::-1]
    for clip, same in zip(clips, again, strict=True):
        np.testing.assert_array_equal(clip.frames, same.frames)
    # The same combination twice: 149 = 144 + 5.
    assert clips[0].caption == clips[1].caption
    assert (clips[0].frames != clips[1].frames).any()
    assert (clips[0].frames != draw_clip(4, 5).frames).any()


def test_any_144_in_a_row_show_all_combinations():
    clips = [draw_clip(0, index, num_frames=1) for index in range(100, 244)]
    assert len(COMBINATIONS) == len({clip.caption for clip in clips}) == 144
    assert Counter(clip.still_caption for clip in clips) == {
        f"a {colour} {shape}": 6 for colour in COLOURS for shape in SHAPES
    }
    for motion in MOTIONS:
        shown = {clip.caption for clip in clips if clip.motion == motion}
        assert shown == set(motion_captions(motion))


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_object_does_what_the_caption_says_after_coding(motion):
    for index in range(NAMES.index(motion), 144, 24):
        clip = draw_clip(7, index, num_frames=12)
        assert clip.motion == motion
        centres, areas = object_of(decode(encode(clip.frames)), clip.colour)
        moved = centres[-1] - centres[0]
        expected = {
            "moving left": (-20, 0),
            "moving right": (20, 0),
            "moving up": (0, -20),
            "moving down": (0, 20),
        }
        # An object that the border cuts has its centre elsewhere.
        np.testing.assert_allclose(moved, expected.get(motion, (0, 0)), atol=6)
        ratio = areas[-1] / areas[0]
        assert (ratio > 1.5) == (motion == "growing")
        assert (ratio < 1 / 1.5) == (motion == "shrinking")


@pytest.mark.parametrize("colour", COLOURS)
def test_each_colour_stays_nearest_to_itself_after_coding(colour):
    clip = draw_clip(2, list(COLOURS).index(colour) * 24)
    frames = decode(encode(clip.frames)).astype(float)
    inside = np.abs(clip.frames.astype(float) - COLOURS[colour]).max(-1) < 20
    distances = [np.abs(frames[inside].mean(0) - paint).sum() for paint in COLOURS.values()]
    assert list(COLOURS)[int(np.argmin(distances))] == colour


@pytest.mark.parametrize(("motion", "opposite"), OPPOSITES)
def test_backwards_is_the_opposite_motion(motion, opposite):
    for seed in range(20):
        forth = draw_tracks(np.random.default_rng(seed), motion, 8)
        back = draw_tracks(np.random.default_rng(seed), opposite, 8)
        np.testing.assert_array_equal(forth, back[::-1])


def test_a_random_frame_has_the_same_distribution_in_every_motion():
    frames = {motion: tracks_of(motion, 3000) for motion in MOTIONS}
    times = np.random.default_rng(0).integers(8, size=3000)
    states = {motion: x[np.arange(3000), times] for motion, x in frames.items()}
    for motion in NAMES[1:]:
        for axis in range(3):
            assert ks_2samp(states[motion][:, axis], states[NAMES[0]][:, axis]).pvalue > 1e-3


def test_only_the_order_of_the_frames_tells_the_motion():
    tracks = np.concatenate([tracks_of(motion, 600) for motion in MOTIONS])
    labels = np.repeat(np.arange(6), 600)
    rng = np.random.default_rng(1)
    train = rng.permutation(len(labels)) < 2400
    one = tracks[np.arange(len(tracks)), rng.integers(8, size=len(tracks))]
    shuffled = rng.permuted(np.repeat(np.arange(8)[None], len(tracks), 0), axis=1)
    shuffled = np.take_along_axis(tracks, shuffled[..., None], 1)

    def accuracy(seen: np.ndarray) -> float:
        forest = RandomForestClassifier(100, min_samples_leaf=5, random_state=0)
        forest.fit(seen[train], labels[train])
        return float(forest.score(seen[~train], labels[~train]))

    # What each axis spans, how it ends, and every value: all that a classifier could want.
    differences = np.diff(tracks, axis=1).reshape(len(tracks), -1)
    assert accuracy(differences) > 0.99
    spans = np.ptp(shuffled, axis=1)
    # 1,200 of them: a standard deviation is 0.011 at one in six, 0.014 at one in two.
    assert accuracy(one) < 1 / 6 + 0.04
    assert 0.45 < accuracy(np.concatenate([spans, shuffled.reshape(len(tracks), -1)], 1)) < 0.55


def test_frames_of_one_clip_share_their_ground():
    frames = draw_clip(0, 0).frames
    # Rows that the object does not reach: it keeps its height.
    moving = (frames != frames[:1]).any((0, 2, 3))
    assert 0 < moving.sum() < 45


def test_class_folder_of_videos(tmp_path: Path):
    folder = write_class_folder(tmp_path / "clips", 24, seed=1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(motion.replace(" ", "_") for motion in MOTIONS)
    paths = sorted(folder.glob("*/*.mp4"), key=lambda path: path.stem)
    assert [path.parent.name for path in paths[:3]] == ["moving_left", "moving_right", "moving_up"]
    assert len(paths) == 24
    assert paths[9].read_bytes() == encode(draw_clip(1, 9).frames)
    assert decode(paths[9].read_bytes()).shape == (8, 64, 64, 3)


@pytest.mark.parametrize("text", ["caption", "motion"])
def test_shards_of_clips(tmp_path: Path, text):
    shards = ShardSet.open(write_clip_shards(tmp_path, 8, seed=1, num_frames=5, text=text))
    assert shards.num_samples == 8
    sample, clip = shards.read(7), draw_clip(1, 7, num_frames=5)
    assert sample.text == getattr(clip, text).encode()
    error = np.abs(decode(sample.image).astype(float) - clip.frames)
    assert error.shape == (5, 64, 64, 3)
    assert error.mean() < 4


def test_shards_of_single_frames(tmp_path: Path):
    shards = ShardSet.open(write_image_shards(tmp_path, 8, seed=1))
    sample, clip = shards.read(7), draw_clip(1, 7)
    assert sample.text == clip.still_caption.encode()
    pixels = np.asarray(Image.open(BytesIO(sample.image)))
    assert any((pixels == frame).all() for frame in clip.frames)
