"""What people type first, and the networks that they happen to have."""

import copy

import pytest
import torch
from torch import nn

import metatele


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def test_parameters_and_rates_of_other_optimizers_are_refused_in_a_sentence():
    with pytest.raises(TypeError, match="give the model itself, not its parameters"):
        metatele.LearnedOptimizer(network().parameters())
    with pytest.raises(TypeError, match="no learning rate to give"):
        metatele.LearnedOptimizer(network(), 1e-3)
    with pytest.warns(UserWarning, match="factor on the learned step"):
        metatele.LearnedOptimizer(network(), lr=1e-3)


@pytest.mark.parametrize("teleport", [False, True])
def test_a_parameter_without_elements_is_left_alone(teleport):
    model = network()
    plain = copy.deepcopy(model)
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    for one in (model, plain):
        optimizer = metatele.LearnedOptimizer(one)
        if teleport:
            optimizer = metatele.TeleportOptimizer(torch.optim.Adam(one.parameters(), 1e-2), one, every=2)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(one(x), y).backward()
            optimizer.step()
    for p, q in zip(plain.parameters(), [p for p in model.parameters() if p.numel()], strict=True):
        assert torch.equal(p, q)


class Recurrent(nn.Module):
    """Makes its first state by itself."""

    def __init__(self):
        super().__init__()
        self.read, self.cell = nn.Linear(7, 5), nn.GRUCell(5, 8)
        self.tell = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, words):
        hidden = torch.zeros(len(words), 8)
        for word in nn.functional.one_hot(words, 7).float().unbind(1):
            hidden = self.cell(torch.relu(self.read(word)), hidden)
        return self.tell(hidden)


def test_passes_that_make_tensors_of_their_own_are_searched():
    torch.manual_seed(0)
    model, words = Recurrent(), torch.randint(7, (9, 4))
    found = metatele.find_symmetries(model, words)
    assert {(space.group, space.k) for space in found.spaces} >= {("scale", 5), ("perm", 5), ("scale", 6), ("perm", 6)}
    before = model(words)
    assert metatele.randomize_(model, words, seed=1).drift < 1e-5
    torch.testing.assert_close(model(words), before, rtol=1e-4, atol=1e-5)
    assert torch.get_default_dtype() == torch.float32


class Packed(nn.Module):
    """Reads sequences of their own lengths."""

    def __init__(self):
        super().__init__()
        self.names, self.cell = nn.Embedding(30, 6), nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.tell = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, words, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.names(words), lengths, batch_first=True, enforce_sorted=False)
        return self.tell(self.cell(packed)[1][0].transpose(0, 1).flatten(1))


def test_lengths_are_cut_with_the_samples_that_they_are_of():
    torch.manual_seed(0)
    model, words, lengths = Packed(), torch.randint(30, (20, 9)), torch.randint(1, 10, (20,))
    before = model(words, lengths)
    report = metatele.teleport_(model, (words, lengths), torch.randint(2, (20,)), nn.functional.cross_entropy)
    assert report.moved
    torch.testing.assert_close(model(words, lengths), before, rtol=1e-4, atol=1e-5)
