"""Each TRL trainer, patched and not, from the same seed: 20 steps with the same numbers."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

pytestmark = pytest.mark.peers
trl = pytest.importorskip("trl", minversion="1.16")

from datasets import Dataset  # noqa: E402
from transformers import set_seed  # noqa: E402

from rlhf_fast.integrations import deferred  # noqa: E402
from rlhf_fast.integrations import trl as integration  # noqa: E402
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_reward_model, tiny_tokenizer  # noqa: E402

STEPS = 20
TIMES = ("runtime", "per_second", "step_time", "total_flos", "train_loss")
DPO_LOSSES = [
    ["sigmoid"], ["hinge"], ["ipo"], ["exo_pair"], ["nca_pair"], ["robust"], ["bco_pair"],
    ["sppo_hard"], ["aot"], ["aot_unpaired"], ["apo_zero"], ["apo_down"], ["discopop"], ["sft"],
    ["sigmoid_norm"], ["sigmoid", "bco_pair", "sft"],
]  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


def words(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, VOCAB_SIZE, (n,), generator=generator).tolist()
    return " ".join(f"w{i}" for i in ids)


PROMPTS = [{"prompt": words(3 + i % 5, i)} for i in range(16)]
TEXTS = [{"text": words(6 + i % 7, i)} for i in range(16)]
PAIRS = [
    p | {"chosen": " " + words(2 + i % 6, 100 + i), "rejected": " " + words(7 - i % 6, 200 + i)}
    for i, p in enumerate(PROMPTS)
]
LABELLED = [
    p | {"completion": " " + words(2 + i % 6, 300 + i), "label": i % 3 != 0}
    for i, p in enumerate(PROMPTS)
]


def count_evens(completions, **_):
    """A reward that depends on the tokens and differs within a group."""
    return [
        float(sum(int(w[1:]) % 2 == 0 for w in c.split() if w[1:].isdigit())) for c in completions
    ]


def saved_model(folder):
    """GRPO and RLOO look up the configuration at the model's own address."""
    from transformers import AutoModelForCausalLM

    tiny_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def trainer_for(name, folder, **options):
    common = {
        "output_dir": str(folder), "max_steps": STEPS, "logging_steps": 1, "seed": 0,
        "per_device_train_batch_size": 4, "learning_rate": 0.05, "optim": "sgd",
        "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "max_grad_norm": 1.0,
    }  # fmt: skip
    sampling = {"num_generations": 4, "max_completion_length": 8, "reward_funcs": count_evens}
    trainers = {
        "SFT": (trl.SFTTrainer, trl.SFTConfig, TEXTS),
        "DPO": (trl.DPOTrainer, trl.DPOConfig, PAIRS),
        "KTO": (trl.KTOTrainer, trl.KTOConfig, LABELLED),
        "Reward": (trl.RewardTrainer, trl.RewardConfig, PAIRS),
        "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, PROMPTS),
        "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, PROMPTS),
    }
    if name == "OnlineDPO":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        trainers[name] = (OnlineDPOTrainer, OnlineDPOConfig, PROMPTS)
        sampling = {"max_new_tokens": 8, "reward_funcs": count_evens}
    if name == "ORPO":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainers[name] = (ORPOTrainer, ORPOConfig, PAIRS)
    if name == "CPO":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        trainers[name] = (CPOTrainer, CPOConfig, PAIRS)
    trainer, config, data = trainers[name]
    more = {}
    if name in ("GRPO", "RLOO", "OnlineDPO"):
        common |= {k: v for k, v in sampling.items() if k != "reward_funcs"}
        more["reward_funcs"] = sampling["reward_funcs"]
    set_seed(0)
    return trainer(
        model=tiny_reward_model() if name == "Reward" else saved_model(folder / "model"),
        args=config(**(common | options)),
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer(chat_template=None),
        **more,
    )


def trajectory(name, folder, **options):
    trainer = trainer_for(name, folder, **options)
    trainer.train()
    return [
        {k: v for k, v in entry.items() if not any(t in k for t in TIMES)}
        for entry in trainer.state.log_history
    ]


def assert_same(patched, plain, rtol=1e-4):
    assert len(patched) == len(plain) >= STEPS
    for step, (got, expected) in enumerate(zip(patched, plain)):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, float | int):
                assert math.isclose(got[key], value, rel_tol=rtol, abs_tol=1e-5) or (
                    math.isnan(value) and math.isnan(got[key])
                ), f"step {step}, {key}: {got[key]}, unpatched {value}"
    losses = [entry["loss"] for entry in plain if "loss" in entry]
    assert len(set(losses)) > 1, "the loss never moved: the comparison would show nothing"


@pytest.fixture
def calls(monkeypatch):
    """How often each of our functions was called."""
    counter = Counter()

    def count(module, name):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            counter[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(integration, "from_logits")
    count(integration, "linear_logps")
    count(deferred, "linear_logps")
    return counter


def compare(name, tmp_path, calls, used, **options):
    plain = trajectory(name, tmp_path / "plain", **options)
    assert not calls
    with integration.patch():
        patched = trajectory(name, tmp_path / "patched", **options)
    assert not used or calls[used] >= STEPS, f"{used} was called {calls[used]} times"
    assert_same(patched, plain)


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "OnlineDPO"])
def test_trainers_with_the_fused_head(name, tmp_path, calls):
    compare(name, tmp_path, calls, "linear_logps")


@pytest.mark.parametrize("name", ["ORPO", "CPO"])
def test_trainers_that_compute_logits(name, tmp_path, calls):
    compare(name, tmp_path, calls, "from_logits")


def test_reward_trainer_is_left_as_it_is(tmp_path, calls):
    compare("Reward", tmp_path, calls, None)
    assert not calls


@pytest.mark.parametrize("losses", DPO_LOSSES, ids="+".join)
def test_every_dpo_loss(losses, tmp_path, calls):
    smoothing = {"label_smoothing": 0.1} if losses[0] in SMOOTHED else {}
    compare("DPO", tmp_path, calls, "linear_logps", loss_type=losses, **smoothing)
