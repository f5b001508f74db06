"""Warm-up and cosine, against torch's own schedulers."""

import pytest
import torch

from unicl.engine.schedule import learning_rate


@pytest.mark.parametrize(("warmup", "total", "final"), [(5, 40, 0.0), (1, 10, 1e-5), (0, 10, 0.0)])
def test_equals_torch_schedulers(warmup, total, final):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=final)
    for step in range(total):
        ours = learning_rate(step, peak=1e-3, final=final, warmup_steps=warmup, total_steps=total)
        if step < warmup:
            assert ours == pytest.approx(1e-3 * (step + 1) / warmup)
            continue
        assert ours == pytest.approx(cosine.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize(("warmup", "total", "final"), [(5, 40, 0.0), (1, 10, 1e-4)])
def test_a_straight_way_down_equals_torch_schedulers(warmup, total, final):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final / 1e-3, total - warmup)
    for step in range(warmup, total):
        ours = learning_rate(
            step,
            peak=1e-3,
            final=final,
            warmup_steps=warmup,
            total_steps=total,
            decay="linear",
        )
        assert ours == pytest.approx(linear.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        linear.step()


def test_warm_up_longer_than_the_run_stays_below_the_peak():
    rates = [
        learning_rate(s, peak=1.0, final=0.0, warmup_steps=100, total_steps=10) for s in range(10)
    ]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1)
