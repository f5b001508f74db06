"""Both sides of the GPU benchmark: our two towers under our step, open_clip's under its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from benchmarks.captions import draw_tokens
from benchmarks.training import OpenClipStep, forward_flops, own_step
from unicl.config import OptimizerConfig
from unicl.distributed import ALONE
from unicl.engine.task import TaskInputs
from unicl.engine.torch_backend import TorchBackend
from unicl.loss import reference_loss
from unicl.pretraining import Pretraining
from unicl.towers.image import ImageTower
from unicl.towers.text import TextTower, deduplicate, trim
from unicl.towers.two_tower import TwoTower

_PRECISION = "bf16"
# More than there are shapes of blocks: four stages, shifted or not, and the text tower's.
_COMPILED_VARIANTS = 32


@dataclass(frozen=True)
class TextSize:
    """The text tower, on both sides."""

    width: int
    num_heads: int
    mlp_width: int
    num_layers: int = 12


@dataclass(frozen=True)
class Subject:
    """A CoSwin with its text tower, and the ViT that open_clip trains beside it.

    The ViT gets the depth with which its FLOPs per image come closest to CoSwin's.
    """

    name: str
    model: str
    text: TextSize
    vit_width: int
    vit_patch: int
    micro_batch_size: int
    """What fits 80 GB without any economy; halved where it does not."""
    goal: float | None = None
    """Per cent of the device's peak."""
    image_size: int = 224
    embed_dim: int = 512


@dataclass(frozen=True)
class Case:
    """One way to run the step; all but the first differ from it in one economy."""

    name: str
    checkpointing: bool = False
    chunks: int = 1
    text_economies: bool = True
    dense_loss: bool = False
    compiled: bool = False


PLAIN = Case("plain")
COMPILED = Case("blocks compiled", compiled=True)


