"""What a run is given: prompts keep apart and stay what they are, mistakes show before any work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_fast.errors import UserError
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.config_file import config_with
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.prompts import load_all_prompts, too_long_for_rewards
from rlhf_fast.online.workflow import resume, run_online
from rlhf_fast.rewards.shaping import ShapingConfig
from rlhf_fast.training.session import ComputeConfig
from tests.online.helpers import (
    KillAt,
    Killed,
    demonstration_rows,
    pair_rows,
    prompt_rows,
    rows_of,
    write_rows,
)
from tests.tiny import CHAT_TEMPLATE, tiny_reward_model, tiny_tokenizer


def with_held_out(config, tmp_path, rows):
    path = write_rows(tmp_path / "held_out.jsonl", rows)
    return replace(config, data=replace(config.data, evaluation_prompts=path))


def test_two_files_number_their_rows_alike_but_prompts_keep_names_of_their_own(config, tmp_path):
    rows = [{**row, "prompt": f"w400 {row['prompt']}"} for row in prompt_rows(4)]
    trained, held_out = load_all_prompts(with_held_out(config, tmp_path, rows))
    assert len({p.id for p in (*trained, *held_out)}) == len(trained) + len(held_out)


def test_names_are_kept_where_they_are_no_other_prompts(config, tmp_path):
    rows = [{**row, "id": f"held-{i}"} for i, row in enumerate(prompt_rows(4))]
    _, held_out = load_all_prompts(with_held_out(config, tmp_path, rows))
    assert [p.id for p in held_out] == [row["id"] for row in rows]
    _, held_out = load_all_prompts(with_held_out(config, tmp_path, prompt_rows(4)))
    assert [p.id for p in held_out] == list("0123")  # the same prompts under the same names


def test_bad_rows_stop_a_run_or_are_counted(config, tmp_path, capsys):
    """Of every file that it reads; what is left out is said, and kept in the manifest."""
    bad = [*prompt_rows(), {"prompt": ""}]
    demonstrations = [*demonstration_rows(), {"prompt": "w30"}]
    pairs = [*pair_rows(), {"prompt": "w20", "chosen": "w21", "rejected": "w21"}]
    files = {"prompts": bad, "sft": demonstrations, "pairs": pairs}
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    reward = {"function": None, "pairs": paths["pairs"], "training": {"parameters": "head"}}
    config = config_with(config, {"reward": reward, "num_iterations": 1}, "test")
    with pytest.raises(UserError, match=r"pairs\.jsonl, row 21: `chosen` and"):
        run_online(config)
    run_online(config_with(config, {"data": {"bad_rows": "count"}}, "test"))
    run = Path(config.output_dir)
    told = json.loads((run / "manifest.json").read_text())["rows_left_out"]
    out = " ".join(capsys.readouterr().out.split())
    for name, row in (("prompts", 13), ("sft", 7), ("pairs", 21)):
        assert f"(first: {paths[name]}, row {row}: " in " ".join(told)
        assert f"row {row}: " in out
    assert len({row["prompt"]["id"] for row in rows_of(run / "iteration_1/scored.jsonl")}) == 9


def test_the_baseline_of_a_prompt_is_its_own(config, tmp_path):
    """A held-out prompt of the same number must not lend its baseline to a training prompt."""
    rows = [{**row, "prompt": f"w400 {row['prompt']}"} for row in prompt_rows(4)]
    reward = RewardConfig(
        function="helpers:shorter_is_better", shaping=ShapingConfig(baseline_samples=1)
    )
    config = replace(with_held_out(config, tmp_path, rows), reward=reward, num_iterations=1)
    run_online(config)
    run = Path(config.output_dir)
    prompts = [row["prompt"] for row in rows_of(run / "reward_baseline.jsonl")]
    baseline = {prompt["id"]: prompt for prompt in prompts}
    assert len(baseline) == 16
    for name in ("iteration_1/scored", "iteration_1/evaluation"):
        for row in rows_of(run / f"{name}.jsonl"):
            assert baseline[row["prompt"]["id"]] == row["prompt"]


def test_other_held_out_prompts_after_a_resume_are_not_compared(config, tmp_path):
    config = replace(with_held_out(config, tmp_path, prompt_rows(4)), num_iterations=1)
    run_online(config)
    run = Path(config.output_dir)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().split("\n")[0] + "\n")
    (run / "iteration_1" / "evaluation.jsonl").unlink()
    write_rows(tmp_path / "held_out.jsonl", prompt_rows(5)[1:])
    with pytest.raises(UserError, match="held-out prompts are not those of iteration 0"):
        resume(run)


JUDGE = {"judge": {"url": "http://127.0.0.1:1", "api_key_env": "NO_SUCH_KEY"}}
SERVER = {"backend": "server", "server_url": "127.0.0.1:8000"}
PREFIX = {"sampler": {"kind": "prefix_reset", "prefix_field": "answer"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": {"sampler": {"kind": "rewrite", "function": "no.where:f"}}}, "no module"),
        ({"reward": {"function": None, **JUDGE}}, "NO_SUCH_KEY must hold the key"),
        ({"reward": {"function": None, "parts": [{"name": "j", **JUDGE}]}}, "NO_SUCH_KEY must"),
        ({"generation": SERVER}, "a server's address must start with http"),
        ({"generation": {"sampler": {"kind": "multi_turn"}}}, "no prompt has `turns`"),
        ({"generation": PREFIX}, r"prompts.jsonl, prompt '\d+' needs the field `answer`"),
    ],
)
def test_mistakes_show_before_any_work(config, changes, message):
    config = config_with(config, changes, "test")
    with pytest.raises(UserError, match=message):
        run_online(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labelled_min_gap": -0.1}, "labelled_min_gap must be >= 0, got -0.1"),
        ({"labelled_max_pairs_per_prompt": 0}, "labelled_max_pairs_per_prompt must be >= 1, got 0"),
        ({"labelled_samples_per_prompt": 1}, "labelled_samples_per_prompt must be >= 2, got 1"),
    ],
)
def test_labels(options, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(labeller="helpers:varied", **options)


RL = {"algorithm": "rl", "selection": {"rule": "all"}}
OWN = {"algorithm": "rl", "selection": {"rule": "all", "own_samples_only": True}}
TWO_SOURCES = {"num_generations": 2, "sampler": {"kind": "mixture"}}


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "opo", "reinforce++_baseline"])
@pytest.mark.parametrize(
    "changes", [{**RL, "generation": {"num_generations": 1}}, {**OWN, "generation": TWO_SOURCES}]
)
def test_one_response_has_no_advantage_over_others(config, advantage, changes):
    with pytest.raises(UserError, match=r"compares the policy's responses .*, got 1"):
        config_with(config, {**changes, "rl": {"advantage": advantage}}, "test")
    config_with(config, {**changes, "rl": {"advantage": "reinforce++"}}, "test")


def test_more_draws_than_responses_are_refused(config):
    changes = {**RL, "generation": {"num_generations": 3}}
    with pytest.raises(UserError, match="must give 4 or more of them, got 3"):
        config_with(config, {**changes, "rl": {"advantage": "pass_at_k", "draws": 4}}, "test")
    config_with(config, {**changes, "rl": {"advantage": "pass_at_k", "draws": 3}}, "test")


def test_no_tokens_at_once_is_refused(config):
    for count in (0, -5):
        with pytest.raises(UserError, match=f"micro_batch_tokens must be >= 1, got {count}"):
            replace(config, micro_batch_tokens=count)
        with pytest.raises(UserError, match=f"micro_batch_tokens must be >= 1, got {count}"):
            ComputeConfig(micro_batch_tokens=count)


def test_more_prompts_than_there_are_is_told(config, capsys):
    data = replace(config.data, demonstrations=None, prompts_per_iteration=500)
    run_online(replace(config, num_iterations=1, data=data))
    told = " ".join(capsys.readouterr().out.split())
    assert "prompts_per_iteration is 500, but there are 9 prompts" in told


def test_no_held_out_prompt_is_trained_on_under_another_id(config, tmp_path):
    rows = prompt_rows(10) * 3
    prompts = write_rows(tmp_path / "thrice.jsonl", rows)
    config = replace(config, data=replace(config.data, prompts=prompts))
    train, held_out = load_all_prompts(config)
    assert len(train) + len(held_out) == 30 and len(held_out) == 6  # a quarter of ten, thrice
    texts = [{str(prompt.messages) for prompt in part} for part in (train, held_out)]
    assert not texts[0] & texts[1]


def test_held_out_prompts_that_are_trained_on_are_told(config, tmp_path):
    notes = []
    progress = Progress(Console(quiet=True))
    progress.note = notes.append
    config = replace(with_held_out(config, tmp_path, prompt_rows(3)), num_iterations=1)
    run_online(config, progress)
    assert [note for note in notes if note.startswith("3 of 3 held-out prompts are trained on")]


def test_a_template_that_refuses_a_role_says_so(config, tmp_path):
    """Gemma's takes no system message."""
    refusing = CHAT_TEMPLATE.replace(
        "<start>{{ m['role'] }}",
        "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}<start>{{ m['role'] }}",
    )
    model = tmp_path / "model"
    shutil.copytree(config.model, model)
    (model / "chat_template.jinja").write_text(refusing)
    data = replace(config.data, system_prompt="w40")
    with pytest.raises(UserError, match="no conversation of roles system, user: System role not"):
        run_online(replace(config, model=str(model), data=data))


def reward_model_of(path, positions: int) -> str:
    model = tiny_reward_model()
    model.config.max_position_embeddings = positions
    save_model(path, model, tiny_tokenizer())
    return str(path)


def test_a_reward_model_with_too_few_positions_is_told_before_any_work(config, tmp_path):
    """A prompt is 7 tokens and the responses at most 8; a comparison holds two of them."""

    class Notes(KillAt):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    short = reward_model_of(tmp_path / "short", 14)
    judge = reward_model_of(tmp_path / "judge", 15)
    config = replace(
        config,
        reward=RewardConfig(model=short),
        evaluation=replace(config.evaluation, reward_model=judge),
    )
    with pytest.raises(Killed):
        run_online(config, Notes("sft/model", "start"))
    (note,) = [text for text in notes if "positions" in text]
    assert note.startswith(f"reward.model: {short} has 14 positions, but a prompt of 7 tokens")
    assert "max_new_tokens=8 are 15" in note
    prompts, _ = load_all_prompts(config)
    pairwise = replace(config, reward=RewardConfig(pairwise_model=judge))
    (told,) = too_long_for_rewards(prompts, pairwise, config.model)
    assert "2 x max_new_tokens=8 are 23" in told
