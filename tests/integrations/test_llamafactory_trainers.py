"""LLaMA-Factory's own runs, from a configuration as in its YAML files, patched and not."""

from __future__ import annotations

import json
import math

import pytest
import torch
from llamafactory.train.tuner import run_exp

from rlhf_fast.integrations import llamafactory
from tests.tiny import VOCAB_SIZE

pytestmark = pytest.mark.peers

STEPS = 20
ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "it"}


def write_data(folder):
    generator = torch.Generator().manual_seed(0)

    def words(n):
        ids = torch.randint(20, VOCAB_SIZE, (n,), generator=generator).tolist()
        return " ".join(f"w{i}" for i in ids)

    said = lambda who, n: {"role": who, "content": words(n)}  # noqa: E731
    numbers = range(40)
    pairs = [
        {"messages": [said("user", 5)], "chosen": said("it", 3 + i % 5)}
        | {"rejected": said("it", 7 - i % 5)}
        for i in numbers
    ]
    labelled = [
        {"messages": [said("user", 5), said("it", 3 + i % 5)], "label": i % 3 != 0} for i in numbers
    ]
    columns = {
        "pairs": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
        "labelled": {"messages": "messages", "kto_tag": "label"},
    }
    info = {}
    for name, rows in (("pairs", pairs), ("labelled", labelled)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
        info[name] = {"file_name": f"{name}.json", "formatting": "sharegpt", "tags": ROLES}
        info[name] |= {"columns": columns[name], "ranking": name == "pairs"}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def trajectory(model_path, folder, out, **options):
    run_exp(
        {
            "model_name_or_path": model_path, "finetuning_type": "full", "template": "empty",
            "dataset_dir": str(folder), "cutoff_len": 64, "output_dir": str(folder / out),
            "per_device_train_batch_size": 2, "learning_rate": 0.01, "optim": "sgd",
            "max_steps": STEPS, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
            "use_cpu": True, "disable_tqdm": True, "do_train": True, **options,
        }
    )  # fmt: skip
    return json.loads((folder / out / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize(
    "options",
    [
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "sigmoid"},
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "sigmoid", "pref_ftx": 0.5},
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "hinge"},
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "ipo", "ld_alpha": 0.5},
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "kto_pair"},
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"},
        {"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo"},
        {"stage": "kto", "dataset": "labelled"},
    ],
    ids=lambda o: " ".join(str(v) for k, v in o.items() if k != "dataset"),
)
def test_runs(options, model_path, tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")  # of packages that training does not need
    name = options["stage"].upper() + ", ".join(["", *map(str, list(options.values())[2:])])
    record_property("trajectory", f"{name}: {STEPS} steps")
    write_data(tmp_path)
    plain = trajectory(model_path, tmp_path, "plain", **options)
    with llamafactory.patch():
        patched = trajectory(model_path, tmp_path, "patched", **options)
    assert len(patched) == len(plain) == STEPS + 1
    for step, (got, expected) in enumerate(zip(patched, plain)):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, float) and not key.startswith("train_"):  # which are times
                assert math.isclose(got[key], value, rel_tol=3e-4, abs_tol=1e-5), (
                    f"step {step}, {key}: {got[key]}, unpatched {value}"
                )
    assert len({entry["grad_norm"] for entry in plain[:-1]}) > 1
