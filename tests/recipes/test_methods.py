"""Every named method runs through one iteration of the small run and is in the paper index."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.endpoint import Endpoint
from rlhf_fast.online.config import OnlineConfig, RewardConfig
from rlhf_fast.online.config_file import config_from_yaml, config_to_yaml, config_with
from rlhf_fast.online.workflow import run_online
from rlhf_fast.recipes import METHODS, RECIPES
from rlhf_fast.training.fit import OptimizerConfig
from rlhf_fast.training.gating import GateConfig
from tests.loopback import serve
from tests.online.helpers import prompt_rows, rows_of, write_rows
from tests.online.test_reward_training import score_rows, wishes
from tests.rewards.test_judge import choices

INDEX = Path(__file__).parents[2] / "docs" / "paper_index.md"
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, batch_size=4)
ENSEMBLES = ("wco", "uwo", "lcb-ensemble", "reward-robust", "preference-votes", "ser")
REWARD_MODELS = (
    "lcb-heads",
    "pairwise-model",
    "qrm",
    "armorm",
    "k-wise",
    "ids",
    "segrm",
    "conservative-labels",
    "contrastive-features",
    "rluf",
)
JUDGES = {"rlaif": 0.5, "d-rlaif": 7.0, "genrm": 0.5, "rlbff": 1.0}
"""What a judge that likes all responses alike gives them."""


def judge(path, body):
    verdicts = {"Rate the response": "[[7]]", "satisfy the principle": "[[YES]]"}
    question = body["messages"][0]["content"]
    text = next((v for words, v in verdicts.items() if words in question), "[[A]]")
    return choices(*[text] * body["n"])


def what_the_user_gives(name: str, config: OnlineConfig, model: str, url: str) -> OnlineConfig:
    """The small run with what the method's row leaves to the user."""
    reward = RewardConfig(function="helpers:varied")
    if name in ENSEMBLES:
        training = replace(reward.training, parameters="head")
        reward = RewardConfig(labeller="helpers:varied", training=training)
    elif name in REWARD_MODELS:
        training = replace(reward.training, optimizer=OPTIMIZER)
        reward = RewardConfig(labeller="helpers:varied", training=training)
        if name == "armorm":
            folder = Path(config.output_dir).parent
            gate = GateConfig(width=8, num_steps=3)
            reward = RewardConfig(
                scores=write_rows(folder / "scores.jsonl", score_rows()),
                pairs=write_rows(folder / "pairs.jsonl", wishes()),
                training=replace(training, gate=gate),
            )
    elif name == "sharpening":
        reward = RewardConfig(strong_model=model)
    elif name == "maxmin":
        reward = RewardConfig(models=(f"{model}-rm", f"{model}-rm"))
    elif name == "heron":
        text = (
            "reward: {parts: [{name: even, function: helpers:even_length}, "
            "{name: good, function: helpers:varied, margin: 0.1}]}"
        )
        path = Path(config.output_dir).parent / "parts.yaml"
        path.write_text(text)
        reward = config_from_yaml(path, OnlineConfig()).reward
    elif name == "cgpo":
        text = (
            "reward: {parts: [{name: good, function: helpers:varied}, "
            "{name: even, function: helpers:even_length, is_constraint: true, threshold: 1}]}"
        )
        path = Path(config.output_dir).parent / "parts.yaml"
        path.write_text(text)
        reward = config_from_yaml(path, OnlineConfig()).reward
    elif name == "fine-grained":
        text = (
            f"reward: {{parts: [{{name: good, model: {model}-rm, segments: sentences}}, "
            "{name: odd, function: helpers:odd_tokens, per_token: true, weight: 0.5}]}"
        )
        path = Path(config.output_dir).parent / "parts.yaml"
        path.write_text(text)
        reward = config_from_yaml(path, OnlineConfig()).reward
    elif name.endswith("-steps"):
        reward = RewardConfig(function="helpers:steps", steps="sum")
    elif name in JUDGES:
        given = {"url": url, "model": "m", "principles": ["It is short.", "It is true."]}
        reward = config_with(RewardConfig(), {"judge": given}, "test")
    generation = replace(config.generation, num_generations=4)
    rl = replace(config.rl, optimizer=OPTIMIZER)
    lists = replace(config.list, optimizer=OPTIMIZER)
    unpaired = replace(config.unpaired, optimizer=OPTIMIZER)
    return replace(
        config,
        num_iterations=1,
        reward=reward,
        generation=generation,
        rl=rl,
        list=lists,
        unpaired=unpaired,
        nll=OPTIMIZER,
    )


@pytest.fixture(scope="module")
def reward_model_path(model_path):
    from rlhf_fast.models.reward_model import fresh_reward_model
    from tests.tiny import tiny_tokenizer

    model = fresh_reward_model(model_path)
    import torch

    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(f"{model_path}-rm")
    tiny_tokenizer().save_pretrained(f"{model_path}-rm")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_runs(
    name, config, model_path, reward_model_path, answering_path, judging_path, monkeypatch
):
    monkeypatch.setattr(Endpoint, "__init__", _few_at_a_time(Endpoint.__init__))
    rows = [row | {"response": "w21 w22 w23"} for row in prompt_rows()]
    prompts = write_rows(Path(config.output_dir).parent / "with_responses.jsonl", rows)
    with serve(judge) as url:
        config = what_the_user_gives(name, config, model_path, url)
        config = replace(config, data=replace(config.data, prompts=prompts))
        changes = METHODS[name][1]
        if name == "salsa":
            changes = {"reference": {"rule": "soup", "models": ["sft", model_path]}}
        if name == "self-rewarding":
            data = replace(config.data, demonstrations=None)
            config = replace(config, model=judging_path, data=data)
            short = changes["reward"]["judge"] | {"max_tokens": 6}
            changes = {"reward": changes["reward"] | {"judge": short}}
        if name == "nash-md":
            config = replace(config, reward=RewardConfig(pairwise_model=answering_path))
        config = config_with(config, changes, name)
        if name == "pairwise-model":
            config = replace(config, model=answering_path)
        if name in JUDGES:
            from rlhf_fast.errors import UserError

            with pytest.raises(UserError, match="nothing is selected"):
                run_online(config)  # this judge likes all responses alike
            scored = rows_of(Path(config.output_dir) / "iteration_1/scored.jsonl")
            assert {r for g in scored for r in g["rewards"]} == {JUDGES[name]}
            return
        run_online(config)
    (_, row) = rows_of(Path(config.output_dir) / "metrics.jsonl")
    assert row["loss"] == row["loss"] and (row.get("num_pairs") or row.get("num_responses"))


def _few_at_a_time(original):
    def init(self, *arguments, **options):
        original(self, *arguments, **{**options, "concurrency": 4, "retries": 0})

    return init


def test_the_paper_index_names_every_method():
    text = INDEX.read_text()
    ids = {int(match) for match in re.findall(r"^\| (\d+) \|", text, re.M)}
    for name, (number, _) in METHODS.items():
        assert f"--method {name}`" in text, name
        assert number == 0 or number in ids, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_goes_with_every_recipe(recipe):
    for name, (_, changes) in METHODS.items():
        once = config_with(RECIPES[recipe](), changes, name)
        assert config_with(once, changes, name) == once


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_survives_yaml(name, tmp_path):
    base = replace(OnlineConfig(), reward=RewardConfig())
    config = config_with(base, METHODS[name][1], name)
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert config_from_yaml(tmp_path / "config.yaml", OnlineConfig()) == config
