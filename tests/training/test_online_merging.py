"""Online merging: a step by hand, what is drawn, what is left of a run's steps, mistakes."""

from dataclasses import replace

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.online_merging import (
    OnlineMerging,
    OnlineMergingConfig,
    merge_step,
    merging_between,
)
from rlhf_fast.training.preference import DPOConfig, train_dpo
from tests.tiny import tiny_model
from tests.training.examples import make_pairs

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, batch_size=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and a model that lies 0.25 above it in every parameter."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.25
    model.save_pretrained(folder / "tuned")
    return {"base": str(folder / "base"), "tuned": str(folder / "tuned")}


def test_a_step_by_hand():
    step = torch.tensor([1.0, -2.0, 0.0, 1.0])
    task = torch.tensor([4.0, 1.0, 4.0, -3.0])
    got = merge_step(step, task, "dare", 0.25)
    assert got.tolist() == pytest.approx([1.75, -1.25, 1.0, 0.0])
    # The sums' signs: +, -, +, -; entries of the other sign do not count.
    got = merge_step(step, task, "ties", 0.25)
    assert got.tolist() == pytest.approx([1.75, -1.5, 1.0, -0.75])


def trained(folders, seed=0, **options):
    policy = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    merging = OnlineMergingConfig(**folders, **options) if options else OnlineMergingConfig()
    config = DPOConfig(optimizer=replace(OPTIMIZER, merging=merging))
    train_dpo(policy, None, make_pairs(8), config=config, seed=seed)
    start = tiny_model()
    return {
        name: p.detach() - q
        for (name, p), q in zip(policy.model.named_parameters(), start.parameters())
    }


def test_everything_kept_and_nothing_merged_is_the_plain_optimiser(folders):
    plain = trained(folders)
    kept = trained(folders, rule="dare", density=1.0, strength=0.0)
    for name, change in plain.items():
        torch.testing.assert_close(kept[name], change, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", ["dare", "ties"])
def test_most_entries_of_a_step_stay(folders, rule):
    optimizer = OptimizerConfig(learning_rate=1e-3, batch_size=1000)  # one step
    policy = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    merging = OnlineMergingConfig(rule, density=0.1, strength=0.0, **folders)
    config = DPOConfig(optimizer=replace(optimizer, merging=merging))
    train_dpo(policy, None, make_pairs(8), config=config, seed=0)
    pairs = zip(policy.model.parameters(), tiny_model().parameters())
    moved = torch.cat([(p != q).flatten() for p, q in pairs]).float().mean()
    assert 0.01 < moved <= 0.11


def test_the_task_vector_pulls(folders):
    free, merged = trained(folders), trained(folders, rule="dare", density=1.0, strength=0.1)
    for name, change in merged.items():
        assert change.mean() > free[name].mean() + 0.02, name


def test_what_is_drawn_depends_on_seed_and_step(folders):
    config = OnlineMergingConfig("dare", density=0.5, **folders)

    def one_step(seed, step):
        model = tiny_model()
        merging = OnlineMerging(model, config, seed)
        weight = model.get_input_embeddings().weight
        with merging.merged(step), torch.no_grad():
            weight += 1.0
        return weight.detach()

    assert torch.equal(one_step(0, 3), one_step(0, 3))
    assert not torch.equal(one_step(0, 3), one_step(0, 4))
    assert not torch.equal(one_step(0, 3), one_step(1, 3))
    change = one_step(0, 3) - tiny_model().get_input_embeddings().weight
    assert change.mean().item() == pytest.approx(1.0, abs=0.02)  # unbiased


def test_mistakes(folders):
    with pytest.raises(UserError, match="density must be in"):
        OnlineMergingConfig(density=0.0)
    config = replace(OPTIMIZER, merging=OnlineMergingConfig("dare"))
    with pytest.raises(UserError, match="got model as both; give optimizer.merging.base"):
        merging_between(config, "model", "model")
    assert merging_between(config, "a", "b").merging.tuned == "b"
    with pytest.raises(UserError, match="needs both models"):
        OnlineMerging(tiny_model(), config.merging, 0)
    extra = tiny_model()
    extra.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="none named adapter.bias"):
        OnlineMerging(extra, OnlineMergingConfig("dare", **folders), 0)
