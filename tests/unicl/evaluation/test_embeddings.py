import pytest
import torch

from tests.unicl.evaluation.toys import NAMES, ToyModel, ToySamples, every_name, tokenize
from unicl.errors import UniclError
from unicl.evaluation.embeddings import embed_images, embed_texts, evaluating


def test_images_keep_the_order_of_the_set() -> None:
    model = ToyModel().eval()
    embedded = embed_images(model, every_name())
    images = torch.cat([batch.images for batch in every_name().epoch()])
    torch.testing.assert_close(embedded.embeddings, model.encode_image(images).detach())
    assert embedded.embeddings.dtype == torch.float32
    assert embedded.texts == NAMES * 2
    assert embedded.keys == tuple(f"key{row}" for row in range(12))
    assert torch.equal(embedded.labels[:6], embedded.labels[6:])


def test_no_gradient_and_no_dropout() -> None:
    model = ToyModel().train()
    first, second = (embed_images(model, every_name()).embeddings for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not embed_texts(model, ["cat"], tokenize).requires_grad


def test_every_module_gets_its_mode_back() -> None:
    model = ToyModel().train()
    model.pixels.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert model.dropout.training
    assert not model.pixels.training


def test_an_error_gives_the_mode_back_too() -> None:
    model = ToyModel().train()
    with pytest.raises(UniclError):
        embed_images(model, ToySamples([]))
    assert model.training


def test_equal_pixels_have_equal_contents() -> None:
    samples = ToySamples([(0, "cat", 0), (1, "dog", 0), (0, "a cat", 0), (0, "cat", 1)])
    contents = embed_images(ToyModel(), samples).contents
    assert contents[0] == contents[2]
    assert len(set(contents)) == 3
    assert embed_images(ToyModel(), samples, contents=False).contents == ()


def test_texts_come_back_in_order_whatever_their_length() -> None:
    model = ToyModel().eval()
    texts = [name * (1 + n % 3) for n, name in enumerate(NAMES * 5)]
    embedded = embed_texts(model, texts, tokenize, 4)
    alone = torch.cat([model.encode_text(tokenize([text])) for text in texts])
    torch.testing.assert_close(embedded, alone.detach())


def test_texts_of_one_length_share_a_batch() -> None:
    model = ToyModel()
    embed_texts(model, ["aaaa", "b", "cccc", "d", "eeee", "f"], tokenize, 3)
    lengths = [(tokens != 0).sum(dim=1).tolist() for tokens in model.text_batches]
    assert lengths == [[1, 1, 1], [4, 4, 4]]


def test_blocks_of_texts_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [name * (1 + n % 3) for n, name in enumerate(NAMES * 5)]
    whole = embed_texts(ToyModel(), texts, tokenize, 4)
    monkeypatch.setattr("unicl.evaluation.embeddings._BATCHES_PER_BLOCK", 2)
    torch.testing.assert_close(embed_texts(ToyModel(), texts, tokenize, 4), whole)


def test_autocast_reaches_the_towers() -> None:
    model = ToyModel()
    embedded = embed_images(model, every_name(), autocast=torch.bfloat16)
    assert all(model.autocast)
    assert embedded.embeddings.dtype == torch.float32
    exact = embed_images(model, every_name()).embeddings
    assert 0 < (embedded.embeddings - exact).abs().max() < 0.05


def test_a_diverged_model_is_an_error_that_names_the_sample() -> None:
    model = ToyModel()
    torch.nn.init.constant_(model.pixels.weight, float("nan"))
    torch.nn.init.constant_(model.letters.weight, float("nan"))
    with pytest.raises(UniclError, match=r"image 'key0' is not finite \(12 of 12\)"):
        embed_images(model, every_name())
    with pytest.raises(UniclError, match="text 'cat' is not finite"):
        embed_texts(model, ["cat"], tokenize)


def test_nothing_to_embed_is_an_error() -> None:
    with pytest.raises(UniclError, match="no readable sample"):
        embed_images(ToyModel(), ToySamples([]))
    with pytest.raises(UniclError, match="no text"):
        embed_texts(ToyModel(), [], tokenize)


def test_skipped_samples_are_counted() -> None:
    samples = ToySamples([(0, "cat", 0)] * 9, skipped={"undecodable image": 3})
    assert embed_images(ToyModel(), samples).skipped == {"undecodable image": 3}
