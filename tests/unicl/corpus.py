"""A corpus of a few coloured squares, small enough to be written and trained on in seconds."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from unicl.data.shards import ShardWriter

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 60, 220),
    "yellow": (230, 220, 40),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
}


def png(colour: str, seed: int, size: int = 24) -> bytes:
    noise = np.random.default_rng(seed).normal(0, 8, (size, size, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_corpus(folder: Path, *, num_samples: int = 40, seed: int = 0) -> Path:
    names = list(COLOURS)
    with ShardWriter(folder, samples_per_shard=16) as writer:
        for index in range(num_samples):
            name = names[index % len(names)]
            image = png(name, seed * 10_000 + index)
            writer.write(f"{index:06d}", image, "png", f"{name} square")
    return folder


def small_recipe(train: Path, held_out: Path | None = None) -> dict[str, str]:
    keys = {
        "name": "small",
        "embed_dim": "16",
        "data.train": str(train),
        "data.num_workers": "0",
        "image_tower.model": "coswin_nano",
        "image_tower.image_size": "24",
        "image_tower.drop_path_rate": "0.1",
        "text_tower.width": "16",
        "text_tower.num_layers": "1",
        "text_tower.num_heads": "2",
        "text_tower.context_length": "16",
        "trainer.steps": "6",
        "trainer.batch_size": "12",
        "trainer.log_every": "2",
        "trainer.save_every": "2",
        "trainer.precision": "fp32",
        "schedule.warmup_steps": "2",
    }
    if held_out is not None:
        keys["evaluation.data"] = str(held_out)
    return keys
