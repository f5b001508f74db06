"""From images to the objects that a detector finds in them, in the images' own pixels."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from adapters.detection.config import DetectionConfig
from adapters.detection.detector import Detector
from adapters.detection.found import Detections, detections, put_together
from adapters.detection.reading import DetectionBatch, JoinedSets, open_annotated
from adapters.detection.regions import cropped_embeddings, name_proposals, pooled_embeddings
from adapters.detection.transforms import EvalTransform, pad
from unicl.data.augment import open_image
from unicl.data.loader import BatchLoader
from unicl.evaluation.embeddings import computing_in, device_of, evaluating

_NO_BOXES = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Finder:
    """A detector and how it looks at images.

    Args:
        model: The detector.
        config: Sizes, thresholds, and how proposals are named.
        names: Unit-length embeddings [classes, dim] of what is looked for; unset for classes that
            are numbers, and for proposals without names.
        crop_size: Side of the image that a proposal is encoded as.
        autocast: Type of the arithmetic; unset is fp32.
    """

    model: Detector
    config: DetectionConfig
    names: Float[Tensor, "classes dim"] | None = None
    crop_size: int = 224
    autocast: Any = None

    def in_image(self, image: Image.Image) -> Detections:
        """Find objects in an upright RGB image."""
        views = []
        for size in self.config.test_sizes:
            resized, *_ = EvalTransform(size, self.config.max_size)(image, *_NO_BOXES, 0)
            sizes = torch.tensor([resized.shape[1:]])
            originals = torch.tensor([(image.height, image.width)])
            views += self._in_batch(pad([resized]), sizes, originals)
        found = self._joined(views)
        return self._named(found, image) if self._names_proposals else found

    def in_samples(
        self, samples: JoinedSets, loaders: Sequence[BatchLoader[DetectionBatch]]
    ) -> tuple[dict[int, Detections], dict[str, int]]:
        """Find objects in this rank's part of all images.

        Args:
            samples: What the loaders read; proposals are cut out of the files themselves.
            loaders: One per size in `test_sizes`.

        Returns:
            What was found, by the number of the image; and how many images were left out, by
            reason.
        """
        views: dict[int, list[Detections]] = {}
        skipped: Counter[str] = Counter()
        for loader in loaders:
            skipped.clear()  # each of them skips the same
            for batch in loader.epoch():
                skipped.update(batch.skipped)
                found = self._in_batch(batch.images, batch.sizes, batch.originals)
                for row, each in zip(batch.rows.tolist(), found, strict=True):
                    views.setdefault(row, []).append(each)
        joined = {row: self._joined(each) for row, each in views.items()}
        if self._names_proposals:
            joined = {row: self._named(each, _open(samples, row)) for row, each in joined.items()}
        return joined, dict(skipped)

    @property
    def _names_proposals(self) -> bool:
        return self.names is not None and not self.model.by_text

    def _in_batch(
        self,
        images: UInt8[Tensor, "n 3 height width"],
        sizes: Int[Tensor, "n 2"],
        originals: Int[Tensor, "n 2"],
    ) -> list[Detections]:
        """Find objects in one padded size of images, in pixels of the originals."""
        if not len(images):
            return []
        model, device = self.model, device_of(self.model)
        with evaluating(model), computing_in(device, self.autocast):
            all_places = model.places(images.to(device))
            anchors = model.anchors(*images.shape[-2:])
        names = self.names.to(device) if model.by_text and self.names is not None else None
        found = []
        for number, (size, original) in enumerate(
            zip(sizes.tolist(), originals.tolist(), strict=True)
        ):
            # One by one: logits of thousands of names are larger than all else.
            with torch.no_grad():
                prediction = model.predict(all_places[number : number + 1], names)
            each = detections(
                prediction.logits[0].sigmoid(),
                prediction.deltas[0],
                prediction.centerness[0],
                anchors,
                size=tuple(size),
                threshold=self.config.score_threshold,
                most=self.config.max_detections,
            )
            across, down = original[1] / size[1], original[0] / size[0]
            scale = each.boxes.new_tensor([across, down, across, down])
            found.append(Detections(*(t.cpu() for t in each._replace(boxes=each.boxes * scale))))
        return found

    def _joined(self, views: list[Detections]) -> Detections:
        return views[0] if len(views) == 1 else put_together(views, most=self.config.max_detections)

    def _named(self, proposals: Detections, image: Image.Image) -> Detections:
        """Name proposals by the two towers (Florence 3.6)."""
        if not len(proposals.boxes) or self.names is None:
            return proposals
        model, device = self.model, device_of(self.model)
        with evaluating(model), computing_in(device, self.autocast):
            if self.config.regions == "crop":
                pixels, _, _ = _whole(image)
                embed: Callable[..., Tensor] = cropped_embeddings
                regions = embed(model, pixels.to(device), proposals.boxes, size=self.crop_size)
            else:
                size = self.config.test_sizes[-1]
                resized, boxes, _ = EvalTransform(size, self.config.max_size)(image, *_NO_BOXES, 0)
                share = resized.shape[2] / image.width, resized.shape[1] / image.height
                boxes = proposals.boxes * torch.tensor([*share, *share])
                regions = pooled_embeddings(model, pad([resized])[0].to(device), boxes.to(device))
            scale = model.scale().item()
        return name_proposals(
            regions.float().cpu(),
            proposals.scores,
            proposals.boxes,
            self.names.float().cpu(),
            scale=scale,
            most=self.config.max_detections,
        )


def _whole(image: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels [3, height, width] of an upright image, as they are."""
    shorter, longer = sorted(image.size)
    return EvalTransform(shorter, longer)(image, *_NO_BOXES, 0)


def _open(samples: JoinedSets, index: int) -> Image.Image:
    number, row = samples.place(index)
    images = samples.sets[number]
    return open_annotated(
        open_image(images.files.read(row).image), tuple(images.sizes[row].tolist())
    )
