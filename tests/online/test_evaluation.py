"""Held-out win rates of rewards that say nothing beyond the responses they compare."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.io import write_jsonl
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.config_file import config_with
from rlhf_fast.online.stages import Evaluate
from rlhf_fast.online.workflow import run_online
from rlhf_fast.types import to_json
from tests.loopback import serve
from tests.online.helpers import rows_of, rows_without_times
from tests.records import scored
from tests.rewards.test_judge import between, choices


def prefers_the_shorter(path, body):
    question = body["messages"][0]["content"]
    first = len(between(question, "[Response A]", "[Response B]"))
    second = len(between(question, "[Response B]", "Which response"))
    return choices("[[C]]" if first == second else "[[A]]" if first < second else "[[B]]")


@pytest.fixture
def by_function(config):
    """Metrics of the run whose reward is a function of each response."""
    run_online(replace(config, output_dir=f"{config.output_dir}-function"))
    rows = rows_without_times(Path(f"{config.output_dir}-function"))
    assert any(row["win_rate"] != 0.5 for row in rows)
    return rows


def test_a_judge_that_compares_tells_policies_apart(config, by_function):
    with serve(prefers_the_shorter) as url:
        changes = {"judge": {"url": url, "model": "m"}}
        run_online(replace(config, reward=config_with(RewardConfig(), changes, "test")))
    rows = rows_without_times(Path(config.output_dir))
    # The same order of responses: iteration 1 trains on the same pairs.
    assert rows[1]["win_rate"] == by_function[1]["win_rate"]
    assert rows[1]["win_rate_stderr"] == by_function[1]["win_rate_stderr"]
    assert [row["reward"] for row in rows] == [row["win_rate"] for row in rows]


def test_standardised_rewards_are_evaluated_as_they_were_before(config, by_function):
    run_online(config_with(config, {"reward": {"shaping": {"standardised": True}}}, "test"))
    run = Path(config.output_dir)
    group = rows_of(run / "iteration_1/scored.jsonl")[0]
    assert sum(group["rewards"]) == pytest.approx(0.0, abs=1e-9)
    for row, expected in zip(rows_without_times(run), by_function, strict=True):
        assert (row["reward"], row["win_rate"]) == (expected["reward"], expected["win_rate"])


def test_another_files_prompts_of_the_same_numbers_are_not_compared(tmp_path):
    def write(name, text):
        group = scored(1.0, 2.0, prompt_id="0")
        prompt = replace(group.prompt, messages=[{"role": "user", "content": text}])
        write_jsonl(tmp_path / name, [to_json(replace(group, prompt=prompt))])
        return str(tmp_path / name)

    ours, theirs, others = write("a", "x"), write("b", "x"), write("c", "y")
    out = {"scored": ours, "output": str(tmp_path / "m.json")}
    assert "win_rate: 0.5" in Evaluate(baseline=theirs, **out).run()
    (tmp_path / "m.json").unlink()
    with pytest.raises(UserError, match="its prompt '0' is another one than that of"):
        Evaluate(baseline=others, **out).run()
