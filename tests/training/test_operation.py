"""What must not change a training run: how it is split, killed, resumed or shared out."""

import io
import json
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers.trainer_pt_utils import get_parameter_names

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import LoraConfig, add_lora
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training.checkpoints import Checkpoints
from rlhf_fast.training.engine import Engine, make_engine, share_out
from rlhf_fast.training.fit import FitOptions, OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_dpo
from rlhf_fast.training.progress import TrainingProgress
from rlhf_fast.training.sft import train_sft
from tests.tiny import tiny_model
from tests.training.examples import make_pairs
from tests.training.launched import command, result_of

CONFIG = OptimizerConfig(learning_rate=1e-3, num_epochs=10, batch_size=8)


def test_killed_at_any_moment_and_resumed_it_is_bit_for_bit_the_same(tmp_path):
    expected = result_of("dpo", tmp_path / "whole")
    directory = tmp_path / "killed"
    directory.mkdir()
    for steps_until_killed in (1, 5, 4):
        process = subprocess.Popen(
            [sys.executable, *command("dpo", directory, "0.05")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(steps_until_killed):
            assert process.stdout.readline().startswith("step")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert [p.name for p in (directory / "checkpoints_dpo").glob("step_?")] == ["step_6"]
    assert result_of("dpo", directory) == expected


def trajectory(**options):
    model = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32", **options)
    reference = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    pairs = make_pairs(16)
    rows = train_dpo(model, reference, pairs, config=DPOConfig(optimizer=CONFIG), seed=0)
    return torch.tensor([[row["loss"], row["grad_norm"]] for row in rows])


def test_gradient_checkpointing_changes_nothing():
    whole = trajectory()
    torch.testing.assert_close(trajectory(gradient_checkpointing=True), whole, rtol=1e-4, atol=1e-5)


def test_the_weight_average_is_the_result():
    model = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    reference = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    initial = [p.detach().clone() for p in model.model.parameters()]
    config = OptimizerConfig(learning_rate=1e-3, batch_size=8, ema_decay=0.999)
    seen = []

    def on_step(row, total):
        seen.append([p.detach().clone() for p in model.model.parameters()])

    train_dpo(
        model,
        reference,
        make_pairs(16),
        config=DPOConfig(optimizer=config),
        seed=0,
        on_step=on_step,
    )
    for p, start, first, second in zip(model.model.parameters(), initial, *seen):
        expected = start * 0.1 + first * 0.9  # decay (1 + 0) / (10 + 0)
        expected = expected * (2 / 11) + second * (9 / 11)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    options = FitOptions(Checkpoints(tmp_path, every_steps=1))
    model = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    pairs, config = make_pairs(8), DPOConfig(optimizer=replace(CONFIG, num_epochs=1))
    train_dpo(model, model, pairs, config=config, seed=0, options=options)
    with pytest.raises(UserError, match="other data or settings"):
        train_dpo(model, model, pairs, config=config, seed=1, options=options)
    edited = [*pairs[:-1], replace(pairs[-1], rejected=replace(pairs[-1].rejected))]
    train_dpo(model, model, edited, config=config, seed=0, options=options)  # in name only
    ids = [*edited[-1].rejected.token_ids[:-1], 77]  # as long as before
    edited[-1] = replace(edited[-1], rejected=replace(edited[-1].rejected, token_ids=ids))
    with pytest.raises(UserError, match="other data or settings"):
        train_dpo(model, model, edited, config=config, seed=0, options=options)
    file = tmp_path / "step_1" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="damaged checkpoint"):
        train_dpo(model, model, pairs, config=config, seed=0, options=options)


def test_a_checkpoint_is_continued_by_more_processes_and_other_gpus(tmp_path, monkeypatch):
    pairs, config = make_pairs(8), DPOConfig(optimizer=replace(CONFIG, num_epochs=2))
    options = FitOptions(Checkpoints(tmp_path, every_steps=1))

    def train():
        model = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
        return train_dpo(model, None, pairs, config=config, seed=0, options=options)

    rows = train()
    state = json.loads((tmp_path / "step_2" / "state.json").read_text())
    state["rng"][0]["cuda"] = ["00"] * (torch.cuda.device_count() + 1)
    (tmp_path / "step_2" / "state.json").write_text(json.dumps(state))
    assert train() == rows
    monkeypatch.setattr(Engine, "rank", 1)
    monkeypatch.setattr(Engine, "num_processes", 2)
    assert train() == rows


def test_dropout_of_adapters_depends_on_the_seed_alone():
    def losses(seed, before):
        model = tiny_model()
        add_lora(model, LoraConfig(rank=4, dropout=0.5), seed=0)
        policy = LanguageModel(model, pad_token_id=3, precision="fp32")
        torch.manual_seed(before)
        groups = [TokenGroup([10, 11], [[20, 21, 3]])]
        rows = train_sft(policy, groups, config=replace(CONFIG, batch_size=1), seed=seed)
        return [row["loss"] for row in rows], torch.rand(())

    first, drawn = losses(0, before=1)
    assert losses(0, before=2)[0] == first != losses(1, before=1)[0]
    assert drawn == torch.rand((), generator=torch.Generator().manual_seed(1))


def test_weight_decay_spares_norms_and_biases():
    """As transformers' trainer has it."""
    config = replace(CONFIG, learning_rate=1e-2, weight_decay=0.5, max_grad_norm=1e9)
    groups = [TokenGroup([10, 11], [[20, 21, 3]])]
    trained, plain = (tiny_model("gpt2") for _ in range(2))
    policy = LanguageModel(trained, pad_token_id=3, precision="fp32")
    rows = train_sft(policy, groups, config=config, seed=0)
    names = get_parameter_names(plain, [torch.nn.LayerNorm], [r"bias"])
    decayed = [p for name, p in plain.named_parameters() if name in names]
    others = [p for name, p in plain.named_parameters() if name not in names]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    )
    ids, labels = torch.tensor([[[10, 11, 20, 21, 3]], [[-100, -100, 20, 21, 3]]])
    for row in rows:
        for group in optimizer.param_groups:
            group["lr"] = row["learning_rate"]
        loss = plain(input_ids=ids, labels=labels).loss
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_shares_are_even_and_complete():
    sizes = [50, 1, 1, 20, 30, 7]
    shares = share_out(sizes, 2)
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert {sum(sizes[i] for i in share) for share in shares} == {52, 57}
    assert share_out([5], 2) == [[0], []]


