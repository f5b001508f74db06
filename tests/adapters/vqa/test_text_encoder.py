"""Text encoders against the text tower and transformers, and damaged folders of RoBERTa."""

import json
import pickle
import shutil
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import RobertaForMaskedLM, RobertaModel

from adapters.vqa.text_encoder import (
    MASK,
    RobertaEncoder,
    TextEncoder,
    TowerEncoder,
    load_roberta,
    load_tokenizer,
)
from tests.adapters.vqa.roberta import tiny_config
from unicl.errors import UniclError, UsageError
from unicl.towers.text import TextTower

END, PAD, HIDES = 99, 1, 4
SIZES = {
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "context_length": 9,
    "embed_dim": 6,
    "vocabulary_size": END + 1,
}


def tower_encoder(**arguments):
    torch.manual_seed(1)
    encoder = TowerEncoder(**SIZES, **arguments)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def roberta_encoder():
    torch.manual_seed(1)
    return RobertaEncoder(tiny_config(), mask_token=HIDES).eval()


def tower_texts():
    return torch.tensor([[98, 5, 6, 7, END, 0, 0], [98, END, 0, 0, 0, 0, 0], [98, *range(5), END]])


def roberta_texts():
    texts = [[0, 5, 6, 7, 2, PAD, PAD], [0, 2, *[PAD] * 5], [0, 9, 8, 7, 6, 5, 2]]
    return torch.tensor(texts)


KINDS = [(tower_encoder, tower_texts), (roberta_encoder, roberta_texts)]


@pytest.mark.parametrize("causal", [False, True])
def test_the_state_at_the_end_is_what_the_tower_embeds(causal):
    encoder = tower_encoder()
    tower = TextTower(**SIZES, causal=causal)
    weights = encoder.state_dict()
    assert set(weights) - set(tower.state_dict()) == {"mask_embedding"}
    tower.load_state_dict(weights, strict=False)
    texts = tower_texts()
    states = encoder.encode(texts, causal=causal)
    ends = states[torch.arange(3), encoder.lengths(texts) - 1]
    torch.testing.assert_close(encoder.projection(ends), tower(texts))


@pytest.mark.parametrize("causal", [False, True])
def test_a_hidden_token_has_the_masks_vector_at_its_place(causal):
    encoder, texts = tower_encoder(), tower_texts()
    hidden = texts.clone()
    hidden[0, 2], hidden[2, 1], hidden[2, 4] = MASK, MASK, MASK
    # A tower in which a token of its own has the vector.
    plain = tower_encoder()
    spare = 50
    with torch.no_grad():
        plain.token_embedding.weight[spare] = plain.mask_embedding
    written = torch.where(hidden == MASK, spare, hidden)
    found = encoder.encode(hidden, causal=causal)
    torch.testing.assert_close(found, plain.encode(written, causal=causal))
    assert encoder.lengths(hidden).tolist() == encoder.lengths(texts).tolist() == [5, 2, 7]
    found.square().sum().backward()
    assert encoder.mask_embedding.grad.abs().max() > 0
    assert plain.token_embedding.weight.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_roberta_equals_transformers(causal, checkpointing):
    encoder, texts = roberta_encoder(), roberta_texts()
    encoder.set_grad_checkpointing(checkpointing)
    plain = RobertaModel(tiny_config(), add_pooling_layer=False).eval()
    plain.load_state_dict(encoder.model.state_dict())
    if causal:
        # A decoder is causal by itself.
        decoder = tiny_config()
        decoder.is_decoder = True
        decoder.use_cache = False
        plain = RobertaModel(decoder, add_pooling_layer=False).eval()
        plain.load_state_dict(encoder.model.state_dict())
    found = encoder.encode(texts, causal=causal)
    expected = plain(texts, attention_mask=(texts != PAD).long()).last_hidden_state
    there = texts != PAD
    torch.testing.assert_close(found[there], expected[there])
    hidden = texts.clone()
    hidden[0, 2] = MASK
    written = torch.where(hidden == MASK, HIDES, hidden)
    torch.testing.assert_close(
        encoder.encode(hidden, causal=causal), encoder.encode(written, causal=causal)
    )
    assert encoder.lengths(hidden).tolist() == [5, 2, 7]


