"""A set as a source of shards: each file with its captions or the name of its class."""

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from unicl.data.image_sets.image_set import CaptionSet, ClassificationSet
from unicl.data.image_sets.samples import SetSamples
from unicl.data.shards import SampleError
from unicl.data.sources import Entry, SkippedEntry, image_type


@dataclass(frozen=True)
class SetSource:
    """What `unicl.data.prepare.prepare` writes shards of; a file with several captions comes often.

    Args:
        parts: The parts of a set, by the names of their shards' folders.
        file_type: Returns the extension that a file's content calls for; None for another medium.
        noun: What the files are, for messages.
    """

    parts: Mapping[str, ClassificationSet | CaptionSet]
    file_type: Callable[[bytes], str | None] = image_type
    noun: str = "an image"

    @property
    def name(self) -> str:
        """What messages call it."""
        return " and ".join(map(str, self.parts.values()))

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of its parts."""
        return tuple(self.parts)

    @property
    def info(self) -> dict[str, Any]:
        """What `dataset.json` shall say."""
        return {"source": self.name, "fingerprint": self.fingerprint}

    @property
    def fingerprint(self) -> str:
        """Digest that changes when files, classes or captions may have changed."""
        digest = blake2b(digest_size=16)
        for images in self.parts.values():
            digest.update(images.fingerprint.encode())
            if isinstance(images, CaptionSet):
                digest.update(json.dumps(images.captions).encode())
            else:
                digest.update(json.dumps(images.class_names).encode())
                digest.update(images.targets.tobytes())
        return digest.hexdigest()

    def num_entries(self, split: str) -> int:
        """Return the number of samples, and of what the set lacks."""
        images = self.parts[split]
        return SetSamples(images).num_samples + sum(images.skipped.values())

    def entries(self, split: str) -> Generator[Entry | SkippedEntry, None, None]:
        """Go through what the set lacks, then through its samples."""
        images = self.parts[split]
        for reason, count in images.skipped.items():
            for _ in range(count):
                yield SkippedEntry(reason, str(images))
        samples = SetSamples(images)
        for index in range(samples.num_samples):
            where, _ = samples.locate(index)
            try:
                sample = samples.read(index)
            except SampleError as error:
                yield SkippedEntry(error.reason, where)
                continue
            extension = self.file_type(sample.image)
            if extension is None:
                yield SkippedEntry(f"not {self.noun}", where)
                continue
            yield Entry(f"{index:08d}", sample.image, extension, (sample.text or b"").decode())
