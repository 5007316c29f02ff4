"""What DeepSpeed's ZeRO does beyond `test_trajectories` and `test_run_folders` show of it."""

import json
import shutil
import subprocess
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import AdapterConfig
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.training import zero_config
from rlhf_fast.training.optimizer import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig
from rlhf_fast.training.runs import PreferenceRun, run_preference
from rlhf_fast.training.session import ComputeConfig, OutputConfig
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.launched import LAUNCHERS, ZERO


def needs_deepspeed(test):
    missing = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
    return pytest.mark.peers(missing(test))


SETTINGS = {"learning_rate": 3e-3, "num_epochs": 2, "batch_size": 4, "weight_decay": 0.1}


@pytest.fixture
def options(tmp_path):
    save_model(tmp_path / "base", tiny_model(tie_word_embeddings=True), tiny_tokenizer())
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": "w50 w51", "rejected": f"w60 w{i}"}
        for i in range(100, 110)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(tmp_path / "base"), "data": str(tmp_path / "data.jsonl")}


def by_one_process(options, directory, lora_rank=0, **optimizer):
    run = PreferenceRun(
        **options,
        output=OutputConfig(directory=str(directory)),
        compute=ComputeConfig(device="cpu", precision="fp32"),
        dpo=DPOConfig(optimizer=OptimizerConfig(**SETTINGS, **optimizer)),
        lora=AdapterConfig(rank=lora_rank),
    )
    return run_preference(run)


def by_two(launcher, options, directory, *more, **optimizer):
    command = [*launcher, "-m", "rlhf_fast.training", "preference", *more]
    settings = {**options, "output": directory, "device": "cpu", "precision": "fp32"}
    settings["micro-batch-tokens"] = 12  # several micro-batches, not equally many per process
    settings["row-tokens"] = 0
    settings |= {f"dpo.optimizer.{k}": v for k, v in (SETTINGS | optimizer).items()}
    command[len(launcher) + 3 : len(launcher) + 3] = [
        part for name, value in settings.items() for part in (f"--{name}", str(value))
    ]
    return subprocess.run(command, capture_output=True, text=True)


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_alike(directory, expected):
    for mine, theirs in zip(rows_of(directory), rows_of(expected), strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "num_tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name


@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_tied_model_its_average_and_its_checkpoints(tmp_path, options, stage):
    """The average is the result; a run taken up again ends bit for bit as it did before."""
    expected = by_one_process(options, tmp_path / "one", ema_decay=0.9)
    directory = tmp_path / stage
    more = ("--checkpoint-steps", "4")
    done = by_two(LAUNCHERS[stage], options, directory, *more, ema_decay=0.9)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(directory, tmp_path / "one")
    trained = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert trained.lm_head.weight is trained.model.embed_tokens.weight
    other = AutoModelForCausalLM.from_pretrained(expected)
    for mine, theirs in zip(trained.parameters(), other.parameters(), strict=True):
        assert (mine - theirs).square().mean().sqrt() < 0.05 * SETTINGS["learning_rate"]

    rows = rows_of(directory)
    shutil.rmtree(directory / "model")
    (directory / "metrics.jsonl").unlink()
    assert [p.name for p in (directory / "checkpoints").iterdir()] == ["step_4"]
    done = by_two(LAUNCHERS[stage], options, directory, *more, ema_decay=0.9)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows_of(directory) == rows
    again = AutoModelForCausalLM.from_pretrained(directory / "model")
    for mine, theirs in zip(again.parameters(), trained.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_and_what_is_kept_in_main_memory(tmp_path, options, stage):
    by_one_process(options, tmp_path / "one", lora_rank=4)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if stage >= 2:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    launcher = [*LAUNCHERS["zero3"][:2], *ZERO, "--deepspeed_config_file", tmp_path / "zero.json"]
    lora = ("--lora.rank", "4")
    done = by_two(launcher, options, tmp_path / "two", *lora)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(tmp_path / "two", tmp_path / "one")
    name = "model/adapter_model.safetensors"
    mine, theirs = (load_file(tmp_path / run / name) for run in ("two", "one"))
    for key, value in theirs.items():
        assert (mine[key] - value).square().mean().sqrt() < 0.05 * SETTINGS["learning_rate"]


@needs_deepspeed
def test_merging_every_step_is_refused(tmp_path, options):
    done = by_two(LAUNCHERS["zero3"], options, tmp_path / "run", **{"merging.rule": "ties"})
    assert done.returncode != 0
    assert "optimizer.merging needs whole weights" in done.stderr


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"bf16": {"enabled": True}}, "bf16: --precision decides"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: --optimizer.max_grad_norm decides"),
        ({"gradient_accumulation_steps": 4}, "--micro_batch_tokens decides"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}, r"optimizer: --optimizer.\* dec"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel: it is not supported"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer: device must be cpu, ratio 1, got",
        ),
    ],
)
def test_what_a_configuration_must_not_say(section, says):
    with pytest.raises(UserError, match=says):
        zero_config.checked(section)


def test_what_is_taken_of_a_configuration():
    config = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "gradient_accumulation_steps": 1,
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True},
        "steps_per_print": 10,
    }
    assert zero_config.checked(config) == {
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "steps_per_print": 10,
    }


def test_deepspeed_that_is_missing_or_old_is_named(tmp_path, options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(zero_config.metadata, "version", missing)
    with pytest.raises(UserError, match="DeepSpeed, which is not installed: pip install"):
        by_one_process(options, tmp_path / "run")
    monkeypatch.setattr(zero_config.metadata, "version", lambda name: "0.18.9")
    with pytest.raises(UserError, match="DeepSpeed 0.18.9 may lose gradients"):
        by_one_process(options, tmp_path / "run")


@needs_deepspeed
def test_processes_must_be_started_by_a_launcher(tmp_path, options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="start its processes by"):
        by_one_process(options, tmp_path / "run")