@pytest.mark.parametrize("kind", ["MEGATRON_LM", "TP"])
def test_other_ways_to_launch_are_refused(kind):
    model = LanguageModel(tiny_model(), pad_token_id=3, precision="fp32")
    launched = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), num_processes=2)
    with pytest.raises(UserError, match=f"{kind} is not supported: launch FSDP2"):
        make_engine(model, CONFIG, launched)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_says_loss_speed_memory_and_time_left(is_terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=160)
    progress = TrainingProgress("preference", console)
    for step in (1, 2):
        progress.step({"step": step, "loss": 0.5, "grad_norm": 2.0, "num_tokens": 100}, 2)
    progress.close()
    for text in ("preference", "2/2", "loss 0.5000", "grad norm 2", "tokens/s", "GiB"):
        assert text in out.getvalue()
    assert ("left" in out.getvalue()) == is_terminal


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_numbers_are_float32_whatever_torch_takes_by_default(default):
    policies = [LanguageModel(tiny_model(), pad_token_id=3, precision="fp32") for _ in range(2)]
    config = DPOConfig(optimizer=replace(CONFIG, num_epochs=2))
    expected = train_dpo(policies[0], None, make_pairs(8), config=config, seed=0)
    torch.set_default_dtype(default)
    try:
        rows = train_dpo(policies[1], None, make_pairs(8), config=config, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rows == expected
