"""Every mistake of the user gets one clear message and an exit code that is not 0."""

import errno
import json
import subprocess
import sys

import pytest
from transformers import AutoModelForSequenceClassification

from rlhf_fast.cli import main
from rlhf_fast.cli.main import COMMANDS
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

ROW = json.dumps({"prompt": "w30"})
ROWS = "".join(json.dumps({"prompt": f"w{30 + i}"}) + "\n" for i in range(20))


def run(capsys, *arguments):
    try:
        code = main(["online", *map(str, arguments)])
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW + '\n{"prompt": \n', "prompts.jsonl:2: not valid JSON"),
        (ROW + "\n[1]\n", "prompts.jsonl:2: must be a JSON object, got list"),
        (ROW + '\n{"question": "a"}\n', "row 2: field `prompt` or `messages` or"),
        (ROW + '\n{"prompt": ""}\n', "row 2: `prompt` must be text or a list of messages"),
        (ROW + '\n{"prompt": [{"role": "human", "content": "x"}]}\n', "needs `role` (one of"),
        ("\n", "has no rows"),
        (ROW, "1 prompts are too few to hold some out"),
        (ROW[:-1] + ', "id": 1}\n' + ROW[:-1] + ', "id": 1}\n', "two rows have the id '1'"),
    ],
)
def test_prompts(content, message, model_path, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(content)
    code, error = run(
        capsys,
        *("--model", model_path, "--data.prompts", prompts, "--reward.function", "json:dumps"),
        *("--output-dir", tmp_path / "run"),
    )
    assert code == 1 and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.prompts", "missing.jsonl"], "no such file: missing.jsonl"),
        (["--data.prompts", "./missing"], "no such file: ./missing"),
        (["--reward.function", "nowhere:f"], "no module 'nowhere'"),
        (["--reward.function", "json:nothing"], "json has no function 'nothing'"),
        (["--reward.function", "json"], "must be named as module:function, got 'json'"),
        (["--model", "./missing"], "no such model directory: ./missing"),
        (["--device", "cuda"], "no CUDA device is available"),
        (
            ["--generation.num-generations", "1"],
            "num_generations >= 2, got 1",
        ),
        (["--dpo.beta", "0"], "dpo.beta must be > 0, got 0.0"),
        (["--reward.model", "./missing"], "give one of"),
        (["--config", "missing.yaml"], "no such file: missing.yaml"),
    ],
)
def test_options(arguments, message, model_path, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(ROWS)
    given = {
        "--model": model_path,
        "--data.prompts": prompts,
        "--reward.function": "json:dumps",
        "--output-dir": tmp_path / "run",
        "--generation.backend": "hf",
    }
    given |= dict(zip(arguments[::2], arguments[1::2]))
    code, error = run(capsys, *[x for item in given.items() for x in item])
    assert code not in (0, None) and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model is missing"),
        (["--model", "x"], "data.prompts is missing"),
        (["--model", "x", "--data.prompts", "y"], "no reward"),
        (["--method", "grpo"], "model is missing"),
        (["--method", "grpo", "--selection.rule", "best_vs_worst"], "algorithm rl learns from"),
        (["--method", "remax", "--generation.sampler.kind", "plain"], "remax needs generation"),
    ],
)
def test_missing_options(arguments, message, capsys):
    code, error = run(capsys, *arguments)
    assert code not in (0, None) and message in error


def test_long_prompts_are_refused_together_or_left_out(config, model_path, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    texts = [*(f"w{40 + i}" for i in range(18)), *(f"w{i} " * 250 for i in (30, 31))]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    given = (
        *("--model", model_path, "--data.prompts", prompts, "--reward.function", "helpers:varied"),
        *("--output-dir", tmp_path / "run", "--generation.backend", "hf", "--num-iterations", "1"),
        *("--generation.sampling.max-new-tokens", "8", "--data.evaluation-share", "0.5"),
    )
    code, error = run(capsys, *given)
    assert code == 1 and "prompts, the longest of 255 tokens, do not fit into the" in error
    assert "--data.max-prompt-tokens 248" in error and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()  # the user's own folder stays
    code, error = run(capsys, *given, "--data.max-prompt-tokens", "2")
    assert code == 1 and "data.max_prompt_tokens 2 leaves no prompt" in error
    assert not list((tmp_path / "run").iterdir())
    assert main(["online", *map(str, given), "--data.max-prompt-tokens", "248"]) == 0
    assert "prompts are left out: more than 248 tokens" in capsys.readouterr().out


def test_a_file_can_name_recipe_and_methods(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: quickstart\nmethod: [grpo, warp]\nnum_iterations: 7\n")
    with pytest.raises(SystemExit):
        main(["online", "--config", str(path), "--help", "all"])
    text = capsys.readouterr().out
    for setting in ("quickstart:model", "(default: 7)", "(default: rl)", "(default: ema)"):
        assert setting in text
    path.write_text("method: gpro\n")
    assert run(capsys, "--config", path)[0] == 1


def test_model_without_chat_template(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(ROWS)
    code, error = run(
        capsys,
        *("--model", tmp_path / "model", "--data.prompts", prompts),
        *("--reward.function", "json:dumps", "--output-dir", tmp_path / "run"),
    )
    assert code == 1 and "has no chat template" in error


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (2, "is not a reward model: it needs a linear head with one output"),
        (None, "saved as LlamaForCausalLM: give a model that has them (`rlhf-fast reward` trains"),
    ],
)
def test_reward_model_with_the_wrong_head(labels, message, model_path, tmp_path, capsys):
    prompts, reward = tmp_path / "prompts.jsonl", model_path
    prompts.write_text(ROWS)
    if labels:
        reward = tmp_path / "reward"
        config = tiny_config()
        config.num_labels = labels
        AutoModelForSequenceClassification.from_config(config).save_pretrained(reward)
        tiny_tokenizer().save_pretrained(reward)
    code, error = run(
        capsys,
        *("--model", model_path, "--data.prompts", prompts, "--reward.model", reward),
        *("--output-dir", tmp_path / "run", "--generation.backend", "hf"),
        *("--generation.sampling.max-new-tokens", "8"),
    )
    assert code == 1 and message in error


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--reward.model", "./missing", "no such model directory: ./missing"),
        (
            "--reward.pairwise-model",
            "nobody/nothing",
            "reward.pairwise_model: no such model directory",
        ),
        ("--evaluation.reward-model", "~/missing", "no such model directory: ~/missing"),
    ],
)
def test_a_missing_model_shows_before_any_work(option, name, message, model_path, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(ROWS)
    reward = [] if option.startswith("--reward") else ["--reward.function", "json:dumps"]
    code, error = run(
        capsys,
        *("--model", model_path, "--data.prompts", prompts, option, name, *reward),
        *("--output-dir", tmp_path / "run", "--generation.backend", "hf"),
    )
    assert code == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_unknown_command_and_help(capsys):
    assert main(["onlin"]) == 2
    assert "no command 'onlin'" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "resume" in capsys.readouterr().out
    assert main(["resume", "/nowhere"]) == 1
    assert "is not a run folder" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "rlhf_fast.cli", "env"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_env_prints_versions(capsys):
    assert main(["env"]) == 0
    assert "torch" in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_named(monkeypatch, capsys):
    def refused(arguments):
        raise PermissionError(errno.EACCES, "Permission denied", arguments[0])

    monkeypatch.setitem(COMMANDS, "resume", refused)
    assert main(["resume", "/run"]) == 1
    assert capsys.readouterr().err == "rlhf-fast resume: Permission denied: /run\n"
