"""Text encoders: every token of a text as a state, for co-attention to look at (Florence 2.5).

Our own text tower, so that all runs without a download, or RoBERTa, as in METER.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unicl.errors import UniclError, UsageError
from unicl.towers.text import TextTower

MASK = -1
"""The token that hides a word. It is below all others, so that the largest still ends a text."""


# Nothing is fetched, and no code of a folder runs, nor is a person asked about it.
_AS_IT_LIES: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@runtime_checkable
class TextEncoder(Protocol):
    """What co-attention needs of the text side; a torch module."""

    @property
    def width(self) -> int:
        """Width of a state."""

    def lengths(self, tokens: Tensor) -> Tensor:
        """Return how many tokens each text has, its start and end included."""

    def encode(self, tokens: Tensor, *, causal: bool = False) -> Tensor:
        """Return a state per token; all tokens of a text see each other, or those before only."""


class TowerEncoder(TextTower):
    """The text tower, which also knows the token `MASK`.

    Its weights have the tower's names; the vector of `MASK` is one more.

    Args:
        arguments: `TextTower`'s.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.mask_embedding = nn.Parameter(torch.zeros(self.width))

    @property
    def width(self) -> int:
        """Width of a state."""
        return self.token_embedding.embedding_dim

    def lengths(self, tokens: Int[Tensor, "texts length"]) -> Int[Tensor, " texts"]:
        """Return how many tokens each text has: its end is the vocabulary's largest."""
        return tokens.argmax(1) + 1

    def encode(
        self, tokens: Int[Tensor, "texts length"], *, causal: bool = False
    ) -> Float[Tensor, "texts length width"]:
        """Return a normed state per token; of padding it means nothing.

        Raises:
            UsageError: The texts are longer than the context.
        """
        x = self.embed(tokens.clamp(min=0))
        hidden = self.mask_embedding + self.positional_embedding[: tokens.shape[1]]
        x = torch.where((tokens == MASK)[..., None], hidden, x)
        return self.norm(self.states(x, None if causal else tokens.argmax(1)))


class RobertaEncoder(nn.Module):
    """RoBERTa (Liu et al. 2019) of the library transformers.

    Args:
        config: transformers' `RobertaConfig`.
        mask_token: Number of its token that hides a word.
    """

    def __init__(self, config: Any, *, mask_token: int) -> None:
        super().__init__()
        transformers = import_transformers()
        config.use_cache = False  # of keys and values, for decoding only
        self.model = transformers.RobertaModel(config, add_pooling_layer=False)
        self.mask_token = mask_token

    @property
    def width(self) -> int:
        """Width of a state."""
        return self.model.config.hidden_size

    @property
    def longest(self) -> int:
        """Longest text in tokens: its positions are counted from behind that of the padding on."""
        config = self.model.config
        return config.max_position_embeddings - config.pad_token_id - 1

    def no_weight_decay(self) -> set[str]:
        """Name the embedding tables, which do not decay (Florence 3.7)."""
        return {f"model.{n}" for n, _ in self.model.named_parameters() if n.startswith("embed")}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers' activations in the backward pass, or keep them."""
        if enable:
            how = {"use_reentrant": False}
            self.model.activation_checkpointing_enable(how)
        else:
            self.model.activation_checkpointing_disable()

    def lengths(self, tokens: Int[Tensor, "texts length"]) -> Int[Tensor, " texts"]:
        """Return how many tokens each text has before its padding."""
        return (tokens != self.model.config.pad_token_id).sum(1)

    def encode(
        self, tokens: Int[Tensor, "texts length"], *, causal: bool = False
    ) -> Float[Tensor, "texts length width"]:
        """Return a state per token; of padding it means nothing."""
        there = tokens != self.model.config.pad_token_id
        mask = there[:, None, None].expand(-1, 1, tokens.shape[1], -1)
        if causal:
            mask = mask & mask.new_ones(tokens.shape[1], tokens.shape[1]).tril()
        hidden = torch.where(tokens == MASK, self.mask_token, tokens)
        return self.model(input_ids=hidden, attention_mask=mask).last_hidden_state


def load_roberta(name: str, *, weights: bool) -> RobertaEncoder:
    """Build RoBERTa as a folder or a name of the hub says.

    Args:
        name: A folder with config.json, model.safetensors and the tokenizer's files, or a name that
            transformers has fetched before, such as `FacebookAI/roberta-base`.
        weights: Load its weights, which must be safetensors: nothing is unpickled.

    Raises:
        UsageError: There is no such model, or it is not RoBERTa.
        UniclError: Its files are damaged.
    """
    transformers = import_transformers()
    tokenizer = load_tokenizer(name)
    with _reading(name):
        config = transformers.AutoConfig.from_pretrained(name, **_AS_IT_LIES)
    if config.model_type != "roberta":
        raise UsageError(f"vqa.text_encoder {name} is {config.model_type}, not roberta")
    with _reading(name):
        encoder = RobertaEncoder(config, mask_token=tokenizer.mask_token_id)
        if weights:
            encoder.model, report = transformers.RobertaModel.from_pretrained(
                name,
                config=config,
                add_pooling_layer=False,
                use_safetensors=True,
                output_loading_info=True,
                **_AS_IT_LIES,
            )
            if missing := sorted(report["missing_keys"]):  # they would be random
                raise ValueError(f"model.safetensors lacks {missing[0]}")
    return encoder


def load_tokenizer(name: str) -> Any:
    """Load RoBERTa's tokenizer by a folder or a name of the hub.

    Raises:
        UsageError: There is none.
        UniclError: Its files are damaged.
    """
    with _reading(name):
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(name, **_AS_IT_LIES)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what it makes of missing files
            raise ValueError("there is no vocabulary")
    return tokenizer


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except UniclError:
        raise
    except Exception as error:  # damaged files make transformers raise all sorts
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UniclError:
    reason = " ".join(str(error).split())[:200]
    what = f"cannot read vqa.text_encoder {name}"
    needs = "config.json, model.safetensors and tokenizer.json"
    if Path(name).is_dir():
        return UniclError(f"{what}: {reason}; the folder needs {needs}")
    return UsageError(f"{what}: {reason}; name a folder with {needs}")


def import_transformers() -> Any:
    """Import transformers, which takes a second.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            'RoBERTa needs the library transformers: pip install "unicl[vqa]"'
        ) from error
    return transformers
