"""The paper's recipe, number by number, on stand-ins for its data sets."""

from __future__ import annotations

from dataclasses import replace

import datasets
import pytest

from rlhf_fast import hub
from rlhf_fast.online.prompts import load_all_prompts
from rlhf_fast.online.rounds import prompts_of_iteration
from rlhf_fast.recipes import paper, rlhf_workflow


@pytest.fixture
def published(monkeypatch):
    """Small sets with the columns of the published ones."""

    def load(name, split):
        assert split == "train"
        messages = [{"role": "user", "content": f"{name} {number}"} for number in range(40)]
        return datasets.Dataset.from_list([{"context_messages": [m]} for m in messages])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "look_up", lambda kind, name, argument: None)


def test_iterations_have_prompts_of_their_own(published):
    config = rlhf_workflow()
    prompts, held_out = load_all_prompts(config)
    assert len(prompts) + len(held_out) == 3 * 40
    seen = {p.messages[0]["content"].split()[0] for p in prompts}
    assert seen == set(paper.PROMPT_SETS)
    config = replace(config, data=replace(config.data, prompts_per_iteration=36))
    drawn = [p.id for k in (1, 2, 3) for p in prompts_of_iteration(prompts, k, config)]
    assert len(set(drawn)) == 3 * 36


def test_numbers():
    config = rlhf_workflow()
    sampling, dpo = config.generation.sampling, config.dpo
    assert (config.num_iterations, config.data.prompts_per_iteration) == (3, 20_000)
    assert (config.generation.num_generations, sampling.temperature) == (8, 1.0)
    assert (sampling.max_new_tokens, sampling.top_p, sampling.top_k) == (2048, 1.0, 0)
    assert (dpo.loss_type, dpo.beta, dpo.label_smoothing) == ("sigmoid", 0.1, 0.0)
    optimizer = dpo.optimizer
    assert (optimizer.learning_rate, optimizer.num_epochs) == (5e-7, 2)
    assert (optimizer.batch_size, optimizer.schedule, optimizer.warmup_steps) == (128, "cosine", 0)
    assert (config.reference.rule, config.selection.rule) == ("sft", "best_vs_worst")
    assert not config.data.accumulate and not config.selection.keep_ties
    sft = config.sft
    assert (sft.learning_rate, sft.batch_size, sft.schedule) == (2e-5, 128, "cosine")
    reward = config.reward.training.optimizer
    assert (reward.learning_rate, reward.batch_size, reward.weight_decay) == (2e-6, 512, 1e-3)
