"""Whole runs of named methods: what the files say was sampled and selected gives the first loss.

Before the first step the policy is what sampled, so its log-probabilities are on file too.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rlhf_fast.errors import UserError
from rlhf_fast.online.config_file import config_with
from rlhf_fast.online.workflow import run_online
from rlhf_fast.recipes import METHODS
from tests.online.helpers import prompt_rows, rows_of, write_rows
from tests.training.test_group_methods import centred, standardised

ENDING = {"sft": {"learning_rate": 1e-2, "num_epochs": 2}}
"""Teaches the tiny model to end some of its responses."""
WHOLE = {"batch_size": 64}
"""A batch of everything, so that there is one step in an epoch."""
OPTIMIZERS = {"dpo": {"optimizer": WHOLE}, "rl": {"optimizer": WHOLE}, "nll": WHOLE}


def finished_run(config, method, *, num_iterations=1, **changes):
    """Folders of the iterations of a run of the method."""
    for settings in (OPTIMIZERS, METHODS[method][1], changes):
        config = config_with(config, settings, method)
    run_online(replace(config, num_iterations=num_iterations))
    return [Path(config.output_dir) / f"iteration_{k + 1}" for k in range(num_iterations)]


def first_loss(folder):
    return rows_of(folder / "training.jsonl")[0]["loss"]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def mean_logp(completion):
    return statistics.fmean(completion["sampling_logps"])


def pair_losses(folder, loss):
    pairs = [(p["chosen"], p["rejected"]) for p in rows_of(folder / "pairs.jsonl")]
    assert pairs
    return statistics.fmean(loss(*pair) for pair in pairs)


PAIR_LOSSES = {
    "iterative-dpo": lambda chosen, rejected: math.log(2),
    "rpo": lambda chosen, rejected: math.log(2) - mean_logp(chosen),
    "r-dpo": lambda chosen, rejected: (
        -log_sigmoid(0.01 * (len(chosen["token_ids"]) - len(rejected["token_ids"])))
    ),
    "simpo": lambda chosen, rejected: (
        -log_sigmoid(2.5 * (mean_logp(chosen) - mean_logp(rejected)) - 1.4)
    ),
}


@pytest.mark.parametrize("method", PAIR_LOSSES)
def test_pairs(config, method):
    (folder,) = finished_run(config, method)
    expected = pair_losses(folder, PAIR_LOSSES[method])
    assert first_loss(folder) == pytest.approx(expected, rel=1e-4)


def test_length_has_its_price(config):
    shaping = {"length_penalty": 0.5, "unfinished_penalty": 3.0}
    (folder,) = finished_run(config, "iterative-dpo", reward={"shaping": shaping})
    for group in rows_of(folder / "scored.jsonl"):
        for completion, reward, raw in zip(
            group["completions"], group["rewards"], group["components"]["raw"], strict=True
        ):
            price = 0.5 * len(completion["token_ids"]) + 3.0 * (not completion["finished"])
            assert reward == pytest.approx(raw - price) and raw == -len(completion["text"])


def test_dr_grpo_divides_by_the_token_limit(config):
    (folder,) = finished_run(config, "dr-grpo", **ENDING)
    groups = rows_of(folder / "selected.jsonl")
    total = sum(
        -a * len(c["token_ids"])
        for g in groups
        for a, c in zip(centred(g["rewards"]), g["completions"], strict=True)
    )
    limit = config.generation.sampling.max_new_tokens
    expected = total / sum(len(g["rewards"]) for g in groups) / limit
    assert abs(expected) > 1e-3
    assert first_loss(folder) == pytest.approx(expected, rel=1e-4)


def test_dapo_shapes_and_leaves_out_overlong_responses(config):
    text = (
        "parts: [{name: good, function: helpers:varied}, {name: long, weight: 0.5, "
        "rule: {kind: overlong, max_tokens: 8, buffer_tokens: 4}}]"
    )
    (folder,) = finished_run(
        config,
        "dapo",
        reward={"function": None, **yaml.safe_load(text)},
        rl={"mask_unfinished": True},
        **ENDING,
    )
    total = num_tokens = num_cut = 0
    for group in rows_of(folder / "selected.jsonl"):
        parts, lengths = group["components"], [len(c["token_ids"]) for c in group["completions"]]
        assert parts["long"] == [-max(0, n - 4) / 4 for n in lengths]
        rewards = [a + 0.5 * b for a, b in zip(parts["good"], parts["long"], strict=True)]
        assert group["rewards"] == pytest.approx(rewards)
        for a, n, c in zip(standardised(rewards), lengths, group["completions"], strict=True):
            num_cut += not c["finished"]
            if c["finished"]:
                total, num_tokens = total - a * n, num_tokens + n
    assert num_cut and first_loss(folder) == pytest.approx(total / num_tokens, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["raft", "expert-iteration"])
def test_imitation(config, method):
    (folder,) = finished_run(config, method, reward={"function": "helpers:even_length"})
    kept = {g["prompt"]["id"]: g for g in rows_of(folder / "selected.jsonl")}
    for group in rows_of(folder / "scored.jsonl"):
        rewards = (
            [1.0] * int(sum(group["rewards"])) if method != "raft" else [max(group["rewards"])]
        )
        found = kept.get(group["prompt"]["id"], {"rewards": []})
        assert found["rewards"] == rewards
    logps = [logp for g in kept.values() for c in g["completions"] for logp in c["sampling_logps"]]
    assert first_loss(folder) == pytest.approx(-statistics.fmean(logps), rel=1e-4)


def test_spin_prefers_the_data_and_moves_its_reference(config, tmp_path):
    rows = [row | {"response": f"w{40 + i} w41"} for i, row in enumerate(prompt_rows())]
    prompts = write_rows(tmp_path / "with_responses.jsonl", rows)
    folders = finished_run(
        config,
        "spin",
        num_iterations=2,
        data={"prompts": prompts},
        generation={"num_generations": 1},
        dpo={"optimizer": {"learning_rate": 1e-2, "num_epochs": 3}},
    )
    by_prompt = {row["prompt"]: row["response"] for row in rows}
    metrics = rows_of(folders[0].parent / "metrics.jsonl")
    for folder, row in zip(folders, metrics[1:], strict=True):
        pairs = rows_of(folder / "pairs.jsonl")
        assert len(pairs) == 9
        for pair in pairs:
            chosen = pair["chosen"]
            assert chosen["text"] == by_prompt[chosen["prompt"]["messages"][-1]["content"]]
            assert (chosen["source"], pair["rejected"]["source"]) == ("data", "policy")
        assert first_loss(folder) == pytest.approx(math.log(2), rel=1e-4)  # reference = policy
        sampled = [g["rewards"][0] for g in rows_of(folder / "scored.jsonl")]
        assert row["train_reward"] == pytest.approx(statistics.fmean(sampled))
    last = rows_of(folders[0] / "training.jsonl")[-1]
    assert last["loss"] < 0.6


def test_spin_without_its_sampler_is_refused(config):
    with pytest.raises(UserError, match="data_vs_policy needs generation.sampler.kind with_resp"):
        config_with(config, {"selection": {"rule": "data_vs_policy"}}, "test")
