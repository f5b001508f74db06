"""A linear classifier of features, and its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unicl.data.atomic import atomic_file
from unicl.errors import UniclError, UsageError
from unicl.evaluation.linear_probe.features import Features


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearProbe:
    """A linear classifier of features."""

    weight: Float[Tensor, "num_classes dim"] = field(repr=False)
    bias: Float[Tensor, " num_classes"] = field(repr=False)
    strength: float
    """C of the objective: the larger, the less the weights are held back."""
    names: tuple[str, ...] | None = field(default=None, repr=False)
    """The classes' names, if they are known."""
    model: str | None = field(default=None, repr=False)
    """Fingerprint of the model whose features it takes, if it is known."""

    def scores(self, features: Features) -> Float[Tensor, "_num_images num_classes"]:
        """Logits of every class: of a softmax, or one sigmoid each where images have many labels.

        Raises:
            UsageError: features and probe differ in width.
        """
        dim = self.weight.shape[1]
        if features.shape[1] != dim:
            raise UsageError(
                f"the probe was fitted on features of width {dim}, these are {features.shape[1]} "
                "wide: embed the images with the probe's own model"
            )
        weight, bias = self.weight.to(features.device), self.bias.to(features.device)
        return torch.addmm(bias, features.to(weight.dtype), weight.T)

    def predict(self, features: Features) -> Int[Tensor, " _num_images"]:
        """The class of the highest score.

        Raises:
            UsageError: features and probe differ in width.
        """
        return self.scores(features).argmax(dim=1)

    def save(self, path: Path) -> None:
        """Write the probe as one safetensors file.

        Raises:
            UniclError: the file cannot be written.
        """
        tensors = {"weight": self.weight, "bias": self.bias}
        metadata = {"format": "pt", "strength": repr(self.strength)}
        if self.names is not None:
            metadata["names"] = json.dumps(self.names)
        if self.model is not None:
            metadata["model"] = self.model
        data = save({name: value.contiguous() for name, value in tensors.items()}, metadata)
        with atomic_file(Path(path)) as file:
            file.write(data)

    @classmethod
    def load(cls, path: Path) -> "LinearProbe":
        """Read a probe that `save` wrote; its tensors lie on the CPU.

        Raises:
            UsageError: the file is missing or cannot be read, or holds no probe.
            UniclError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except OSError as error:
            reason = error.strerror or ("no such file" if not Path(path).exists() else str(error))
            raise UsageError(f"cannot read the probe {path}: {reason}") from error
        except SafetensorError as error:
            raise UniclError(f"the probe {path} is damaged: {error}; fit it again") from error
        try:
            return cls._of(tensors, metadata)
        except (KeyError, ValueError, TypeError) as error:
            raise UsageError(
                f"{path} holds no linear probe: it needs finite weights [classes, width], as many "
                "biases, a strength, and perhaps as many names"
            ) from error

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> "LinearProbe":
        weight, bias = tensors["weight"], tensors["bias"]
        names = tuple(json.loads(metadata["names"])) if "names" in metadata else None
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError("shapes")
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError("not finite")
        if names is not None and len(names) != len(weight):
            raise ValueError("names")
        return cls(
            weight=weight,
            bias=bias,
            strength=float(metadata["strength"]),
            names=names,
            model=metadata.get("model"),
        )
