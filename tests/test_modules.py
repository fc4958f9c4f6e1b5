"""Inner problems on modules: deterministic, trainable, varied, and changed in mid-run as they say."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from metatele.config import KINDS, ModulesConfig
from metatele.errors import ConfigError
from metatele.tasks.modules import Modules
from metatele.tasks.modules.sequences import Language

SMALL = ModulesConfig(budget_ms=60.0, held_out_samples=64)


def sampled(count, config=SMALL):
    modules = Modules(config)
    return [modules.sample(0, "evaluation", i) for i in range(count)]


def found(condition, config=SMALL):
    modules = Modules(config)
    return next(p for p in (modules.sample(0, "tuning", i) for i in range(2000)) if condition(p))


@pytest.mark.parametrize("index", range(40))
def test_a_problem_is_the_same_wherever_it_is_drawn_and_can_be_trained(index):
    one, other = (Modules(SMALL).sample(3, "train", index) for _ in range(2))
    torch.manual_seed(index)  # what was drawn from torch before plays no part
    models = [problem.model() for problem in (one, other)]
    batches = [list(islice(problem.batches(), 3)) for problem in (one, other)]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
        assert a.inputs.isfinite().all()
    loss = one.loss(models[0](batches[0][0].inputs), batches[0][0].targets)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in models[0].parameters())
    assert one.judged(models[0], one.held_out()) == one.judged(models[0], other.held_out()) < float("inf")


def test_problems_are_of_every_kind_and_stay_within_their_limits():
    problems = sampled(300)
    kinds = Counter(p.kind for p in problems)
    assert set(kinds) == set(KINDS)
    assert kinds["classification"] > kinds["signals"]
    assert {p.change for p in problems} == {"none", "freed", "inputs", "targets", "classes"}
    networks = {p.network.kind for p in problems}
    assert networks >= {
        "patches",
        "perceptron",
        "convolution",
        "attention",
        "gru",
        "lstm",
        "rnn",
        "mean",
        "flat",
        "autoencoder",
    }
    assert {p.source.loss for p in problems} >= {"mse", "huber", "ce", "bce", "smoothed"}
    assert all(SMALL.shortest <= p.horizon <= SMALL.longest for p in problems)
    assert all(p.samples == 0 or p.batch <= p.samples <= SMALL.most_samples for p in problems)
    assert all(p.network.width <= SMALL.broadest and p.network.depth < SMALL.deepest for p in problems)
    for share, some in (
        (0.05, [p.whole for p in problems]),
        (0.1, [p.samples == 0 for p in problems]),
        (0.3, [p.known for p in problems]),
        (0.03, [p.trained > 0 for p in problems]),
    ):
        assert share < sum(some) / len(problems) < 0.7


def test_batches_of_a_finite_set_come_in_rounds_and_fresh_ones_never_repeat():
    finite = found(lambda p: p.kind == "regression" and p.change == "none" and p.batch < p.samples < 6 * p.batch)
    per_round = [len(part) for part in torch.arange(finite.samples).split(finite.batch) if len(part) > 1]
    batches = list(islice(finite.batches(), 2 * len(per_round)))
    assert [len(b.inputs) for b in batches] == 2 * per_round
    rows = [torch.cat([b.inputs for b in part]) for part in (batches[: len(per_round)], batches[len(per_round) :])]
    if sum(per_round) == finite.samples:
        assert torch.equal(*(r.sort(0).values for r in rows))
    assert not torch.equal(*rows)
    fresh = found(lambda p: p.kind == "regression" and not p.samples and p.source.features == "normal")
    seen = torch.cat([b.inputs for b in islice(fresh.batches(), 200)])
    assert len(seen.unique(dim=0)) == len(seen)
    whole = found(lambda p: p.whole and p.change == "none")
    first, second = islice(whole.batches(), 2)
    assert torch.equal(first.inputs, second.inputs)


def test_what_changes_in_mid_run_changes_at_its_step():
    for change in ("inputs", "targets", "classes"):
        problem = found(lambda p, change=change: p.change == change and p.change_at > 0 and p.passes == 1)
        problem = replace(problem, change_at=3)
        batches = list(islice(problem.batches(), 5))
        before = list(islice(replace(problem, change_at=10**9).batches(), 5))
        same = [
            torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
            for a, b in zip(batches, before, strict=True)
        ]
        assert same[:3] == [True] * 3
        assert not all(same[3:])
        if change == "classes":
            half = problem.source.outputs // 2
            assert all((b.targets < half).all() for b in batches[:3])
            assert all((b.targets >= half).all() for b in batches[3:])
            assert (problem.held_out(1).targets >= half).all()
    problem = found(lambda p: p.change == "freed")
    model = problem.model()
    frozen = problem.frozen(model)
    assert 0 < len(frozen) < len(list(model.parameters()))
    assert problem.phase(problem.horizon) == 0  # the data stay what they were


def test_a_trained_start_is_better_than_a_new_one():
    problem = found(lambda p: p.trained > 20 and p.change == "none" and p.kind == "autoencoder")
    data = problem.held_out()
    assert problem.judged(problem.model(), data) < problem.judged(replace(problem, trained=0).model(), data)


def test_noise_is_left_out_of_honest_held_out_data():
    table = found(lambda p: p.kind == "classification" and p.source.flips > 0.2 and p.source.loss == "ce").source
    clean, noisy = (
        replace(table, honest=honest).draw(2000, torch.Generator().manual_seed(1), clean=True)
        for honest in (True, False)
    )
    changed = (clean.targets != noisy.targets).float().mean()
    assert 0.3 * table.flips < changed < table.flips


def test_a_language_asks_for_the_next_token_and_repeats_itself_where_looking_back_pays():
    text = Language("induction", 32, 32, 3).draw(400, torch.Generator().manual_seed(0))
    assert torch.equal(text.inputs[:, 1:], text.targets[:, :-1])
    agree = torch.stack([(text.targets[:, back:] == text.targets[:, :-back]).float().mean(1) for back in range(8, 16)])
    # In its second half, every sequence is nearly the same as some distance before.
    assert (agree.amax(0) > 0.6).float().mean() > 0.9
    plain = Language("markov", 32, 32, 3).draw(400, torch.Generator().manual_seed(0))
    again = torch.stack(
        [(plain.targets[:, back:] == plain.targets[:, :-back]).float().mean(1) for back in range(8, 16)]
    )
    assert (again.amax(0) > 0.6).float().mean() < 0.1
    problems = [
        found(lambda p, tied=t: p.kind == "language" and p.network.tied == tied and p.trained == 0) for t in (0, 1)
    ]
    for problem in problems:
        problem = replace(problem, network=replace(problem.network, start="gpt"))
        model, data = problem.model(), problem.held_out()
        assert model(data.inputs).shape == (*data.targets.shape, problem.source.tokens)
        assert (model.first.weight is model.last.weight) == problem.network.tied
        assert 0.017 < float(model.first.weight.detach().std()) < 0.023
        late = data.inputs.clone()
        late[:, -1] = (late[:, -1] + 1) % problem.source.tokens
        model.eval()
        before, after = model(data.inputs), model(late)
        torch.testing.assert_close(before[:, :-1], after[:, :-1])  # no position sees what comes after it


def test_prototypes_of_a_class_are_alike_and_sets_of_them_are_small():
    problem = found(lambda p: p.kind == "prototypes" and p.samples and p.horizon * p.batch > 2000)
    assert 1000 <= problem.samples <= 2000
    images = replace(problem.source, noise=0.0, flips=0.0, channels=1, brightest=1.0)
    x, y = images.draw(1000, torch.Generator().manual_seed(0))
    x = x.flatten(1) / x.flatten(1).amax(1, keepdim=True)
    centres = torch.stack([x[y == c].mean(0) for c in range(images.outputs)])
    nearest = torch.cdist(x, centres).argmin(1)
    assert (nearest == y).float().mean() > 0.8


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="kinds must be among regression"):
        Modules(ModulesConfig(kinds=("digits",)))
    with pytest.raises(ConfigError, match="longest must be at least shortest"):
        ModulesConfig(shortest=50, longest=40)
    with pytest.raises(ConfigError, match="event_share must be from 0 to 1"):
        ModulesConfig(event_share=1.5)
