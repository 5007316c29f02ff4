"""What the policy is tied to in each iteration, and that a continued run agrees."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.errors import UserError
from rlhf_fast.online.config import ReferenceConfig
from rlhf_fast.online.run_folder import RunFolder
from rlhf_fast.online.workflow import run_online
from tests.online.helpers import kill_and_resume, rows_of, rows_without_times


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def mix(a, b, share):
    return {name: share * a[name] + (1 - share) * b[name] for name in a}


def close(a, b):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


@pytest.fixture
def run(config, tmp_path):
    def start(**options) -> Path:
        reference = ReferenceConfig(**options)
        run_online(replace(config, reference=reference, keep_checkpoints=9))
        return tmp_path / "run"

    return start


def test_ema_averages_the_policies(run):
    folder = run(rule="ema", decay=0.25)
    sft, policy = weights(folder / "sft/model"), weights(folder / "iteration_1/policy")
    close(weights(folder / "iteration_1/reference"), sft)
    close(weights(folder / "iteration_2/reference"), mix(sft, policy, 0.25))


def test_soup_is_the_mean_of_the_models(run, model_path):
    folder = run(rule="soup", models=("sft", model_path), weights=(3.0, 1.0))
    sft, other = weights(folder / "sft/model"), weights(Path(model_path))
    close(weights(folder / "reference/model"), mix(sft, other, 0.75))
    assert rows_without_times(folder)[0]["kl"] != 0.0


def test_extrapolation_goes_beyond_what_was_trained(run):
    folder = run(extrapolation=0.5)
    stages = {s["name"]: s["seconds"] for s in RunFolder(folder).manifest()["stages"]}
    updates = [stages[f"iteration_1/{name}"] for name in ("trained", "policy")]
    assert rows_of(folder / "metrics.jsonl")[1]["seconds_update"] == pytest.approx(sum(updates))
    before = weights(folder / "sft/model")
    for iteration in (1, 2):
        trained = weights(folder / f"iteration_{iteration}/trained")
        close(weights(folder / f"iteration_{iteration}/policy"), mix(trained, before, 1.5))
        before = trained


@pytest.mark.parametrize(
    "options",
    [{"rule": "previous"}, {"rule": "ema"}, {"extrapolation": 0.5}],
    ids=lambda options: next(iter(options.values())),
)
def test_a_continued_run_has_the_same_references(config, tmp_path, options):
    config = replace(config, reference=ReferenceConfig(**options), keep_checkpoints=1)
    run_online(replace(config, output_dir=str(tmp_path / "whole")))
    expected = rows_without_times(tmp_path / "whole")
    for index, stage in enumerate(["iteration_2/completions", "iteration_2/evaluation"]):
        killed = replace(config, output_dir=str(tmp_path / f"killed_{index}"))
        assert kill_and_resume(killed, stage, "start") == expected


def test_the_reference_matters(config, tmp_path):
    rows = {}
    for rule in ("sft", "previous", "ema"):
        changed = replace(config, output_dir=str(tmp_path / rule))
        run_online(replace(changed, reference=ReferenceConfig(rule)))
        rows[rule] = rows_without_times(tmp_path / rule)
    assert rows["sft"][1] == rows["previous"][1] == rows["ema"][1]
    assert len({rows[rule][2]["loss"] for rule in rows}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay must be in"),
        ({"rule": "soup"}, "`models` and rule `soup` go together"),
        ({"models": ("a",)}, "`models` and rule `soup` go together"),
        ({"rule": "soup", "models": ("a", "b"), "weights": (1.0,)}, "got 1 for 2"),
        ({"extrapolation": -1.0}, "extrapolation must be >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        ReferenceConfig(**options)