@pytest.mark.parametrize(("build", "write"), KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(build, write, causal):
    encoder, texts = build(), write()
    assert isinstance(encoder, TextEncoder)
    assert encoder.width == 16
    states = encoder.encode(texts, causal=causal)
    assert states.shape == (3, 7, 16)
    for text, state, length in zip(texts, states, encoder.lengths(texts).tolist(), strict=True):
        alone = encoder.encode(text[None, :length], causal=causal)
        torch.testing.assert_close(state[:length], alone[0])


@pytest.mark.parametrize(("build", "write"), KINDS)
def test_only_who_speaks_does_not_see_what_comes(build, write):
    encoder, texts = build(), write()[2:]
    changed = texts.clone()
    changed[0, 4] = 11
    for causal in (False, True):
        states, others = (encoder.encode(each, causal=causal)[0] for each in (texts, changed))
        differ = ((states - others).abs().amax(1) > 1e-4).tolist()
        assert differ == ([False] * 4 + [True] * 3 if causal else [True] * 7)


@pytest.mark.parametrize(("build", "write"), KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_checkpointing_changes_no_gradient(build, write, causal):
    found = []
    for checkpointing in (False, True):
        encoder = build().train()
        encoder.set_grad_checkpointing(checkpointing)
        encoder.encode(write(), causal=causal).square().sum().backward()
        found.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


@pytest.mark.parametrize(("build", "write"), KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_computes_each_layer_again(build, write, checkpointing):
    encoder = build().train()
    encoder.set_grad_checkpointing(checkpointing)
    calls = []
    for layer in encoder.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_pre_hook(lambda module, _: calls.append(module))
    encoder.encode(write()).sum().backward()
    again = len(calls) - len(set(calls))
    # Both have two norms in each of two layers, of which the last may be needed no more.
    assert 2 <= again <= 4 if checkpointing else again == 0


def test_tables_do_not_decay():
    names = dict(roberta_encoder().named_parameters())
    kept = roberta_encoder().no_weight_decay()
    assert kept <= names.keys()
    tables = {f"model.embeddings.{each}_embeddings.weight" for each in ("word", "position")}
    assert kept >= tables
    assert not any(".layer." in name for name in kept)
    assert "token_embedding.weight" in tower_encoder().no_weight_decay()


@pytest.fixture
def folder(roberta, tmp_path):
    return shutil.copytree(roberta, tmp_path / "roberta")


def test_a_folders_weights_are_taken(folder):
    encoder = load_roberta(str(folder), weights=True)
    weights = load_file(folder / "model.safetensors")
    assert len(weights) > 30
    found = encoder.model.state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name
    assert encoder.mask_token == load_tokenizer(str(folder)).mask_token_id == HIDES
    start = load_roberta(str(folder), weights=False).model.state_dict()
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(start[name], weights[name])


def test_a_language_model_is_taken_without_its_head(folder):
    config = tiny_config(len(load_tokenizer(str(folder))))
    whole = RobertaForMaskedLM(config)
    whole.save_pretrained(folder)
    found = load_roberta(str(folder), weights=True).model.state_dict()
    expected = whole.roberta.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_halves_are_computed_in_full(folder):
    path = folder / "model.safetensors"
    halves = {name: weight.half() for name, weight in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})
    encoder = load_roberta(str(folder), weights=True)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


class Unpickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Unpickled(tmp_path / "ran")))
    with pytest.raises(UniclError, match=r"no file named model\.safetensors") as caught:
        load_roberta(str(folder), weights=True)
    assert_one_line(caught.value, folder)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_folder_is_not_run_and_nobody_asked(folder, tmp_path, monkeypatch):
    def ask(*_):
        pytest.fail("a person was asked")

    monkeypatch.setattr("builtins.input", ask)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}
    change(folder / "config.json", model_type="own", auto_map=auto_map)
    with pytest.raises(UniclError, match="custom code") as caught:
        load_roberta(str(folder), weights=True)
    assert_one_line(caught.value, folder)
    assert not (tmp_path / "ran").exists()


def test_another_type_of_model_is_named(folder):
    change(folder / "config.json", model_type="bert")
    with pytest.raises(UsageError, match="is bert, not roberta") as caught:
        load_roberta(str(folder), weights=True)
    assert_one_line(caught.value, folder)


@pytest.mark.parametrize("name", ["none", "runs/none", "/none/of/these", "../none", ""])
def test_what_is_not_there_is_told_without_the_network(name, monkeypatch):
    def ask(*_, **__):
        pytest.fail("the network was asked")

    # The hub's library asks which programs call it, whatever is loaded.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    for load in (load_tokenizer, lambda name: load_roberta(name, weights=True)):
        with pytest.raises(UniclError, match=r"config\.json, model\.safetensors") as caught:
            load(name)
        assert_one_line(caught.value, name)


def without(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:99])


def emptied(path):
    path.write_bytes(b"")


def an_empty_object(path):
    path.write_text("{}")


def a_list(path):
    path.write_text("[]")


def without_a_weight(path):
    weights = load_file(path)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def with_another_shape(path):
    weights = load_file(path)
    weights["encoder.layer.1.output.dense.weight"] = torch.zeros(3, 3)
    save_file(weights, path, metadata={"format": "pt"})


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("config.json", each) for each in (without, cut, emptied, an_empty_object, a_list)),
        ("config.json", lambda path: change(path, hidden_size="wide")),
        ("config.json", lambda path: change(path, num_attention_heads=5)),
        ("config.json", lambda path: change(path, vocab_size=-1)),
        ("config.json", lambda path: change(path, vocab_size=300)),
        *(("tokenizer.json", each) for each in (without, cut, emptied, an_empty_object, a_list)),
        *(("tokenizer_config.json", each) for each in (cut, emptied, a_list)),
        *(("model.safetensors", each) for each in (without, cut, emptied)),
        *(("model.safetensors", each) for each in (without_a_weight, with_another_shape)),
    ],
)
def test_a_damaged_file_is_one_line(folder, file, damage):
    damage(folder / file)
    with pytest.raises(UniclError, match="cannot read") as caught:
        load_roberta(str(folder), weights=True)
    assert_one_line(caught.value, folder)


def assert_one_line(error, name):
    message = str(error)
    assert "\n" not in message
    assert f"vqa.text_encoder {name}" in message


def test_without_transformers_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r'needs the library transformers: pip install "unicl\['):
        load_tokenizer("any")
