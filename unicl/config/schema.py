"""The configuration: one small frozen dataclass per component, composed into a `Recipe`.

Each component takes its own dataclass or plain arguments; the root is never passed down.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from unicl.errors import UsageError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _require_positive(config: object, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(value > 0, f"{section}.{name} must be positive, got {value}")
            _require(value < math.inf, f"{section}.{name} must be finite, got {value}")


def _require_not_negative(config: object, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 0, f"{section}.{name} must not be negative, got {value}")
        _require(value < math.inf, f"{section}.{name} must be finite, got {value}")


def require_unset(config: object, section: str, where: str, *names: str) -> None:
    """Refuse settings that have no effect."""
    defaults = {item.name: item.default for item in fields(config)}  # type: ignore[arg-type]
    for name in names:
        _require(
            getattr(config, name) == defaults[name],
            f"{section}.{name} has no effect on {where}; leave it out",
        )


PRETRAINING = "pretraining"
"""The task of a recipe that names none."""


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    """The image side: a backbone and a linear projection."""

    model: str = "coswin_tiny"
    """Name of a CoSwin or any other timm model."""
    image_size: int = 224
    """Side of the square input, in pixels."""
    window_size: int | None = None
    """Side of CoSwin's attention windows; unset takes the variant's own (7 at 224 pixels)."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; earlier blocks get proportionally less."""
    layer_scale: float | None = None
    """Initial LayerScale of CoSwin's blocks; unset means none."""
    checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass instead of keeping them."""
    weights: str | None = None
    """A safetensors file with backbone weights to start from."""
    locked: bool = False
    """Keep the weights to start from: no gradient, no optimizer state, no stochastic depth."""

    def __post_init__(self) -> None:
        _require_positive(self, "image_tower", "window_size", "layer_scale")
        _require(
            self.image_size >= 3,  # what the stem of CoSwin needs
            f"image_tower.image_size must be at least 3 pixels, got {self.image_size}",
        )
        _require(
            0 <= self.drop_path_rate < 1,
            f"image_tower.drop_path_rate must lie in [0, 1), got {self.drop_path_rate}",
        )
        if self.locked:
            require_unset(self, "image_tower", "a locked tower", "drop_path_rate", "checkpointing")


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """The text side: a pre-norm transformer over CLIP's byte-pair vocabulary."""

    width: int = 512
    """Width of the residual stream."""
    num_layers: int = 12
    """Number of transformer blocks; Florence has 12."""
    num_heads: int = 8
    """Attention heads; must divide the width."""
    mlp_width: int | None = None
    """Hidden width of the MLPs; unset means four times the width."""
    context_length: int = 77
    """Longest text in tokens, with start and end; longer texts are cut."""
    causal: bool = True
    """Each token sees only those before it (CLIP); false lets all tokens see each other (BERT)."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Of the MLPs; OpenAI's CLIP and UniCL's released models have quick_gelu."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm; UniCL's released models have 1e-12."""
    checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass instead of keeping them."""
    locked: bool = False
    """Keep the weights to start from: no gradient and no optimizer state."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "text_tower", "width", "num_layers", "num_heads", "mlp_width", "norm_eps"
        )
        _require(
            self.width % self.num_heads == 0,
            f"text_tower.num_heads must divide the width {self.width}, got {self.num_heads}",
        )
        _require(
            self.context_length >= 3,
            f"text_tower.context_length must be at least 3, got {self.context_length}",
        )
        if self.locked:
            require_unset(self, "text_tower", "a locked tower", "checkpointing")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The bidirectional supervised contrastive loss (Florence, equations 1 to 3)."""

    targets: Literal["unicl", "clip"] = "unicl"
    """What counts as a positive: equal labels (unicl), or only the sample's own text (clip)."""
    initial_scale: float = 14.285714
    """Scale of the similarities at step 0 (CLIP's 1/0.07), unless it comes with `weights`."""
    max_scale: float = 100.0
    """The scale is clamped to this in the forward pass."""
    tile: int = 2048
    """Rows and columns of the logits that exist at one time; the result does not depend on it."""

    def __post_init__(self) -> None:
        _require_positive(self, "loss", "tile")
        _require(
            0 < self.initial_scale <= self.max_scale,
            f"loss.initial_scale must lie in (0, {self.max_scale}], got {self.initial_scale}",
        )
        _require_positive(self, "loss", "max_scale")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data and what happens to a sample on its way into a batch."""

    train: str = ""
    """Folder of shards that `unicl prepare` wrote."""
    templates: Literal["none", "clip", "simple"] = "clip"
    """Prompt templates for short texts; none is the paper's second stage, without them."""
    short_text_words: int = 2
    """A text of at most this many words is short, and put into a template."""
    crop_scale: tuple[float, float] = (0.8, 1.0)
    """Area of the random crop, as a share of the image."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333)
    """Aspect ratio of the random crop."""
    flip: bool = False
    """Mirror half of the images; off by default, because texts name left and right."""
    shuffle_window: int = 16
    """Shards whose samples are mixed; more mixes better and reads less in sequence."""
    num_workers: int = 2
    """Processes that read and decode; 0 does it in the trainer's own process."""
    max_image_pixels: int = 89_478_485
    """Larger images are skipped as absurd; the number is Pillow's own limit."""
    max_skipped_share: float = 0.1
    """The run stops when more than this share of the samples read, at least 100, was skipped."""

    def __post_init__(self) -> None:
        _require_positive(self, "data", "shuffle_window", "max_image_pixels")
        _require_not_negative(self, "data", "short_text_words", "num_workers")
        low, high = self.crop_scale
        _require(
            0 < low <= high <= 1, f"data.crop_scale must rise within (0, 1], got {low}, {high}"
        )
        low, high = self.crop_ratio
        _require(
            0 < low <= high < math.inf, f"data.crop_ratio must rise above 0, got {low}, {high}"
        )
        _require(
            0 <= self.max_skipped_share <= 1,
            f"data.max_skipped_share must lie in [0, 1], got {self.max_skipped_share}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with the lineage's rules; biases, norms, scales and position tables do not decay."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and kernels."""
    clip_grad_norm: float | None = 1.0
    """The gradient is scaled down to at most this norm; unset does not clip."""
    image_rate: float = 1.0
    """Factor of the image tower's learning rate."""
    text_rate: float = 1.0
    """Factor of the text tower's learning rate."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer of a tower to the one below it (BEiT, Bao et al.
    2022); the projections, on top, have the full rate. 1 is off."""
    ema_decay: float | None = None
    """Share of the old value in each step of the weights' moving average, such as 0.9999; early
    steps keep less. The average is what is evaluated and loaded. Unset keeps none."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "optimizer",
            *("learning_rate", "eps", "clip_grad_norm", "image_rate", "text_rate"),
        )
        _require(
            0 < self.layer_decay <= 1,
            f"optimizer.layer_decay must lie in (0, 1], got {self.layer_decay}",
        )
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"optimizer.ema_decay must lie in (0, 1), got {self.ema_decay}",
        )
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas must lie in [0, 1), got {self.betas[0]}, {self.betas[1]}",
        )
        _require_not_negative(self, "optimizer", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then down to the final rate."""

    warmup_steps: int = 2000
    """Steps of linear warm-up from 0 to the peak rate."""
    final_learning_rate: float = 0.0
    """Rate at the last step."""
    decay: Literal["cosine", "linear"] = "cosine"
    """The way down from the peak: half a cosine, or a straight line."""

    def __post_init__(self) -> None:
        _require_not_negative(self, "schedule", "warmup_steps", "final_learning_rate")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, how large, how precisely, and what is written when."""

    steps: int = 100_000
    """Optimizer updates of the whole run."""
    batch_size: int = 256
    """Samples per step over all ranks."""
    chunk: int | None = None
    """Gradient cache: rows per rank whose activations exist at one time; unset keeps them all."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type of the towers. auto: bf16 on a GPU; on a CPU the faster of fp32 and bf16 in a
    step of each, or fp32 on several ranks."""
    compile: bool = False
    """Compile each tower by torch.compile: a slow start, then faster steps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    seed: int = 0
    """Decides initial weights, sample order, augmentation, templates and stochastic depth."""
    log_every: int = 50
    """Steps between log lines."""
    eval_every: int | None = None
    """Steps between evaluations; unset evaluates at the end only."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints to keep; older ones are removed once a newer one is complete."""
    keep_best: str | None = None
    """Metric (larger is better) whose best checkpoint is kept too, such as zero_shot/top1."""
    max_nonfinite: int = 0
    """Steps with a non-finite loss or gradient to skip before the run stops."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "trainer",
            *("steps", "batch_size", "chunk"),
            *("log_every", "eval_every", "save_every", "keep_last"),
        )
        _require(
            not (self.compile and self.chunk == 1),
            "trainer.compile needs a trainer.chunk of at least 2 rows",
        )
        _require(
            0 <= self.seed < 2**32, f"trainer.seed must lie in [0, 4294967296), got {self.seed}"
        )
        _require_not_negative(self, "trainer", "max_nonfinite")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How several ranks carry out a step; no result depends on it, but for the last bits."""

    backend: Literal["torch", "deepspeed"] = "torch"
    """torch keeps everything on every rank (DDP); deepspeed shares it out (ZeRO)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What deepspeed shares out: nothing, optimizer states, gradients too, parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in the host's memory and update there; needs ZeRO 1 to 3."""
    offload_parameters: bool = False
    """Keep this rank's part of the parameters in the host's memory; needs ZeRO 3."""
    reduce_every: Literal["step", "chunk"] = "step"
    """With a gradient cache: average gradients over the ranks once per step, which holds the whole
    gradient on every rank, or after every chunk, which keeps it shared out at ZeRO 2 and 3."""
    persistence_threshold: int = 100_000
    """Parameters with fewer elements stay whole on every rank at ZeRO 3."""
    timeout_seconds: int = 600
    """A rank that hears nothing from the others for so long ends the run."""

    def __post_init__(self) -> None:
        _require_positive(self, "engine", "timeout_seconds")
        _require_not_negative(self, "engine", "persistence_threshold")
        deepspeed = self.backend == "deepspeed"
        _require(
            not self.offload_optimizer or (deepspeed and self.zero_stage > 0),
            "engine.offload_optimizer needs engine.backend deepspeed and engine.zero_stage 1 to 3",
        )
        _require(
            not self.offload_parameters or (deepspeed and self.zero_stage == 3),
            "engine.offload_parameters needs engine.backend deepspeed and engine.zero_stage 3",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on held-out shards during and after training."""

    data: str | None = None
    """Folder of held-out shards with one name or caption per image; unset evaluates nothing."""
    names: str | None = None
    """Folder of shards whose texts are the zero-shot classes; unset takes those of `data`."""
    templates: Literal["none", "clip", "simple"] = "simple"
    """Prompt ensemble of the zero-shot classifier."""
    batch_size: int = 256
    """Images (of clips: frames) or texts per forward pass."""

    def __post_init__(self) -> None:
        _require_positive(self, "evaluation", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run is determined by."""

    name: str = "custom"
    """Name of the run's folder, unless `--out` says otherwise."""
    description: str = ""
    """One line for lists and reports."""
    task: str = PRETRAINING
    """What is trained: pretraining, or the task of a plug-in, which may add a section."""
    embed_dim: int = 512
    """Width of the space both towers project into."""
    model: str | None = None
    """A whole model of open_clip to train instead of towers that are built here, and the weights to
    start from: `open_clip:NAME[/WEIGHTS]`, or `open_clip:FOLDER` in its format. Its sizes are its
    own; of the towers' settings only `locked` and `checkpointing` apply."""
    weights: str | None = None
    """A run, one of its checkpoints, a folder that export wrote as safetensors, a safetensors file
    of a whole model, or a .pth file of UniCL's release to start from: both towers and the scale,
    carried to this recipe's image size, window and context length."""
    image_tower: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    """The image tower."""
    text_tower: TextTowerConfig = field(default_factory=TextTowerConfig)
    """The text tower."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""
    data: DataConfig = field(default_factory=DataConfig)
    """The training data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning-rate schedule."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The trainer."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engine."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The evaluation."""

    def __post_init__(self) -> None:
        _require(self.embed_dim > 0, f"embed_dim must be positive, got {self.embed_dim}")
        if self.model is not None:
            _require(
                self.model.startswith("open_clip:"),
                f"model must be open_clip:NAME[/WEIGHTS] or open_clip:FOLDER, got {self.model}; "
                "a run or a file to start from is `weights`",
            )
            for tower in ("image_tower", "text_tower"):
                config = getattr(self, tower)
                free = {"checkpointing", "locked", "image_size", "context_length"}
                names = [item.name for item in fields(config) if item.name not in free]
                require_unset(config, tower, "a `model` of open_clip", *names)
        both = self.image_tower.locked and self.text_tower.locked
        _require(
            not both or self.task != PRETRAINING,  # others may train what stands on the towers
            "image_tower.locked and text_tower.locked leave nothing to train; unlock one",
        )
        _require(
            not (self.trainer.compile and self.engine.zero_stage == 3)
            or self.engine.backend == "torch",
            "trainer.compile needs engine.zero_stage 0 to 2: at 3 every layer fetches its weights",
        )
        for tower in ("image", "text"):
            if getattr(self, f"{tower}_tower").locked:
                require_unset(self.optimizer, "optimizer", "a locked tower", f"{tower}_rate")
        if self.weights is not None:
            require_unset(self.image_tower, "image_tower", "a run with `weights`", "weights")
        _require(
            not self.image_tower.locked
            or bool(self.model or self.weights or self.image_tower.weights),
            "image_tower.locked needs `weights` or image_tower.weights: "
            "without them the tower would stay random",
        )
        _require(
            not self.text_tower.locked or bool(self.model or self.weights),
            "text_tower.locked needs `weights`: without them the tower would stay random",
        )
        if self.evaluation.data is None:
            for key, value in (
                ("trainer.keep_best", self.trainer.keep_best),
                ("evaluation.names", self.evaluation.names),
            ):
                _require(value is None, f"{key} needs evaluation.data, which is not set")
