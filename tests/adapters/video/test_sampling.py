import numpy as np
import pytest

from adapters.video.sampling import ClipSampling
from unicl.errors import UsageError


def test_uniform_takes_the_middle_of_each_segment():
    sampling = ClipSampling(4)
    assert sampling.spread_clips(40, 1).tolist() == [[5, 15, 25, 35]]
    assert sampling.spread_clips(1, 1).tolist() == [[0, 0, 0, 0]]
    assert sampling.spread_clips(3, 1).tolist() == [[0, 1, 1, 2]]


def test_uniform_clips_interleave():
    clips = ClipSampling(4).spread_clips(16, 4)
    assert clips[:, 0].tolist() == [0, 1, 2, 3]
    assert sorted(clips.ravel().tolist()) == list(range(16))


def test_random_uniform_clips_take_any_frame_of_each_segment():
    sampling = ClipSampling(4)
    clips = np.concatenate([sampling.random_clip(20, seed) for seed in range(500)])
    assert [sorted(set(column)) for column in clips.T.tolist()] == [
        list(range(start, start + 5)) for start in (0, 5, 10, 15)
    ]
    counts = np.bincount(clips.ravel())
    # A frame is taken in 100 of 500 clips, give or take 9.
    assert (np.abs(counts - 100) < 40).all()


def reference_windows(length, num_frames, stride, num_clips):
    """mmaction2's formula (adapters of SampleFrames, test mode), padded by the last frame."""
    room = max(length - num_frames * stride, 0)
    if num_clips == 1:
        starts = [room // 2]
    else:
        starts = [round(clip * room / (num_clips - 1)) for clip in range(num_clips)]
    return [
        [min(start + number * stride, length - 1) for number in range(num_frames)]
        for start in starts
    ]


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 300])
@pytest.mark.parametrize("num_clips", [1, 2, 4, 10])
def test_dense_windows_are_mmaction2s(length, num_clips):
    got = ClipSampling(32, "dense", 2).spread_clips(length, num_clips).tolist()
    assert got == reference_windows(length, 32, 2, num_clips)


def test_random_dense_windows_lie_anywhere():
    sampling = ClipSampling(4, "dense", 3)
    clips = np.concatenate([sampling.random_clip(20, seed) for seed in range(400)])
    assert set(clips[:, 0].tolist()) == set(range(9))
    assert (np.diff(clips) == 3).all()
    assert clips.max() == 17


def test_a_short_video_is_prolonged_by_its_last_frame():
    sampling = ClipSampling(6, "dense", 2)
    assert sampling.random_clip(5, 3).tolist() == [[0, 2, 4, 4, 4, 4]]
    assert sampling.spread_clips(5, 2).tolist() == [[0, 2, 4, 4, 4, 4]] * 2


@pytest.mark.parametrize("method", ["uniform", "dense"])
def test_clips_ascend_inside_the_video_and_the_seed_decides(method):
    sampling = ClipSampling(16, method, 2)
    for length in (1, 7, 16, 33, 1000):
        for seed in (0, 1, 2**64 - 1):
            clip = sampling.random_clip(length, seed)
            assert clip.shape == (1, 16)
            assert (np.diff(clip) >= 0).all()
            assert 0 <= clip.min() <= clip.max() < length
            np.testing.assert_array_equal(clip, sampling.random_clip(length, seed))
    different = {sampling.random_clip(1000, seed).tobytes() for seed in range(50)}
    assert len(different) > 45


def test_wrong_settings_are_named():
    with pytest.raises(UsageError, match="no sampling 'sparse'; there are uniform and dense"):
        ClipSampling(8, "sparse")
    with pytest.raises(UsageError, match="must be positive, got 0 and 1"):
        ClipSampling(0)
