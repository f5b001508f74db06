"""What a recipe of question answering says besides: co-attention, objectives, data. No torch.

Florence (2.5, 3.7) gives neither layers nor widths of its co-attention; the defaults are METER's
(Dou et al. 2022), which the paper follows.
"""

from dataclasses import dataclass, field
from typing import Literal

from unicl.config import Recipe, require_unset
from unicl.errors import UsageError

OF_MODEL = (
    *("objective", "text_encoder", "width", "num_layers", "num_heads", "mlp_ratio"),
    *("answers", "max_text_length"),
)
"""What decides the weights, and what they compute."""
READING = ("num_beams", "top_p", "max_words", "candidates", "towers")
"""How a model is used; at evaluation it may be another way than in training."""

_OF_PRETRAINING = (
    *("mask_share", "negatives", "negative_pool", "matching_weight", "words_weight"),
)
_OF_ANSWERS = ("answers", "min_answer_count", "split")
_ROBERTA = "roberta:"


@dataclass(frozen=True, kw_only=True)
class VqaConfig:
    """Co-attention over the two towers, and what it learns."""

    objective: Literal["pretraining", "answers", "captions"] = "answers"
    """pretraining: does a text match an image, and which words are hidden (ITM and MLM); answers:
    which of the known answers a question has; captions: the words of a text, one after another."""
    text_encoder: str = "tower"
    """tower: the text tower, all of whose tokens see each other; `roberta:FOLDER`, or a name of the
    hub that transformers has fetched: RoBERTa."""
    max_text_length: int = 50
    """Longest text in tokens, with start and end."""
    width: int = 768
    """Of both stacks of co-attention."""
    num_layers: int = 6
    """Layers of each stack."""
    num_heads: int = 12
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over the width."""
    dropout: float = 0.1
    """Share of attention weights and branches that is dropped in training."""
    checkpointing: bool = False
    """Recompute the activations of the co-attention's layers in the backward pass."""
    fusion_rate: float = 5.0
    """Factor of the learning rate of the co-attention; `optimizer.image_rate` and `text_rate` are
    those of the towers."""
    head_rate: float = 50.0
    """Factor of the learning rate of the heads; METER pretrains with 5."""
    matching_weight: float = 1.0
    """pretraining: weight of the matching loss."""
    words_weight: float = 1.0
    """pretraining: weight of the hidden words' loss."""
    mask_share: float = 0.15
    """pretraining: share of a text's words that are hidden, at least one."""
    negatives: Literal["hard", "random"] = "hard"
    """pretraining: texts that do not match. hard: of some drawn at random, one that the two towers
    of `weights`, as they are at the start, find similar to the image; random: any."""
    negative_pool: int = 32
    """pretraining, hard: how many texts are drawn for each image."""
    answers: tuple[str, ...] = ()
    """answers: the vocabulary; empty takes that of the data."""
    min_answer_count: int = 9
    """answers: questions that must have an answer for it to enter the vocabulary."""
    split: str = "train"
    """answers: part of the questions to train on; trainval is VQAv2's two without 1,000 images of
    the second, which are then measured on."""
    num_beams: int = 3
    """captions: beams of the search; 1 is greedy."""
    top_p: float = 0.0
    """captions: draw each word of the likeliest that have this probability together (nucleus
    sampling, Holtzman et al. 2020); 0 searches with beams."""
    max_words: int = 30
    """captions: longest caption in tokens."""
    candidates: int = 16
    """rerank: how many of the towers' best are looked at again."""
    towers: str = ""
    """rerank: the model whose candidates they are; empty takes the own towers."""

    def __post_init__(self) -> None:
        positive = (
            *("width", "num_layers", "num_heads", "mlp_ratio", "fusion_rate", "head_rate"),
            *("negative_pool", "min_answer_count", "num_beams", "max_words", "candidates"),
        )
        for name in positive:
            _require(getattr(self, name) > 0, name, "must be positive", getattr(self, name))
        _require(
            self.width % self.num_heads == 0,
            *("num_heads", f"must divide the width {self.width}", self.num_heads),
        )
        _require(
            self.max_text_length >= 3, "max_text_length", "must be at least 3", self.max_text_length
        )
        for name in ("dropout", "top_p"):
            _require(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)", getattr(self, name))
        share = self.mask_share
        _require(0 < share < 1, "mask_share", "must lie in (0, 1)", share)
        weights = (self.matching_weight, self.words_weight)
        _require(
            min(weights) >= 0 and max(weights) > 0,
            *("matching_weight", "and words_weight must not be negative, nor both 0", weights),
        )
        _require(
            self.text_encoder == "tower" or bool(self.roberta),
            *("text_encoder", "must be tower or roberta:FOLDER", self.text_encoder),
        )
        where = f"vqa.objective {self.objective}"
        if self.objective != "pretraining":
            require_unset(self, "vqa", where, *_OF_PRETRAINING)
        if self.objective != "answers":
            require_unset(self, "vqa", where, *_OF_ANSWERS)

    @property
    def roberta(self) -> str | None:
        """Folder or name of RoBERTa, where it is the text encoder."""
        is_roberta = self.text_encoder.startswith(_ROBERTA)
        return self.text_encoder.removeprefix(_ROBERTA) if is_roberta else None


@dataclass(frozen=True, kw_only=True)
class VqaRecipe(Recipe):
    """Everything a run of question answering is determined by.

    `data.train` is a folder of questions for the objective answers; for the others prepared shards
    or a set of images with captions, as `unicl eval` takes it.
    """

    task: str = "vqa"
    """What is trained."""
    vqa: VqaConfig = field(default_factory=VqaConfig)
    """Co-attention, objectives, data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None:
            raise UsageError(f"task vqa needs towers with tokens, not {self.model}")
        if self.data.flip:
            raise UsageError(
                "data.flip would turn left into right, which questions and captions name; leave it "
                "out"
            )
        if self.trainer.compile:
            raise UsageError(
                "trainer.compile has no effect on task vqa, whose texts differ in length; leave it "
                "out"
            )
        if self.vqa.roberta is None and self.vqa.max_text_length > self.text_tower.context_length:
            raise UsageError(
                f"vqa.max_text_length must be at most text_tower.context_length "
                f"{self.text_tower.context_length}, got {self.vqa.max_text_length}"
            )


def _require(condition: bool, name: str, must: str, value: object) -> None:
    if not condition:
        raise UsageError(f"vqa.{name} {must}, got {value}")
