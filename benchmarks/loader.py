"""How many samples per second does the loader deliver beside open_clip's?"""

import random
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import open_clip
import webdataset as wds
from matplotlib.cbook import get_sample_data
from PIL import Image

from benchmarks.captions import draw_captions
from benchmarks.harness import compare, ratio
from benchmarks.record import Bar, Result
from unicl.data.augment import TrainTransform
from unicl.data.loader import Loader
from unicl.data.order import SampleOrder
from unicl.data.prompts import PromptSampler
from unicl.data.reader import ImageDecoder
from unicl.data.shards import ShardSet, ShardWriter
from unicl.towers.text import tokenize

_BATCH = 32
_SIDE = 512
_QUALITY = 90
_CROP_SCALE = (0.9, 1.0)  # open_clip's own


def measure(*, quick: bool) -> Result:
    """One pass over the same shards in one process: read, decode, crop, tokenize. No bar."""
    num_samples = _BATCH if quick else 8 * _BATCH
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        _write_shards(shards, num_samples)
        for size in (224, 48):
            sides = {"unicl": _own(shards, size), "open_clip": _peer(shards, size)}
            timings = compare(sides, repeats=1 if quick else 3)
            gain = ratio(timings["open_clip"], timings["unicl"])
            what = f"loader, samples/s of one process over open_clip's, {size} pixels"
            bars.append(Bar(what, gain.median, None, "x", "at least", (gain.low, gain.high)))
            rows += [
                {
                    "loader": side,
                    "image_size": size,
                    "samples_per_second": num_samples / timing.median,
                    "seconds": timing.median,
                }
                for side, timing in timings.items()
            ]
    return Result(
        bars=bars,
        tables={"Samples per second of one process": rows},
        facts={
            "num_samples": num_samples,
            "images": f"crops of a photograph, {_SIDE} x {_SIDE} pixels, JPEG quality {_QUALITY}",
            "crop_scale": _CROP_SCALE,
            "num_workers": 0,
            "difference": "open_clip's images come out as normalised fp32, ours as bytes",
        },
    )


def _write_shards(folder: Path, num_samples: int) -> None:
    generator = random.Random(0)
    path = get_sample_data("grace_hopper.jpg", asfileobj=False)
    photograph = Image.open(str(path)).convert("RGB")
    captions = draw_captions(num_samples)
    with ShardWriter(folder, samples_per_shard=num_samples) as writer:
        for number, caption in enumerate(captions):
            side = generator.randint(_SIDE * 3 // 4, min(photograph.size))
            left, top = (generator.randint(0, length - side) for length in photograph.size)
            box = (left, top, left + side, top + side)
            data = BytesIO()
            photograph.resize((_SIDE, _SIDE), box=box).save(data, "JPEG", quality=_QUALITY)
            writer.write(f"{number:05d}", data.getvalue(), "jpg", caption)


def _own(folder: Path, size: int) -> Callable[[], int]:
    shards = ShardSet.open(folder)
    loader = Loader(
        shards,
        SampleOrder(shards.shard_sizes, seed=0, window=1),
        decode=ImageDecoder(
            TrainTransform(size, scale=_CROP_SCALE), max_pixels=Image.MAX_IMAGE_PIXELS or 0
        ),
        tokenize=tokenize,
        prompts=PromptSampler("none", short_text_words=0, seed=0),
        batch_size=_BATCH,
        num_workers=0,
        seed=0,
        max_skipped_share=0.0,
    )
    return lambda: sum(len(batch.keys) for batch in loader.epoch())


def _peer(folder: Path, size: int) -> Callable[[], int]:
    """Build the stages of `open_clip_train.data.get_wds_dataset`, whose module needs pandas."""
    transform = open_clip.image_transform(size, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(str(folder / "shard-000000.tar")),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(_BATCH, partial=False),
    )
    loader = wds.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=0)
    return lambda: sum(len(images) for images, _ in loader)
