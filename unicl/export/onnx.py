"""ONNX: one graph a tower, bytes or tokens in, unit-length embeddings out."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unicl.errors import UniclError, UsageError
from unicl.export.card import Card, render
from unicl.export.folder import new_folder
from unicl.towers.open_clip import LOCAL, OpenClipImageTower
from unicl.towers.text import TextTower, tokenize
from unicl.towers.two_tower import TwoTower

_TOLERANCE = 1e-4
_TEXTS = ("a photo of a cat", "two dogs", "!")

_USAGE = """
import numpy as np
import onnxruntime
from open_clip import {maker}
from PIL import Image, ImageOps

image_tower = onnxruntime.InferenceSession("image.onnx")
text_tower = onnxruntime.InferenceSession("text.onnx")
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
{resize}
pixels = np.asarray(image).transpose(2, 0, 1)[None]  # uint8 [batch, 3, {size}, {size}]
tokens = {tokenizer}(["a cat", "a dog"], context_length={context}).numpy()
(images,) = image_tower.run(None, {{"pixels": pixels}})
(texts,) = text_tower.run(None, {{"tokens": tokens}})
logits = {scale:.6g} * images @ texts.T
"""
_MIDDLE = """
side = {crop:g} * min(image.size)
left, top = (image.width - side) / 2, (image.height - side) / 2
box = (left, top, left + side, top + side)
image = image.resize(({size}, {size}), Image.Resampling.BICUBIC, box=box)
"""
_CUT = """
short = min(image.size)
shape = [int({size} * side / short) for side in image.size]
left, top = (round((side - {size}) / 2) for side in shape)
image = image.resize(shape, Image.Resampling.{interpolation})
image = image.crop((left, top, left + {size}, top + {size}))
"""
_SQUASHED = """
image = image.resize(({size}, {size}), Image.Resampling.{interpolation})
"""
_PADDED = """
whole = ImageOps.contain(image, ({size}, {size}), Image.Resampling.{interpolation})
image = Image.new("RGB", ({size}, {size}), ({fill}, {fill}, {fill}))
image.paste(whole, (({size} - whole.width) // 2, ({size} - whole.height) // 2))
"""
_NOTE = """`image.onnx` takes RGB bytes of {size} x {size} pixels, made as above, and normalises
them itself. `text.onnx` takes int64 tokens of {context} positions, padded as the tokenizer pads
them. Both take any batch size and give unit-length float32 embeddings. Bring images of 16 bits per
colour to 8 bits before."""


def export_onnx(
    model: TwoTower,
    folder: Path,
    *,
    image_size: int,
    context_length: int,
    crop: float = 1.0,
    tokenizer: str | None = None,
    card: Card | None = None,
) -> Path:
    """Write `image.onnx`, `text.onnx` and a card, and compare what onnxruntime gives.

    Inputs are `pixels`, uint8 [batch, 3, image_size, image_size], and `tokens`, int64 [batch,
    context_length]; outputs are `embeddings`, unit-length float32 [batch, dim].

    Args:
        model: The two towers; it is not changed.
        folder: Where to; it must not be there yet, or be empty.
        image_size: Side of the images in pixels.
        context_length: Tokens of a text, padding included.
        crop: Side of the square that the card's code cuts from the middle of an image, as a share
            of its shorter side; open_clip's image towers have ways of their own.
        tokenizer: What `open_clip.get_tokenizer` takes for the model's own; unset takes CLIP's.
        card: What the model card says; unset takes the folder's name and nothing else.

    Raises:
        UsageError: onnx, onnxscript or onnxruntime is not installed, or the folder is not empty.
        UniclError: A tower cannot be exported, gives other embeddings, or the folder cannot be
            written; nothing is left behind.
    """
    _require_packages()
    card = card or Card(name=folder.name)
    model = copy.deepcopy(model).cpu().float().eval()
    pixels = torch.randint(0, 256, (3, 3, image_size, image_size), dtype=torch.uint8)
    if isinstance(model.text, TextTower):
        tokens = tokenize(_TEXTS, context_length)
    else:  # another vocabulary, of which nothing is known but that it is larger than this
        tokens = torch.randint(1, 100, (3, context_length))
    with new_folder(folder) as partial:
        _export(_Tower(model, "image"), pixels, partial / "image.onnx", name="pixels")
        _export(_Tower(model, "text"), tokens, partial / "text.onnx", name="tokens")
        sizes = {"size": image_size, "context": context_length}
        resize, (maker, made, *notes) = _resize(model, image_size, crop), _tokenizer(tokenizer)
        words = {"resize": resize, "maker": maker, "tokenizer": made, **sizes}
        text = render(
            card,
            library="onnx",
            usage=_USAGE.format(scale=model.scale().item(), **words),
            notes=[_NOTE.format(**sizes), *notes],
        )
        (partial / "README.md").write_text(text, encoding="utf-8")
    return folder


def _resize(model: TwoTower, size: int, crop: float) -> str:
    """What the card's code does to images: open_clip's towers have ways of their own."""
    if not isinstance(model.image, OpenClipImageTower):
        return _MIDDLE.strip().format(size=size, crop=crop)
    theirs = model.image.preprocess
    code = {"squash": _SQUASHED, "longest": _PADDED}.get(theirs.get("resize_mode", ""), _CUT)
    interpolation = theirs.get("interpolation", "bicubic").upper()
    fill = theirs.get("fill_color", 0)
    return code.strip().format(size=size, interpolation=interpolation, fill=fill)


def _tokenizer(name: str | None) -> tuple[str, ...]:
    """What the card's code imports, what it calls with texts, and perhaps a note."""
    if name is None:
        return "SimpleTokenizer", "SimpleTokenizer()"
    folder = name.removeprefix(LOCAL)
    if folder == name:
        return "get_tokenizer", f'get_tokenizer("{name}")'
    own = Path(folder).resolve().name  # the rest of the path means nothing elsewhere
    note = f"The tokenizer is that of the folder `{own}`, in open_clip's format: put it here, too."
    return "get_tokenizer", f'get_tokenizer("{LOCAL}{own}")', note


class _Tower(nn.Module):
    """One tower with the unit length that a two-tower model gives its features."""

    def __init__(self, model: TwoTower, tower: Literal["image", "text"]) -> None:
        super().__init__()
        self.model = model
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        if self.tower == "image":
            return self.model.encode_image(x)
        # The economies depend on the texts; a graph does not.
        return self.model.encode_text(x, economies=False)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401 - whether they are there
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"exporting to onnx needs {error.name}: pip install 'unicl[export]'"
        ) from error


def _export(tower: _Tower, example: Tensor, path: Path, *, name: str) -> None:
    """Write a tower's graph for any batch size, check it and compare it."""
    import onnx

    try:
        # The fused kernels lay their results out in their own ways, which the graph must not have.
        with warnings.catch_warnings(), _quiet(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                tower,
                (example,),
                input_names=[name],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        program.save(path)
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # torch.export, the exporter and the checker raise all sorts
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's, not the tower's
        reason = str(error).strip().partition("\n")[0]
        raise UniclError(f"torch cannot export the {tower.tower} tower: {reason}") from error
    _compare(tower, example, path, name=name)


def _compare(tower: _Tower, example: Tensor, path: Path, *, name: str) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (example, example[:1]):
        (theirs,) = session.run(None, {name: batch.numpy()})
        with torch.no_grad():
            difference = (tower(batch) - torch.from_numpy(theirs)).abs().max().item()
        if not difference < _TOLERANCE:
            raise UniclError(
                f"onnxruntime's embeddings of the {tower.tower} tower differ by {difference:.2g}; "
                "nothing was exported"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the optimizer's warnings of what it leaves as it is out of the log."""
    optimizer = logging.getLogger("onnxscript")
    level = optimizer.level
    optimizer.setLevel(logging.ERROR)
    try:
        yield
    finally:
        optimizer.setLevel(level)
