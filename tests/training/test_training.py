"""Optimiser loop, DPO trajectories and reward models on tiny models."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.checkpoint import load_weights, save_model
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_dpo
from rlhf_fast.training.reward import RewardTrainingConfig, train_reward_model
from rlhf_fast.training.sft import train_sft
from rlhf_fast.types import PreferencePair
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.examples import make_pairs


def language_model(seed=0, micro_batch_tokens=4096):
    return LanguageModel(
        tiny_model(seed=seed),
        pad_token_id=3,
        precision="fp32",
        micro_batch_tokens=micro_batch_tokens,
    )


def reference_dpo_trajectory(pairs, config, seed, nll_weight):
    """The textbook DPO step: full logits, one row per response, reference in every step."""
    policy, reference = tiny_model(), tiny_model()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    losses = []

    def logp(model, completion):
        ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
        start = len(completion.prompt_token_ids)
        rows = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        return rows.gather(1, ids[0, start:, None]).sum()

    for _ in range(config.num_epochs):
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for i in range(0, len(order), config.batch_size):
            batch = [pairs[j] for j in order[i : i + config.batch_size]]
            loss = 0
            for pair in batch:
                with torch.no_grad():
                    ref = logp(reference, pair.chosen) - logp(reference, pair.rejected)
                margin = logp(policy, pair.chosen) - logp(policy, pair.rejected) - ref
                loss = loss - torch.nn.functional.logsigmoid(0.1 * margin) / len(batch)
                nll = -logp(policy, pair.chosen) / len(pair.chosen.token_ids)
                loss = loss + nll_weight * nll / len(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("micro_batch_tokens", "nll_weight"), [(16, 0.0), (4096, 0.0), (64, 0.5)])
def test_dpo_follows_the_textbook_trajectory(micro_batch_tokens, nll_weight):
    optimizer = OptimizerConfig(learning_rate=1e-3, num_epochs=5, batch_size=4, schedule="constant")
    pairs = make_pairs(16)
    rows = train_dpo(
        language_model(micro_batch_tokens=micro_batch_tokens),
        language_model(),
        pairs,
        config=DPOConfig(beta=0.1, nll_weight=nll_weight, optimizer=optimizer),
        seed=7,
    )
    expected = reference_dpo_trajectory(pairs, optimizer, 7, nll_weight)
    assert len(rows) == len(expected) == 20
    torch.testing.assert_close(
        torch.tensor([row["loss"] for row in rows]), torch.tensor(expected), rtol=2e-3, atol=2e-4
    )
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo", "orpo", "apo_zero"])
def test_one_pass_through_the_head_is_two(loss_type, monkeypatch):
    """Loss, gradient norm and every other metric, with logits kept, in chunks and recomputed."""
    config = DPOConfig(
        loss_type=loss_type,
        nll_weight=0.5 if loss_type == "sigmoid" else 0.0,
        optimizer=OptimizerConfig(learning_rate=1e-3, num_epochs=2, batch_size=6),
    )
    reference = language_model(seed=1)

    def rows():
        return train_dpo(language_model(), reference, make_pairs(12), config=config, seed=0)

    one = rows()
    monkeypatch.setattr("rlhf_fast.models.language_model.LOGITS_BUDGET_BYTES", 0)
    chunks = rows()
    monkeypatch.setattr(DPOConfig, "is_one_pass", False)
    for first, second, third in zip(one, chunks, rows(), strict=True):
        assert first == pytest.approx(third, rel=1e-4, abs=1e-6)
        assert second == pytest.approx(third, rel=1e-4, abs=1e-6)


def test_pairs_that_share_a_prompt_are_as_if_they_did_not():
    """The reference runs once per prompt; a shuffled copy of the pairs must train the same."""
    first, second = make_pairs(2)
    prompt = first.chosen.prompt_token_ids
    shared = [
        PreferencePair(
            *(replace(c, prompt_token_ids=prompt) for c in (pair.chosen, pair.rejected)), 1.0, 0.0
        )
        for pair in (first, second)
    ]
    config = DPOConfig(optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=2))
    together = train_dpo(language_model(), language_model(seed=1), shared, config=config, seed=0)
    apart = [
        train_dpo(language_model(), language_model(seed=1), [pair], config=config, seed=0)[0]
        for pair in shared
    ]
    assert together[0]["loss"] == pytest.approx(sum(row["loss"] for row in apart) / 2, rel=1e-5)


def test_sft_learns_its_demonstrations():
    groups = [TokenGroup([10, i], [[20 + i, 30 + i, 3]]) for i in range(11, 19)]
    config = OptimizerConfig(
        learning_rate=1e-2, num_epochs=40, batch_size=4, warmup_steps=2, schedule="linear"
    )
    rows = train_sft(language_model(), groups, config=config, seed=0)
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert rows[0]["learning_rate"] == pytest.approx(5e-3)


def test_half_precision_weights_are_refused():
    model = LanguageModel(tiny_model().half(), pad_token_id=3)
    with pytest.raises(UserError, match="must be float32 or bfloat16, got float16"):
        train_sft(model, [TokenGroup([10], [[11, 3]])], config=OptimizerConfig(), seed=0)


def test_nothing_random_is_left_of_training():
    policy = LanguageModel(tiny_model("mixtral", router_jitter_noise=0.5), pad_token_id=3)
    batch = policy.collate([TokenGroup([10], [[11, 12, 3]])])
    policy.model.train()
    assert torch.equal(policy.token_logps(batch), policy.token_logps(batch))


def test_divergence_is_reported():
    config = OptimizerConfig(learning_rate=1e-3, batch_size=1)
    policy = language_model()
    policy.model.get_output_embeddings().weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="gradient norm is nan"):
        train_sft(policy, [TokenGroup([10], [[11, 3]])], config=config, seed=0)


def reward_model():
    torch.manual_seed(0)
    base = tiny_model()
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(base.base_model.state_dict())
    return RewardModel(model.eval(), tiny_tokenizer(), precision="fp32")


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_reward_model_learns_which_word_is_better(parameters):
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(60):
        prompt = torch.randint(100, 500, (3,), generator=generator).tolist()
        pairs.append(TokenGroup(prompt, [[50, 3], [60, 3]]))
    config = RewardTrainingConfig(
        parameters=parameters,
        holdout_share=0.25,
        optimizer=OptimizerConfig(learning_rate=1e-3, num_epochs=3, batch_size=15),
    )
    metrics = train_reward_model(reward_model(), pairs, config=config, seed=0)
    assert metrics["num_pairs"] == 45 and metrics["num_held_out_pairs"] == 15
    assert metrics["held_out_accuracy"] == 1.0


def test_reward_is_read_at_the_last_token_although_pad_is_eos():
    model = reward_model()
    group = TokenGroup([10, 11], [[20, 3], [21, 22, 23, 3]])
    batch = model.collate([group, TokenGroup([12], [[30, 3]])])
    rewards = model.rewards(batch)
    for reward, response in zip(rewards, group.responses):
        ids = torch.tensor([group.prompt_ids + response])
        hidden = model.decoder(input_ids=ids).last_hidden_state[0, -1]
        expected = model.head.weight[0] @ hidden
        torch.testing.assert_close(reward, expected, rtol=1e-4, atol=1e-4)


def test_checkpoint_round_trip_is_exact(tmp_path):
    model = tiny_model(seed=1)
    save_model(tmp_path / "model", model, tiny_tokenizer())
    other = tiny_model(seed=2)
    load_weights(tmp_path / "model", other)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters()):
        assert torch.equal(a, b), name


def test_damaged_checkpoint_is_reported(tmp_path):
    save_model(tmp_path / "model", tiny_model(), tiny_tokenizer())
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_weights(tmp_path / "model", tiny_model())
