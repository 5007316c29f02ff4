"""LoRA: off is the model without it, merged is the model with it, saved is safetensors alone."""

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import (
    LoraConfig,
    adapters_off,
    add_lora,
    merge_adapters,
    merged_parameters,
)
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.checkpoint import load_weights, save_model
from rlhf_fast.models.language_model import LanguageModel, load_causal_lm
from rlhf_fast.models.reward_model import RewardModel
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_dpo
from rlhf_fast.training.reward import RewardTrainingConfig, train_reward_model
from rlhf_fast.training.token_values import token_values
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer
from tests.training.examples import make_pairs

GROUPS = [TokenGroup([10, 11], [[20, 3], [21, 22, 3]])]
CONFIG = DPOConfig(optimizer=OptimizerConfig(learning_rate=1e-2, num_epochs=4, batch_size=8))


@pytest.fixture
def base(tmp_path):
    save_model(tmp_path / "base", tiny_model(), tiny_tokenizer())
    return tmp_path / "base"


def trained(base):
    model = load_causal_lm(str(base))
    add_lora(model, LoraConfig(rank=4))
    policy = LanguageModel(model, pad_token_id=3, precision="fp32")
    return policy, train_dpo(policy, None, make_pairs(16), config=CONFIG, seed=0)


def test_only_adapters_learn_and_off_is_the_base_model(base):
    before = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32").score_groups(GROUPS)
    policy, rows = trained(base)
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and rows[-1]["loss"] < 0.6
    assert policy.score_groups(GROUPS)[0] != pytest.approx(before[0], abs=0.1)
    with adapters_off(policy.model):
        assert policy.score_groups(GROUPS)[0] == pytest.approx(before[0], abs=1e-5)
    assert not policy.head.weight.requires_grad


def test_the_reference_is_the_base_model_also_when_adapters_are_trained_already(base):
    policy, _ = trained(base)
    again = train_dpo(policy, None, make_pairs(16), config=CONFIG, seed=0)
    assert again[0]["loss"] < 0.6  # the policy is ahead of its reference from the first step


