"""A step: gradients added up and clipped, a loss that is no number refused, bfloat16 only where it is faster."""
import pytest
import torch
from torch import nn

from minivl import InputError
from weights_tools.train.step import half_is_faster, precision, take_step


def test_micro_batches_add_up_to_the_whole_batch():
    x = torch.randn(12, 5)
    y = torch.randn(12, 1)
    moved = []
    for size in (12, 3):
        torch.manual_seed(1)
        model = nn.Linear(5, 1)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = ((model(x[i:i + size]) - y[i:i + size]).pow(2).sum() / 12 for i in range(0, 12, size))
        before = ((model(x) - y).pow(2).mean()).item()
        assert take_step(losses, [opt], 1.0) == pytest.approx(before, rel=1e-5)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*moved)


def test_a_step_is_clipped_and_goes_its_share():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = torch.optim.SGD([p], lr=0.5)
    for share, end in ((1.0, [2.7, 3.6]), (0.1, [2.67, 3.56]), (1.0, [2.37, 3.16])):
        take_step([50 * p.pow(2).sum()], [opt], share)      # a gradient far longer than 1, along p
        torch.testing.assert_close(p.detach(), torch.tensor(end))
        assert p.grad is None


def test_only_the_gradients_of_one_micro_batch_are_alive():
    """The next loss is asked for when the last one has been gone down."""
    p = nn.Parameter(torch.ones(2))
    seen = []

    def losses():
        for factor in (1.0, 2.0):
            seen.append(None if p.grad is None else p.grad.clone())
            yield factor * p.sum()

    take_step(losses(), [torch.optim.SGD([p], lr=0.0)], 1.0)
    assert seen[0] is None
    assert seen[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_moves_nothing(value):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match="the loss is"):
        take_step([p.sum(), p.sum() * value], [torch.optim.SGD([p], lr=1.0)], 1.0)
    assert p.tolist() == [1.0, 1.0]


def test_bfloat16_where_it_was_measured_to_be_faster(monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr("weights_tools.train.step.products", lambda answer=answer: (None, answer))
        assert half_is_faster("cpu") is answer
    for version, answer in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, version=version: version)
        assert half_is_faster("cuda") is answer
    linear = nn.Linear(3, 3)
    for half, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with precision("cpu", half):
            assert linear(torch.randn(2, 3)).dtype == dtype
    assert linear.weight.dtype == torch.float32
