"""A tiny RoBERTa in a folder, as transformers publishes one."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_TEXTS = (
    "a red circle, a blue square and a green cross",
    "what color is the circle?",
    "is there a yellow triangle?",
    "how many objects are there?",
    "a photo of a man riding a horse.",
)
# RoBERTa counts positions from the number after that of its padding.
_FIRST_POSITION = 2


def write_roberta(folder: Path, *, longest: int = 64) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files; weights follow a seed."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    model = RobertaModel(tiny_config(len(tokenizer), longest), add_pooling_layer=False)
    model.save_pretrained(folder)
    return folder


def tiny_config(num_tokens: int = 300, longest: int = 64) -> RobertaConfig:
    return RobertaConfig(
        vocab_size=num_tokens,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=longest + _FIRST_POSITION,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.3,
    )


def _tokenizer() -> RobertaTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_TEXTS, trainer)
    trained.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return RobertaTokenizerFast(tokenizer_object=trained)
