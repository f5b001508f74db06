"""What do recalls over 25,000 texts and 5,000 images cost beside CLIP_benchmark's?

The embeddings are drawn: each image has five texts that are its own embedding and noise, so much
that a third of the texts do not bring up their image first. The peer is `recall_at_k` of
CLIP_benchmark, applied in batches as its `evaluate` does, with the matrix of all similarities and
the matrix of right pairs. Ours brings median and mean ranks, too, which the peer does not have.
"""

from collections.abc import Callable, Mapping

import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import compare, peak_memory, ratio
from benchmarks.record import Bar, Result
from unicl.evaluation.retrieval import rank_metrics, right_ranks

_DIM = 512
_TEXTS_PER_IMAGE = 5
_KS = (1, 5, 10)
_BATCH = 64
"""CLIP_benchmark's default."""
_NOISE = 0.25

_SIDES = ("image to text", "text to image")

Figures = dict[str, float]


def measure(*, quick: bool) -> Result:
    """Both directions at all k: extra peak memory, time, and how far the values lie apart."""
    num_images = 200 if quick else 5000
    sides = _sides(num_images)
    timings = compare(sides, repeats=1 if quick else 3, warm_up=0 if quick else 1)
    own, peer, truth = sides["unicl"](), sides["CLIP_benchmark"](), brute_force(num_images)
    memory = {
        name: peak_memory("benchmarks.retrieval:memory_case", side=name, num_images=num_images)
        for name in sides
    }
    against = ratio(timings["unicl"], timings["CLIP_benchmark"])
    what = f"retrieval, {num_images * _TEXTS_PER_IMAGE:,} texts and {num_images:,} images"
    return Result(
        bars=[
            Bar(f"{what}, extra peak memory", memory["unicl"].extra, 200, "MiB", "at most"),
            Bar(
                f"{what}, largest difference to CLIP_benchmark's recalls",
                max(abs(own[name] - peer[name]) for name in peer),
                1e-6,
                "",
                "at most",
            ),
            Bar(
                f"{what}, largest difference to brute force in fp64",
                max(abs(own[name] - truth[name]) for name in truth),
                1e-6,
                "",
                "at most",
            ),
            Bar(
                f"{what}, time over CLIP_benchmark's",
                against.median,
                None,
                "x",
                "at most",
                (against.low, against.high),
            ),
        ],
        tables={
            "Both directions, recall at 1, 5 and 10": [
                {
                    "side": name,
                    "seconds": timings[name].median,
                    "extra_peak_mib": memory[name].extra,
                }
                for name in sides
            ],
            "Recalls and ranks": [
                {
                    "name": name,
                    "unicl": own[name],
                    "CLIP_benchmark": peer.get(name, "-"),
                    "fp64": truth[name],
                }
                for name in truth
            ],
        },
        facts={
            "dim": _DIM,
            "texts_per_image": _TEXTS_PER_IMAGE,
            "batch_of_clip_benchmark": _BATCH,
            "memory": "resident set above that after the embeddings and one small warm-up",
        },
    )


def memory_case(side: str, num_images: int) -> Callable[[], object]:
    """Make embeddings, and load the libraries' own buffers with a few of them."""
    _sides(20)[side]()
    return _sides(num_images)[side]


def embeddings(num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images, texts, and the image of each text."""
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(num_images, _DIM, generator=generator), dim=1)
    image_of = torch.arange(num_images).repeat_interleave(_TEXTS_PER_IMAGE)
    noise = torch.randn(len(image_of), _DIM, generator=generator)
    return images, normalize(images[image_of] + _NOISE * noise, dim=1), image_of


def brute_force(num_images: int) -> Figures:
    """Recalls and ranks by the whole ranking of each query in fp64."""
    images, texts, image_of = embeddings(num_images)
    images, texts = images.double(), texts.double()
    to_text = []
    for image, queries in enumerate(images.split(1)):
        similarities = (queries @ texts.T)[0]
        best = similarities[image_of == image].max()
        to_text.append(int(((similarities >= best) & (image_of != image)).sum()))
    to_image = []
    for text, queries in enumerate(texts.split(1)):
        similarities = (queries @ images.T)[0]
        to_image.append(int((similarities > similarities[image_of[text]]).sum()))
    return _metrics(torch.tensor(to_text) + 1, torch.tensor(to_image) + 1)


def _sides(num_images: int) -> Mapping[str, Callable[[], Figures]]:
    images, texts, image_of = embeddings(num_images)
    pairs = torch.stack([image_of, torch.arange(len(texts))], dim=1)

    def own() -> Figures:
        return _metrics(
            right_ranks(images, texts, pairs), right_ranks(texts, images, pairs.flip(1))
        )

    def peer() -> Figures:
        scores = texts @ images.T
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[torch.arange(len(scores)), image_of] = True

        def found(scores: Tensor, positive: Tensor, k: int) -> float:
            recalls = batchify(recall_at_k, scores, positive, _BATCH, "cpu", k=k)
            return (recalls > 0).double().mean().item()

        return {
            f"{side} r{k}": found(*tables, k)
            for side, tables in zip(
                _SIDES, ((scores.T, positive.T), (scores, positive)), strict=True
            )
            for k in _KS
        }

    return {"unicl": own, "CLIP_benchmark": peer}


def _metrics(to_text: Tensor, to_image: Tensor) -> Figures:
    return {
        f"{side} {name}": value
        for side, ranks in zip(_SIDES, (to_text, to_image), strict=True)
        for name, value in rank_metrics(ranks, _KS).items()
    }
