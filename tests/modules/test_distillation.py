"""What is kept of a teacher, and the training towards it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from narrows.errors import NarrowsError
from narrows.modules.distillation import Answers, answers, train, turn
from narrows.progress import silent


class Told(nn.Module):
    """Gives what it was made with, whatever it is asked."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


def told(output: torch.Tensor, classes: int) -> Answers:
    return answers(Told(output), {"x": torch.zeros(1)}, classes)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99))
def test_the_loss_is_the_divergence_of_the_likeliest_classes_and_of_the_rest_as_one(count: int, kept: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 5, count, generator=generator)
    said = told(teacher, kept)
    whole = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    assert -1e-5 <= said.loss(student) <= whole + 1e-4  # joining classes never tells more apart
    assert said.loss(teacher) == pytest.approx(0, abs=1e-5)
    if kept >= count:
        assert said.loss(student) == pytest.approx(float(whole), abs=1e-4)


def test_features_are_matched_by_their_squares() -> None:
    features = torch.randn(2, 5, 7)
    said = told(features, 3)
    assert said.classes is None
    assert said.loss(2 * features) == pytest.approx(1)


@given(st.integers(1, 9), st.integers(0, 5))
def test_every_batch_comes_once_in_a_round(count: int, rounds: int) -> None:
    assert {turn(rounds * count + i, count) for i in range(count)} == set(range(count))


def network() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 4)).eval()
    return model, [{"input": torch.randn(8, 6)} for _ in range(3)]


def recovered(dtype: torch.dtype = torch.float32) -> tuple[float, float, nn.Module]:
    """The loss towards a teacher before and after the training of a network that has lost its first layer, and the network."""
    model, data = network()
    said = [answers(model, batch) for batch in data]
    nn.init.normal_(model[0].weight)
    model, data = model.to(dtype), [{"input": batch["input"].to(dtype)} for batch in data]

    def loss() -> float:
        with torch.no_grad():
            return float(said[0].loss(model(data[0]["input"]).float()))

    before = loss()
    train(model, lambda i: (data[turn(i, 3)], said[turn(i, 3)]), 40, 0.03, silent)
    return before, loss(), model


def test_it_comes_nearer_and_the_same_steps_give_the_same_bits() -> None:
    before, after, model = recovered()
    assert after < before / 2
    torch.rand(3)  # what others draw has no part in it, though there is a dropout
    again = recovered()[2]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_half_precision_is_trained_in_fp32_and_given_back_as_it_was() -> None:
    before, after, model = recovered(torch.bfloat16)
    assert after < before / 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_embeddings_stay_and_flags_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    model[2].bias.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batch = {"input": torch.arange(6).view(2, 3)}
    said = told(torch.randn(2, 3), 3)
    train(model, lambda i: (batch, said), 2, 0.01, silent)
    assert torch.equal(model[0].weight, before["0.weight"]) and not torch.equal(model[2].weight, before["2.weight"])
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]


def test_a_loss_that_is_no_number_is_named_with_its_step() -> None:
    model, data = network()
    said = answers(model, data[0])
    broken = Answers(said.values * torch.nan, said.classes)
    with pytest.raises(NarrowsError, match=r"step 0: the loss is nan"):
        train(model, lambda i: (data[0], broken), 1, 0.01, silent)
