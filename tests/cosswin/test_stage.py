import pytest
import torch

from cosswin.stage import Block, Stage


def _stage(**settings):
    return Stage(8, drop_paths=(0.0, 0.5), num_heads=2, window_size=(4, 4), **settings)


def test_every_second_block_is_shifted_by_half_a_window():
    stage = Stage(8, drop_paths=(0.0,) * 4, num_heads=2, window_size=(7, 4))
    assert [block.attn.shift for block in stage.blocks] == [(0, 0), (3, 2), (0, 0), (3, 2)]


def test_layer_scale_multiplies_both_branches_by_one_vector():
    torch.manual_seed(0)
    block = Block(8, num_heads=2, window_size=(4, 4), shifted=False, layer_scale=0.1)
    x = torch.randn(1, 4, 4, 8)
    middle = x + 0.1 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + 0.1 * block.mlp(block.norm2(middle)))
    assert [name for name, _ in block.named_parameters() if "gamma" in name] == ["gamma"]
    assert _stage().blocks[0].gamma is None


def test_drop_path_skips_whole_branches_of_single_samples():
    torch.manual_seed(0)
    block = Block(8, num_heads=2, window_size=(4, 4), shifted=False, drop_path=0.5)
    x = torch.randn(64, 4, 4, 8)
    unchanged = (block(x) == x).flatten(1).all(1)
    assert 4 < unchanged.sum() < 32
    torch.testing.assert_close(block.eval()(x[:1]), block.eval()(x)[:1])


@pytest.mark.parametrize("size", [(8, 8), (5, 6)])
def test_checkpointing_changes_nothing(size):
    """Drop-path draws random numbers, so this holds only if the recomputation replays them."""
    torch.manual_seed(0)
    stage = _stage(layer_scale=0.5)
    x = torch.randn(6, *size, 8, requires_grad=True)
    results = []
    for checkpointing in (False, True):
        stage.grad_checkpointing = checkpointing
        torch.manual_seed(1)
        y = stage(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *stage.parameters()])))
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)
