"""Margins, centering, ensembles, attributes, quantiles and pairwise models."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf_fast.errors import UserError
from rlhf_fast.losses import contrastive_loss
from rlhf_fast.models.adapters import LoraConfig
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.models.pairwise import Comparison, PairwiseFormat, preference_probabilities
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.rewards import HeadsScorer
from rlhf_fast.training import reward
from rlhf_fast.training.fit import FitOptions, OptimizerConfig
from rlhf_fast.training.reward import RewardTrainingConfig, train_reward_model
from rlhf_fast.training.reward_regression import (
    RegressionConfig,
    ScoredResponses,
    binary_losses,
    quantile_losses,
    squared_errors,
    train_reward_regression,
)
from rlhf_fast.training.sft import train_sft
from tests.records import completion
from tests.tiny import tiny_model, tiny_tokenizer

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, num_epochs=3, batch_size=15)


@pytest.fixture
def fresh(tmp_path):
    save_model(tmp_path / "sft", tiny_model(), tiny_tokenizer())

    def make(num_outputs=1):
        model = fresh_reward_model(str(tmp_path / "sft"), num_outputs=num_outputs)
        return RewardModel(model, tiny_tokenizer(), precision="fp32")

    return make


def make_pairs(count=60):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 500, (count, 3), generator=generator).tolist()
    return [TokenGroup(prompt, [[50, 3], [60, 3]]) for prompt in prompts]


def test_members_of_adapters_share_a_decoder(fresh, tmp_path):
    model = fresh()
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    config = RewardTrainingConfig(
        num_outputs=3,
        members="adapters",
        adapter=LoraConfig(rank=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, num_epochs=3, batch_size=15),
    )
    steps = []
    summary = train_reward_model(
        model, make_pairs(), config=config, seed=0, on_step=lambda row, _: steps.append(row)
    )
    assert summary["held_out_accuracy"] == 1 and len(steps) == 3 * 3 * 4
    after = {n.replace(".base_layer", ""): p for n, p in model.model.named_parameters()}
    for name, value in before.items():
        if not name.startswith("score"):  # the decoder stays as it was
            assert torch.equal(value, after[name])
    groups = make_pairs(5) + [TokenGroup([300, 301], [[400, 401], [402, 3], [403]])]
    outputs = model.map_responses(groups, model.outputs)
    scores = torch.tensor([row for rows in outputs for row in rows])
    assert scores.shape == (13, 3) and (scores[:10:2] > scores[1:10:2]).all()
    assert (scores.std(1) > 1e-3).all()  # each learned from weights of its own
    rewards = [r for rows in model.map_responses(groups, model.rewards) for r in rows]
    assert rewards == pytest.approx(scores.mean(1).tolist(), rel=1e-5)
    model.save(tmp_path / "ensemble")
    assert not (tmp_path / "ensemble" / "model.safetensors").exists()
    loaded = RewardModel.load(str(tmp_path / "ensemble"), precision="fp32")
    again = [row for rows in loaded.map_responses(groups, loaded.outputs) for row in rows]
    torch.testing.assert_close(torch.tensor(again), scores)
    scored = HeadsScorer(loaded, "min").score([[completion("w21 w22")]])
    assert list(scored[0].components) == ["head_1", "head_2", "head_3"]
    with pytest.raises(UserError, match="members adapters are trained with objective pairs"):
        RewardTrainingConfig(members="adapters", objective="quantiles")


def first_loss(model, pairs, **options):
    steps = []
    config = RewardTrainingConfig(
        holdout_share=0.0,
        center_coefficient=options.pop("center", 0.0),
        contrastive_weight=options.pop("contrastive", 0.0),
        optimizer=OptimizerConfig(learning_rate=1e-9, batch_size=len(pairs)),
    )
    train_reward_model(
        model, pairs, config=config, seed=0, on_step=lambda row, _: steps.append(row), **options
    )
    return steps[0]["loss"]


def test_margin_and_centering_are_in_the_loss(fresh):
    pairs = make_pairs(6)
    margins = [0.1 * i for i in range(6)]
    model = fresh()
    torch.nn.init.normal_(model.head.weight)
    rewards = torch.tensor(model.map_responses(pairs, model.rewards))
    difference = rewards[:, 0] - rewards[:, 1]
    expected = -F.logsigmoid(difference - torch.tensor(margins)).mean()
    expected += 0.01 * rewards.sum(1).square().mean()
    loss = first_loss(model, pairs, margins=margins, center=0.01)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_the_contrastive_term_tells_responses_apart(fresh, monkeypatch):
    """Without it two responses that say almost the same have almost the same features."""
    pairs = make_pairs(16)

    def trained(weight):
        model, rows = fresh(), []
        config = RewardTrainingConfig(contrastive_weight=weight, optimizer=OPTIMIZER)
        train_reward_model(
            model, pairs, config=config, seed=0, on_step=lambda row, _: rows.append(row)
        )
        features = torch.tensor(model.map_responses(pairs, model.features)).flatten(0, 1)
        unit = F.normalize(features, dim=1)
        return rows, (unit @ unit.T).mean().item()

    plain, alike = trained(0.0)
    rows, apart = trained(1.0)
    assert "contrastive_loss" not in plain[0] and apart < 0.9 * alike
    assert rows[-1]["contrastive_loss"] < 0.8 * rows[0]["contrastive_loss"]
    monkeypatch.setattr(reward, "VIEW_DROPOUT", 0.0)
    model = fresh()
    features = torch.tensor(model.map_responses(pairs, model.features)).flatten(0, 1)
    loss = contrastive_loss(features, features).item()
    assert first_loss(model, pairs, contrastive=0.5) == pytest.approx(
        math.log(2) + loss / 2, rel=1e-3
    )


def test_ensemble_members_agree_on_the_data_and_differ_beside_it(fresh, tmp_path):
    model = fresh(num_outputs=4)
    config = RewardTrainingConfig(holdout_share=0.25, optimizer=OPTIMIZER)
    metrics = train_reward_model(model, make_pairs(), config=config, seed=0)
    assert metrics["held_out_accuracy"] == 1.0
    outputs = torch.tensor(model.map_responses(make_pairs()[:8], model.outputs))  # [8, 2, 4]
    assert (outputs[:, 0] > outputs[:, 1]).all()
    assert outputs.std(-1).min() > 1e-4
    save_model(tmp_path / "ensemble", model.model, model.tokenizer)
    loaded = RewardModel.load(str(tmp_path / "ensemble"), precision="fp32")
    rewards = loaded.map_responses(make_pairs()[:8], loaded.rewards)
    torch.testing.assert_close(torch.tensor(rewards), outputs.mean(-1), rtol=1e-3, atol=1e-4)


def test_several_outputs_without_weights_are_refused(fresh):
    model = fresh(num_outputs=2).model
    del model.config.reward_weights
    with pytest.raises(UserError, match="got 2 outputs and None"):
        RewardModel(model, tiny_tokenizer(), precision="fp32")
    with pytest.raises(UserError, match="parameters head fits one output"):
        config = RewardTrainingConfig(parameters="head")
        train_reward_model(fresh(2), make_pairs(), config=config, seed=0)


def test_missing_attributes_are_no_error():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    scores = torch.tensor([[0.0, math.nan], [math.nan, math.nan]])
    errors = squared_errors(outputs, scores)
    errors.sum().backward()
    assert errors.tolist() == [1.0, 0.0]
    assert outputs.grad.tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_binary_loss_is_least_at_the_log_odds():
    """Three of four responses were liked: the output should be log(3)."""
    scores = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    output = torch.full((1, 1), math.log(3), requires_grad=True)
    loss = binary_losses(output.expand(4, 1), scores).mean()
    loss.backward()
    assert loss.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert output.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_quantile_loss_is_least_at_the_quantiles():
    scores = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    outputs = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.LBFGS([outputs], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = quantile_losses(outputs.expand(4000, 4), scores).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = scores[:, 0].quantile(torch.tensor([0.125, 0.375, 0.625, 0.875]))
    torch.testing.assert_close(outputs[0].detach(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("objective", ["attributes", "quantiles"])
def test_scores_are_learned(fresh, objective):
    scores = {"attributes": [[1.0, -1.0], [0.5, math.nan]], "quantiles": [[1.0], [-1.0]]}
    examples = [ScoredResponses(group, scores[objective]) for group in make_pairs()]
    model = fresh(num_outputs=2)
    config = RegressionConfig(
        objective=objective,
        optimizer=OptimizerConfig(learning_rate=3e-3, num_epochs=20, batch_size=15),
    )
    train_reward_regression(model, examples, config=config, seed=0)
    found = torch.tensor(model.map_responses([e.group for e in examples[:4]], model.outputs))
    first, second = (torch.tensor(row).expand(4, 2) for row in scores[objective])
    torch.testing.assert_close(found[:, 0], first, atol=0.2, rtol=0)
    known = ~second.isnan()
    torch.testing.assert_close(found[:, 1][known], second[known], atol=0.2, rtol=0)


def test_a_pairwise_model_learns_and_does_not_care_for_the_order():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["A", "B"])
    model = tiny_model(vocab_size=520)
    language_model = LanguageModel(model, pad_token_id=3, precision="fp32")
    form = PairwiseFormat(ChatFormat(tokenizer))
    prompt = [{"role": "user", "content": "w30 w31"}]
    comparisons = [Comparison(prompt, f"w{i} w50", f"w{i + 1} w60") for i in range(100, 140)]
    groups = [group for c in comparisons for group in form.training_groups(c)]
    assert {g.responses[0][0] for g in groups} == set(form.answer_ids)
    config = OptimizerConfig(learning_rate=3e-3, num_epochs=15, batch_size=16)
    train_sft(language_model, groups, config=config, seed=0)
    unseen = [Comparison(prompt, f"w{i} w50", f"w{i} w60") for i in range(200, 205)]
    swapped = [Comparison(prompt, c.second, c.first) for c in unseen]
    probabilities = preference_probabilities(language_model, form, unseen)
    assert min(probabilities) > 0.8
    for p, q in zip(probabilities, preference_probabilities(language_model, form, swapped)):
        assert p + q == pytest.approx(1.0, abs=1e-5)


def test_an_answer_of_several_tokens_is_refused():
    with pytest.raises(UserError, match="'A' as one token"):
        PairwiseFormat(ChatFormat(tiny_tokenizer()))


def test_label_smoothing_and_margins_reach_the_head_fit(fresh):
    """Float64 logistic regression on the same features, by another optimiser."""
    pairs, margins = make_pairs(20), [0.05 * i for i in range(20)]
    model = fresh()
    config = RewardTrainingConfig(
        parameters="head", holdout_share=0.0, label_smoothing=0.1, head_weight_decay=0.1
    )
    train_reward_model(model, pairs, config=config, seed=0, margins=margins)
    features = torch.tensor(model.map_responses(pairs, model.features), dtype=torch.float64)
    scale = features.flatten(0, 1).std(0).clamp_min(1e-6)
    x = (features[:, 0] - features[:, 1]) / scale
    w = (model.head.weight[0].detach().double() * scale).requires_grad_()
    z = x @ w - torch.tensor(margins, dtype=torch.float64)
    loss = -(0.9 * F.logsigmoid(z) + 0.1 * F.logsigmoid(-z)).mean() + 0.05 * w.square().sum()
    loss.backward()
    assert w.grad.abs().max() < 1e-4


def test_labels_move_to_what_the_model_believes(fresh):
    """Iterative data smoothing by hand: one pair, two epochs, a step size of nothing."""
    model = fresh()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    (pair,) = make_pairs(1)
    rewards = torch.tensor(model.map_responses([pair], model.rewards))[0]
    gap = rewards[0] - rewards[1]
    losses = []
    config = RewardTrainingConfig(
        holdout_share=0.0,
        label_update_rate=0.25,
        optimizer=OptimizerConfig(learning_rate=1e-12, num_epochs=3, batch_size=1),
    )
    train_reward_model(
        model, [pair], config=config, seed=0, on_step=lambda row, _: losses.append(row["loss"])
    )
    label, expected = 1.0, []
    for _ in range(3):
        expected.append((-label * F.logsigmoid(gap) - (1 - label) * F.logsigmoid(-gap)).item())
        label = 0.75 * label + 0.25 * torch.sigmoid(gap).item()
    assert losses == pytest.approx(expected, rel=1e-4)
    two = FitOptions(accelerator=SimpleNamespace(num_processes=2))  # each would have its own labels
    with pytest.raises(UserError, match="those of one process"):
        train_reward_model(model, [pair], config=config, seed=0, options=two)


@pytest.mark.parametrize(
    ("objective", "setting"),
    [
        ("pairwise", {"label_smoothing": 0.1}),
        ("rankings", {"center_coefficient": 0.1}),
        ("attributes", {"label_update_rate": 0.1}),
        ("attributes", {"num_outputs": 2}),
        ("pairwise", {"num_outputs": 2}),
        ("rankings", {"num_outputs": 2}),
    ],
)
def test_settings_that_an_objective_has_no_use_for_are_refused(objective, setting):
    (name,) = setting
    with pytest.raises(UserError, match=f"objective {objective} has no use for {name}, got"):
        RewardTrainingConfig(objective, **setting)


def test_a_classifier_that_makes_more_of_its_states_is_refused(fresh):
    options = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_labels": 1}
    config = AutoConfig.for_model("bert", **options, num_hidden_layers=2, num_attention_heads=4)
    pooled = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.zeros_(pooled.classifier.weight)  # as a fresh reward model has it
    hooked = fresh()
    torch.nn.init.normal_(hooked.head.weight)
    hooked.head.register_forward_hook(lambda module, inputs, output: output - 5)
    with pytest.raises(UserError, match="its head is not its weight and bias alone"):
        RewardModel(hooked.model, tiny_tokenizer(), precision="fp32")
    with pytest.raises(UserError, match="head does not read its decoder's hidden state"):
        RewardModel(pooled, tiny_tokenizer(), precision="fp32")