def test_adapters_start_from_their_seed_alone():
    def first_factors(seed):
        model = tiny_model()
        torch.rand(seed + 1)  # what was drawn before does not matter, nor what is drawn after
        before = torch.get_rng_state()
        add_lora(model, LoraConfig(rank=4), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return [p.detach() for name, p in model.named_parameters() if "lora_A" in name]

    first, again, other = map(first_factors, (1, 1, 2))
    assert first and all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_they_are_float32_whatever_the_frozen_weights_are(base):
    """In bf16 a step of AdamW rounds away."""
    model = load_causal_lm(str(base), dtype=torch.bfloat16)
    add_lora(model, LoraConfig(rank=4))
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    merged = dict(merged_parameters(model))
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    groups = LanguageModel(model, pad_token_id=3, precision="bf16").score_groups(GROUPS)
    plain = LanguageModel(load_causal_lm(str(base)), pad_token_id=3, precision="bf16")
    assert groups[0] == pytest.approx(plain.score_groups(GROUPS)[0], rel=2e-2)


def test_saved_adapters_load_again(base, tmp_path):
    policy, _ = trained(base)
    expected = policy.score_groups(GROUPS)[0]
    save_model(tmp_path / "adapter", policy.model, tiny_tokenizer())
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    other = load_causal_lm(str(base))
    add_lora(other, LoraConfig(rank=4))
    load_weights(tmp_path / "adapter", other)
    by_hand = LanguageModel(other, pad_token_id=3, precision="fp32")
    assert by_hand.score_groups(GROUPS)[0] == pytest.approx(expected, abs=1e-5)
    loaded = LanguageModel(
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        pad_token_id=3,
        precision="fp32",
    )
    assert loaded.score_groups(GROUPS)[0] == pytest.approx(expected, abs=1e-5)


def test_merged_it_is_a_plain_model_with_the_same_outputs(base, tmp_path):
    policy, _ = trained(base)
    expected = policy.score_groups(GROUPS)[0]
    merge_adapters(policy.model)
    save_model(tmp_path / "merged", policy.model, tiny_tokenizer())
    plain = LanguageModel(
        load_causal_lm(str(tmp_path / "merged")), pad_token_id=3, precision="fp32"
    )
    assert plain.score_groups(GROUPS)[0] == pytest.approx(expected, abs=1e-4)


def test_a_model_wrapped_by_peft_is_taken_as_it_is():
    wrapped = get_peft_model(tiny_model(), PeftLoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy = LanguageModel(wrapped, pad_token_id=3, precision="fp32")
    ids = torch.tensor([[10, 11, 20, 3]])
    logps = wrapped(input_ids=ids).logits.log_softmax(-1)[0, 1:3]
    expected = logps.gather(1, ids[0, 2:, None]).sum().item()
    assert policy.score_groups(GROUPS)[0][0] == pytest.approx(expected, abs=1e-4)
    with adapters_off(policy.model):
        assert policy.score_groups(GROUPS)[0][0] != pytest.approx(expected, abs=1e-2)


def with_peft(**settings):
    """A model whose adapters say something, in PEFT's wrapper."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | settings
    return get_peft_model(tiny_model(), PeftLoraConfig(**options))


def test_off_leaves_everything_as_it_was():
    wrapped = with_peft()
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)  # LoRA-FA
    policy = LanguageModel(wrapped, pad_token_id=3, precision="fp32")
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    on = policy.score_groups(GROUPS)
    with adapters_off(policy.model):
        off = policy.score_groups(GROUPS)
        with adapters_off(policy.model):
            pass
        assert policy.score_groups(GROUPS) == off != on
    assert policy.score_groups(GROUPS) == on
    assert list(map(id, trained)) == [id(p) for p in wrapped.parameters() if p.requires_grad]


def test_scoring_knows_no_dropout():
    wrapped = with_peft(lora_dropout=0.5).train()
    policy = LanguageModel(wrapped, pad_token_id=3, precision="fp32")
    first = policy.score_groups(GROUPS)
    assert policy.score_groups(GROUPS) == first
    assert token_values(policy, GROUPS, policy.token_logps)[0][0] == pytest.approx(
        token_values(policy, GROUPS, policy.token_logps)[0][0], abs=0
    )
    assert policy.model.training


def test_merged_parameters_are_what_merging_leaves():
    wrapped = with_peft(use_dora=True)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    policy = LanguageModel(wrapped, pad_token_id=3, precision="fp32")
    expected = policy.score_groups(GROUPS)[0]
    plain = tiny_model(seed=1)
    plain.load_state_dict(dict(merged_parameters(policy.model)))
    plain = LanguageModel(plain, pad_token_id=3, precision="fp32")
    assert plain.score_groups(GROUPS)[0] == pytest.approx(expected, abs=1e-4)


def test_adapters_outside_the_layers_are_refused():
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="got PROMPT_TUNING, .* take LoRA"):
        LanguageModel(get_peft_model(tiny_model(), settings), pad_token_id=3)


@pytest.mark.parametrize("merged", [False, True])
def test_reward_model_with_adapters_and_a_trained_head(tmp_path, merged):
    torch.manual_seed(0)
    config = tiny_config()
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    add_lora(model, LoraConfig(rank=4), trained_modules=("score",))
    reward_model = RewardModel(model, tiny_tokenizer(), precision="fp32")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 500, (40, 3), generator=generator).tolist()
    pairs = [TokenGroup(prompt, [[50, 3], [60, 3]]) for prompt in prompts]
    optimizer = OptimizerConfig(learning_rate=1e-2, num_epochs=3, batch_size=15)
    settings = RewardTrainingConfig(holdout_share=0.25, optimizer=optimizer)
    assert train_reward_model(reward_model, pairs, config=settings, seed=0)["accuracy"] == 1.0
    expected = reward_model.map_responses(pairs[:1], reward_model.rewards)[0]
    if merged:
        merge_adapters(model)
    save_model(tmp_path / "saved", model, tiny_tokenizer())
    loaded = RewardModel.load(str(tmp_path / "saved"), precision="fp32")
    assert loaded.map_responses(pairs[:1], loaded.rewards)[0] == pytest.approx(expected, rel=1e-3)
