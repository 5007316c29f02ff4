"""Each TRL trainer, patched and not, from the same seed: 20 steps with the same numbers."""

from __future__ import annotations

import importlib
import inspect
import math
from collections import Counter

import pytest
import torch

pytestmark = pytest.mark.peers
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from packaging.version import Version  # noqa: E402
from transformers import set_seed  # noqa: E402

from rlhf_fast.integrations import deferred, trl_replacements  # noqa: E402
from rlhf_fast.integrations import trl as integration  # noqa: E402
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_reward_model, tiny_tokenizer  # noqa: E402

STEPS = 20
TIMES = ("runtime", "per_second", "step_time", "total_flos", "train_loss")
DPO_LOSSES = [
    ["sigmoid"], ["hinge"], ["ipo"], ["exo_pair"], ["nca_pair"], ["robust"], ["bco_pair"],
    ["sppo_hard"], ["aot"], ["aot_unpaired"], ["apo_zero"], ["apo_down"], ["discopop"], ["sft"],
    ["sigmoid_norm"], ["sigmoid", "bco_pair", "sft"],
]  # fmt: skip
SAMPLING = ("GRPO", "RLOO", "OnlineDPO")
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


def find(name):
    """Trainer and configuration, which moved between `trl` and `trl.experimental`."""
    module = trl
    if not hasattr(trl, f"{name}Trainer"):
        folder = {"OnlineDPO": "online_dpo"}.get(name, name.lower())
        module = importlib.import_module(f"trl.experimental.{folder}")
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


def trainer_for(name, folder, **options):
    common = {
        "output_dir": str(folder), "max_steps": STEPS, "logging_steps": 1, "seed": 0,
        "per_device_train_batch_size": 4, "learning_rate": 0.05, "optim": "sgd",
        "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "max_grad_norm": 1.0,
    }  # fmt: skip
    sampling = {"num_generations": 4, "max_completion_length": 8, "reward_funcs": count_evens}
    data = {"SFT": TEXTS, "KTO": LABELLED}.get(name, PROMPTS if name in SAMPLING else PAIRS)
    if name == "OnlineDPO":
        sampling = {"max_new_tokens": 8, "reward_funcs": count_evens}
    more = {}
    if name in SAMPLING:
        common |= {k: v for k, v in sampling.items() if k != "reward_funcs"}
        more["reward_funcs"] = sampling["reward_funcs"]
    set_seed(0)
    trainer, config = find(name)
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


def assert_same(patched, plain, rtol=3e-4):
    """Of every logged number; rounding differs from the first step on and grows over twenty."""
    assert len(patched) == len(plain) >= STEPS
    for step, (got, expected) in enumerate(zip(patched, plain)):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, float | int):
                assert math.isclose(got[key], value, rel_tol=rtol, abs_tol=1e-5) or (
                    math.isnan(value) and math.isnan(got[key])
                ), f"step {step}, {key}: {got[key]}, unpatched {value}"
    norms = [entry["grad_norm"] for entry in plain if "grad_norm" in entry]
    assert len(set(norms)) > 1, "no gradient: the comparison would show nothing"


@pytest.fixture
def calls(monkeypatch, record_property, request):
    """How often each of our functions was called."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    loss = "+".join(params.get("losses", ()))
    what = params.get("name") or (f"DPO, {loss}" if loss else "Reward")
    record_property("trajectory", f"{what}: {STEPS} steps")
    counter = Counter()

    def count(module, name):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            counter[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(trl_replacements, "from_logits")
    count(trl_replacements, "linear_logps")
    count(deferred, "linear_logps")
    return counter


def compare(name, tmp_path, calls, *used, **options):
    plain = trajectory(name, tmp_path / "plain", **options)
    assert not calls
    with integration.patch():
        patched = trajectory(name, tmp_path / "patched", **options)
    assert not used or sum(calls[name] for name in used) >= STEPS, calls
    assert_same(patched, plain)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO", "OnlineDPO", "ORPO", "CPO"])
def test_trainers_with_the_fused_head(name, tmp_path, calls):
    without = name == "KTO" and Version("0.29") <= Version(trl.__version__) < Version("1.8")
    compare(name, tmp_path, calls, "from_logits" if without else "linear_logps")


@pytest.mark.parametrize("name", ["SFT"])
def test_trainers_that_may_compute_logits(name, tmp_path, calls):
    compare(name, tmp_path, calls, "linear_logps", "from_logits")


def test_reward_trainer_is_left_as_it_is(tmp_path, calls):
    compare("Reward", tmp_path, calls)
    assert not calls


@pytest.mark.parametrize("losses", DPO_LOSSES, ids="+".join)
def test_every_dpo_loss(losses, tmp_path, calls):
    if losses == ["sigmoid_norm"] and "sigmoid_norm" not in inspect.getsource(trl.DPOTrainer):
        pytest.skip("this version does not have it")
    if trl.__version__.startswith("0.24."):
        losses = ["aot_pair" if name == "aot_unpaired" else name for name in losses]
    smoothing = {"label_smoothing": 0.1} if losses[0] in SMOOTHED else {}
    # discopop's tau of 0.05 multiplies rounding by 20: at full speed TRL leaves its own trajectory,
    # by 3e-4 in step 14, if weights change by 1e-7.
    slower = {"learning_rate": 0.01} if losses == ["discopop"] else {}
    compare("DPO", tmp_path, calls, "linear_logps", loss_type=losses, **smoothing, **slower)
