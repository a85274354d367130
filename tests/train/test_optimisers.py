"""Muon, which parameters go to whom, and the learning rate over the steps."""
import pytest
import torch
from torch import nn

from weights_tools.train.optimisers import Muon, muon_and_adamw, orthogonalise, rate


def test_muon_moves_along_all_directions_alike():
    for r, c in ((24, 60), (60, 24), (32, 32)):
        gradient = torch.randn(r, 3) @ torch.randn(3, c) + 0.02 * torch.randn(r, c)
        singular = torch.linalg.svdvals(orthogonalise(gradient[None])[0])
        assert singular.max() < 1.3 and (singular > 0.4).float().mean() > 0.7
        p = torch.nn.Parameter(torch.zeros(r, c))
        p.grad = gradient
        Muon([p], lr=0.1).step()
        assert float(p.detach().pow(2).mean().sqrt()) == pytest.approx(0.2 * 0.1, rel=0.3)
        assert (p * gradient).sum() < 0


def test_every_parameter_goes_to_one_optimiser():
    tower = nn.Sequential(nn.Conv2d(3, 8, 2), nn.LayerNorm(8), nn.Linear(8, 6))
    decoder = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10))
    tables = (decoder[0].weight, decoder[2].weight)
    parts = [(list(decoder.parameters()), 1.0), (list(tower.parameters()), 0.25)]
    muon, adamw = muon_and_adamw(parts, 0.01, 0.05, tables)
    found = {id(p): (opt, group) for opt in (muon, adamw) for group in opt.param_groups for p in group["params"]}
    everything = {**dict(tower.named_parameters("tower")), **dict(decoder.named_parameters("decoder"))}
    assert len(found) == len(everything) == sum(len(g["params"]) for opt in (muon, adamw) for g in opt.param_groups)
    inside = [everything[name] for name in ("tower.0.weight", "tower.2.weight", "decoder.1.weight")]
    for name, p in everything.items():
        opt, group = found[id(p)]
        assert (opt is muon) == any(p is q for q in inside), name
        share = (0.25 if name.startswith("tower") else 1.0) * (1.0 if opt is muon else 0.5)
        assert group["lr"] == pytest.approx(0.01 * share), name
        assert group["weight_decay"] == (0.0 if p.ndim == 1 else 0.05), name


def test_the_rate_rises_and_falls():
    rates = [rate(step, 100, warmup=10, floor=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) < 1
    assert rates[100] == pytest.approx(0.1)
    assert rate(0, 5) == 1.0