class _Task(Pretraining):
    """Pretraining of which a case can switch economies off."""

    case = PLAIN

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        if tower != "text":
            return super().encode(tower, rows)
        return self.model.encode_text(rows, self.case.text_economies, deduplicated=True)

    def loss(
        self, embeddings: dict[str, Tensor], context: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.case.dense_loss:
            return super().loss(embeddings, context)
        (scale,) = embeddings["scale"]
        texts = embeddings["text"][context["inverse"]]
        return reference_loss(embeddings["image"], texts, context["labels"], scale), {}


class Own:
    """Our towers, trained by our step."""

    name = "unicl"

    def __init__(self, subject: Subject, device: torch.device, compiler: str) -> None:
        self.subject, self.device = subject, device
        torch.manual_seed(0)
        with self.device:  # a GPU draws the weights of the largest towers in no time
            self.image = ImageTower(
                subject.model, embed_dim=subject.embed_dim, image_size=subject.image_size
            )
            self.text = TextTower(embed_dim=subject.embed_dim, **asdict(subject.text))
            self.task = _Task(TwoTower(self.image, self.text))
            shape = (subject.micro_batch_size, 3, subject.image_size, subject.image_size)
            self.images = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.backend = TorchBackend(self.task, OptimizerConfig(), ALONE)
        self.backend.encoder.precision = _PRECISION
        self.image_flops = forward_flops(lambda: self.image(self.images[:1]))
        self._text_flops: dict[int, float] = {}
        compile_blocks(self.task.model, compiler)

    def ready_images(self) -> Tensor:
        """Return the images as open_clip's loader would hand them over."""
        return (self.images.float() - self.image.mean) / self.image.std

    def drop(self) -> None:
        """Forget what a step that failed may have left."""
        self.backend.drop()

    def prepare(self, case: Case, batch_size: int) -> Callable[[], Tensor]:
        """Lay out the inputs; return the step, which returns its loss."""
        inputs = self._inputs(case, batch_size).to(self.device)

        def run() -> Tensor:
            self.task.case = case
            for tower in (self.image, self.text):
                tower.set_grad_checkpointing(case.checkpointing)
            chunks = min(case.chunks, batch_size)
            with _stance(case):
                return own_step(self.task, self.backend, inputs, chunks=chunks)

        return run

    def flops(self, case: Case, batch_size: int) -> float:
        """Count a forward of both towers: of texts, what the case's economies leave."""
        texts = self._inputs(case, batch_size).towers["text"]
        parts = texts.tensor_split(min(case.chunks, batch_size))
        lengths = [trim(part).shape[1] if case.text_economies else part.shape[1] for part in parts]
        text = sum(
            len(part) * self._flops_of_text(length)
            for part, length in zip(parts, lengths, strict=True)
        )
        return batch_size * self.image_flops + text

    def describe(self) -> dict[str, object]:
        """Say what is trained."""
        return {
            "image_size": self.subject.image_size,
            "text_tower": "width {width}, {num_layers} layers".format(**asdict(self.subject.text)),
            "parameters_m": sum(p.numel() for p in self.task.model.parameters()) / 1e6,
            "image_gflops": self.image_flops / 1e9,
        }

    def _inputs(self, case: Case, batch_size: int) -> TaskInputs:
        tokens = draw_tokens(batch_size)
        texts, inverse = deduplicate(tokens)
        context = {"labels": inverse, "inverse": inverse}  # equal texts are equal labels
        if not case.text_economies:
            texts, context["inverse"] = tokens, torch.arange(batch_size)
        images = self.images[:batch_size]
        return TaskInputs({"image": images, "text": texts, "scale": torch.zeros(1)}, context)

    def _flops_of_text(self, length: int) -> float:
        if length not in self._text_flops:
            tokens = torch.ones(1, length, dtype=torch.int64, device=self.device)
            with _stance(PLAIN):
                self._text_flops[length] = forward_flops(lambda: self.text(tokens))
        return self._text_flops[length]


class Peer:
    """open_clip's ViT of nearly equal FLOPs and its text tower, trained by open_clip's step."""

    name = "open_clip"

    def __init__(self, subject: Subject, images: Tensor, flops: float, compiler: str) -> None:
        self.subject, self.images = subject, images
        self.layers = nearest_depth(subject, flops)
        torch.manual_seed(0)
        with images.device:
            model = _open_clip_model(subject, self.layers)
        self.step = OpenClipStep(model, _PRECISION)
        tokens = draw_tokens(1).to(images.device)
        self.image_flops = forward_flops(lambda: model.encode_image(images[:1]))
        self._text_flops = forward_flops(lambda: model.encode_text(tokens))
        compile_blocks(model, compiler)

    def drop(self) -> None:
        """Forget what a step that failed may have left."""
        self.step.optimizer.zero_grad()

    def prepare(self, case: Case, batch_size: int) -> Callable[[], Tensor]:
        """Lay out the inputs; return the step, which returns its loss."""
        images, tokens = self.images[:batch_size], draw_tokens(batch_size).to(self.images.device)

        def run() -> Tensor:
            with _stance(case):
                return self.step(images, tokens)

        return run

    def flops(self, case: Case, batch_size: int) -> float:
        """Count a forward of both towers; the texts are whole."""
        return batch_size * (self.image_flops + self._text_flops)

    def describe(self) -> dict[str, object]:
        """Say what is trained."""
        vit = self.subject
        return {
            "peer": f"ViT, width {vit.vit_width}, patch {vit.vit_patch}, {self.layers} layers",
            "peer_parameters_m": sum(p.numel() for p in self.step.model.parameters()) / 1e6,
            "peer_image_gflops": self.image_flops / 1e9,
        }


def nearest_depth(subject: Subject, flops: float) -> int:
    """Return the depth with which the peer's image tower comes closest to these FLOPs."""
    with torch.device("meta"):
        images = torch.zeros(1, 3, subject.image_size, subject.image_size)
        models = [_open_clip_model(subject, depth) for depth in (1, 2)]
        one, two = (forward_flops(partial(model.encode_image, images)) for model in models)
    return max(1, round(1 + (flops - one) / (two - one)))


def _open_clip_model(subject: Subject, layers: int) -> CLIP:
    text = subject.text
    return CLIP(
        subject.embed_dim,
        CLIPVisionCfg(
            layers=layers,
            width=subject.vit_width,
            patch_size=subject.vit_patch,
            image_size=subject.image_size,
        ),
        CLIPTextCfg(
            width=text.width,
            heads=text.num_heads,
            layers=text.num_layers,
            mlp_ratio=text.mlp_width / text.width,
        ),
    )


def compile_blocks(model: nn.Module, compiler: str) -> None:
    """Make the towers' blocks compile when first called, one by one.

    Blocks of one shape share their code, so it takes a small part of the time that whole towers of
    dozens of blocks would take, and what lies between blocks costs little.
    """
    torch._dynamo.config.recompile_limit = _COMPILED_VARIANTS
    for module in model.modules():
        if type(module).__name__.endswith("Block"):
            # Sizes never change within a case: general code would only be slower.
            module.compile(backend=compiler, dynamic=False)


def _stance(case: Case) -> AbstractContextManager[object]:
    return torch.compiler.set_stance("default" if case.compiled else "force_eager")
