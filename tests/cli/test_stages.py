"""Every stage as a command, one after the other, against the run that does them all."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from rlhf_fast.cli import main
from tests.online.helpers import demonstration_rows, pair_rows, prompt_rows, rows_of, write_rows

HERE = Path(__file__).parent


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "online"))
    monkeypatch.chdir(tmp_path)

    def command(name, *arguments, fails=None):
        common = () if name in ("merge", "export") else ("--precision", "fp32", "--device", "cpu")
        code = main([name, *map(str, arguments), *common])
        output = capsys.readouterr()
        if fails:
            assert code == 1 and fails in output.err, output.err
            assert output.err.count("\n") == 1
        else:
            assert code == 0, output.err
        return output.out

    return command


@pytest.fixture
def files(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", prompt_rows())
    write_rows(tmp_path / "sft.jsonl", demonstration_rows())
    write_rows(tmp_path / "pairs.jsonl", pair_rows())
    return tmp_path


SAMPLING = (
    *("--generation.backend", "hf", "--generation.num-generations", 3),
    *("--generation.sampling.max-new-tokens", 8, "--generation.dtype", "float32"),
)
OPTIMIZER = ("--optimizer.learning-rate", 1e-3, "--optimizer.batch-size", 4)


def test_a_critic_is_not_written_over_another(run, files, model_path):
    run(
        *("generate", "--model", model_path, "--prompts", "prompts.jsonl", "--output", "c.jsonl"),
        *SAMPLING,
    )
    score = ("--reward.function", "helpers:shorter_is_better", "--output", "s.jsonl")
    run("score", "--completions", "c.jsonl", *score)
    train = ("train", "--model", model_path, "--selected", "s.jsonl", "--algorithm", "rl")
    train += ("--rl.advantage", "gae", "--rl.loss-type", "ppo")
    run(*train, "--output", "first/policy")
    critic = (files / "first/critic/model.safetensors").read_bytes()
    run(*train, "--output", "first/other", fails="output first/critic exists: remove it or choose")
    assert (files / "first/critic/model.safetensors").read_bytes() == critic
    assert not (files / "first/other").exists()


def test_an_ensemble_of_adapters(run, files, model_path):
    run(
        *("reward", "--model", model_path, "--pairs", "pairs.jsonl", "--output", "rm"),
        *("--training.members", "adapters", "--training.num-outputs", 2),
        *("--training.adapter.rank", 2, "--training.optimizer.batch-size", 4),
    )
    assert len(list(files.glob("rm/member_*/adapter_model.safetensors"))) == 2
    run(
        *("generate", "--model", model_path, "--prompts", "prompts.jsonl", "--output", "c.jsonl"),
        *SAMPLING,
    )
    run(
        *("score", "--completions", "c.jsonl", "--output", "s.jsonl"),
        *("--reward.model", "rm", "--reward.ensemble.reduction", "min"),
    )
    for row in rows_of(files / "s.jsonl"):
        assert row["rewards"] == [min(pair) for pair in zip(*row["components"].values())]


def test_bad_rows_stop_a_stage_or_are_counted(run, files, model_path):
    rows = [*pair_rows(), {"prompt": "w20", "chosen": "w21", "rejected": "w21"}]
    write_rows(files / "pairs.jsonl", rows)
    command = ("reward", "--model", model_path, "--pairs", "pairs.jsonl", "--output", "rm")
    head = ("--training.parameters", "head")
    run(*command, *head, fails="pairs.jsonl, row 21: `chosen` and `rejected` are the same")
    out = run(*command, *head, "--bad-rows", "count")
    assert "1 refused: `chosen` and `rejected` are the same (first: pairs.jsonl, row 21" in out
    assert rows_of(files / "rm.metrics.jsonl")[0]["num_pairs"] == 18


def test_a_mixture_needs_its_second_model(run, files, model_path):
    """Without it the policy would be mixed with itself."""
    base = ("generate", "--model", model_path, "--prompts", "prompts.jsonl", "--output", "c.jsonl")
    for options in (("--generation.sampler.kind", "mixture"), ("--reference", model_path)):
        run(*base, *options, fails="--reference is the second model of the samplers mixture")


def test_the_stages_in_a_row(run, files, model_path):
    run("sft", "--model", model_path, "--data", "sft.jsonl", "--output", "sft", *OPTIMIZER)
    out = run(
        *("reward", "--model", "sft", "--pairs", "pairs.jsonl", "--output", "rm/model"),
        *("--training.parameters", "head"),
    )
    assert "held-out accuracy" in out
    run(
        "generate", "--model", "sft", "--prompts", "prompts.jsonl", "--output", "c.jsonl", *SAMPLING
    )
    assert [len(row["completions"]) for row in rows_of(files / "c.jsonl")] == [3] * 12
    run("score", "--completions", "c.jsonl", "--reward.model", "rm/model", "--output", "s.jsonl")
    run("select", "--scored", "s.jsonl", "--output", "p.jsonl")
    run(
        *("train", "--model", "sft", "--selected", "p.jsonl", "--output", "policy"),
        *("--dpo.optimizer.learning-rate", 1e-3, "--dpo.optimizer.batch-size", 4),
    )
    run(
        "generate",
        "--model",
        "policy",
        "--prompts",
        "prompts.jsonl",
        "--output",
        "c1.jsonl",
        *SAMPLING,
    )
    run("score", "--completions", "c1.jsonl", "--reward.model", "rm/model", "--output", "s1.jsonl")
    out = run("evaluate", "--scored", "s1.jsonl", "--baseline", "s.jsonl", "--output", "m.json")
    metrics = json.loads((files / "m.json").read_text())
    assert metrics["win_rate"] > 0.5 and "win_rate" in out
    assert len(metrics["best_of_n"]) == 3 and 0 < metrics["length_controlled_win_rate"] < 1
    run("merge", "--models", "sft", "policy", "--output", "soup")
    assert (files / "soup" / "model.safetensors").stat().st_size > 0
    tags = {"sft": "sft", "rm/model": "reward-model", "policy": "dpo", "soup": "merge"}
    for name, tag in tags.items():
        assert tag in ModelCard.load(files / name / "README.md").data.tags


def test_a_stage_gives_what_the_loop_gives(run, files, config):
    from rlhf_fast.online.workflow import run_online

    run_online(config)
    folder = Path(config.output_dir)
    first = folder / "iteration_1"
    run(
        *("score", "--completions", first / "completions.jsonl", "--output", "s.jsonl"),
        *("--reward.function", "helpers:shorter_is_better"),
    )
    assert (files / "s.jsonl").read_text() == (first / "scored.jsonl").read_text()
    run("select", "--scored", "s.jsonl", "--output", "p.jsonl")
    assert (files / "p.jsonl").read_text() == (first / "pairs.jsonl").read_text()


def test_accuracy_of_rewards_by_subset(run, files):
    rows = [
        {"prompt": "w30", "chosen": "w21", "rejected": "w21 w22", "subset": "short", "target": 1},
        {"prompt": "w31", "chosen": "w21 w22", "rejected": "w21", "subset": "long", "target": 1},
    ]
    write_rows(files / "bench.jsonl", rows)
    run(
        *("evaluate", "--pairs", "bench.jsonl", "--output", "m.json"),
        *("--reward.function", "helpers:shorter_is_better"),
    )
    assert json.loads((files / "m.json").read_text()) == {
        "accuracy": 0.5,
        "num_pairs": 2,
        "accuracy/long": 0.0,
        "accuracy/short": 1.0,
    }


def test_rewardbench_weighs_its_subsets(run, files):
    from rlhf_fast.online.reward_bench import SECTIONS, section_scores

    names = [name for section in SECTIONS.values() for name in section]
    assert len(names) == 23
    right = {"math-prm", "xstest-should-respond"}
    texts = {True: ("w21", "w21 w22"), False: ("w21 w22", "w21")}
    rows = [
        dict(zip(("chosen", "rejected"), texts[name in right])) | {"prompt": "w30", "subset": name}
        for name in names
    ]
    write_rows(files / "bench.jsonl", [row | {"target": 1} for row in rows])
    run(
        *("evaluate", "--pairs", "bench.jsonl", "--output", "m.json"),
        *("--reward.function", "helpers:shorter_is_better"),
    )
    metrics = json.loads((files / "m.json").read_text())
    assert metrics["section/reasoning"] == 0.5 and metrics["section/chat"] == 0.0
    assert metrics["section/safety"] == pytest.approx(250 / 740)
    assert metrics["rewardbench"] == pytest.approx((0.5 + 250 / 740) / 4)
    assert section_scores({"math-prm": 1.0}) == {}


def test_a_stage_reads_yaml(run, files, config):
    from rlhf_fast.online.workflow import run_online

    run_online(config)
    (files / "select.yaml").write_text("selection: {rule: top, responses_per_prompt: 2}\n")
    scored = Path(config.output_dir) / "iteration_1/scored.jsonl"
    run("select", "--config", "select.yaml", "--scored", scored, "--output", "t.jsonl")
    assert [len(row["rewards"]) for row in rows_of(files / "t.jsonl")] == [2] * 9
    run(
        *("select", "--config", "select.yaml", "--scored", scored, "--output", "t1.jsonl"),
        *("--selection.responses-per-prompt", 1),
    )
    assert [len(row["rewards"]) for row in rows_of(files / "t1.jsonl")] == [1] * 9


def test_exports(run, config, files):
    import datasets

    from rlhf_fast.online.workflow import run_online

    run_online(config)
    folder = config.output_dir
    run("export", folder, "--output", "pairs")
    pairs = datasets.load_from_disk("pairs")
    assert set(pairs.column_names) >= {"prompt", "chosen", "rejected"}
    assert len(pairs) == sum(
        len(rows_of(Path(folder) / f"iteration_{k}/pairs.jsonl")) for k in (1, 2)
    )
    run("export", folder, "--format", "completions", "--iteration", 2, "--output", "completions")
    assert len(datasets.load_from_disk("completions")) == 27
    run("export", folder, "--format", "alpaca_eval", "--output", "alpaca.json")
    row = json.loads((files / "alpaca.json").read_text())[0]
    assert set(row) == {"instruction", "output", "generator"}
    assert row["generator"] == "run-iteration-2"
    run("export", folder, "--format", "arena_hard", "--output", "arena.jsonl")
    assert rows_of(files / "arena.jsonl")[0]["messages"][-1]["role"] == "assistant"
    run("export", folder, "--format", "lm_eval", "--output", "lm.yaml")
    settings = yaml.safe_load((files / "lm.yaml").read_text())
    assert (Path(settings["model_args"]["pretrained"]) / "model.safetensors").is_file()
    assert settings["model"] == "hf" and "gsm8k" in settings["tasks"]
    run("export", "nowhere", "--output", "x", fails="no such run folder or file: nowhere")
    run("export", folder, "--iteration", 7, "--output", "x", fails="has no iteration_7/pairs.jsonl")


def test_answers_to_benchmarks(run, files, model_path):
    """Their questions as they are published -> generate -> export as they read it."""
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["w30 w31", "w32"]},
        {"question_id": 82, "category": "math", "turns": ["w33", "w34 w35"]},
    ]
    write_rows(files / "question.jsonl", questions)
    common = ("generate", "--model", model_path, *SAMPLING, "--generation.num-generations", 1)
    export = ("export", "mt.jsonl", "--format", "mt_bench", "--output", "answers.jsonl")
    run(*common, "--prompts", "question.jsonl", "--output", "mt.jsonl")
    run(*export, fails="question 0 has 1 of 2 turns answered; sample with --generation.sampler")
    (files / "mt.jsonl").unlink()
    several = ("--generation.sampler.kind", "multi_turn")
    run(*common, "--prompts", "question.jsonl", "--output", "mt.jsonl", *several)
    run(*export)
    rows = rows_of(files / "answers.jsonl")
    assert [(r["question_id"], r["model_id"]) for r in rows] == [(81, "mt"), (82, "mt")]
    first, _, later, _ = (row["completions"][0] for row in rows_of(files / "mt.jsonl"))
    assert rows[0]["choices"] == [{"index": 0, "turns": [first["text"], later["text"]]}]
    assert later["prompt"]["messages"][-1]["content"] == "w32"

    write_rows(files / "set.jsonl", [{"instruction": "w40 w41", "output": "w1", "dataset": "d"}])
    run(*common, "--prompts", "set.jsonl", "--output", "ours.jsonl")
    run("export", "ours.jsonl", "--format", "alpaca_eval", "--output", "outputs.json")
    (row,) = json.loads((files / "outputs.json").read_text())
    text = rows_of(files / "ours.jsonl")[0]["completions"][0]["text"]
    assert row == {"instruction": "w40 w41", "output": text, "generator": "ours"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "--model is missing"),
        (["sft", "--model", "m"], "--data is missing"),
        (["generate", "--model", "m", "--prompts", "p"], "--output is missing"),
        (["select", "--scored", "p.jsonl", "--output", "prompts.jsonl"], "prompts.jsonl exists"),
        (["sft", "--model", "m", "--data", "sft.jsonl", "--output", "sft.jsonl/x"], "cannot write"),
        (["merge", "--models", "m", "--output", "sft.jsonl/x"], "cannot write"),
        (["select", "--scored", "nowhere.jsonl", "--output", "x"], "no such file: nowhere.jsonl"),
        (["select", "--scored", "prompts.jsonl", "--output", "x"], "field `rewards` is missing"),
        (["train", "--model", "m", "--selected", "pairs.jsonl", "--output", "x"], "no such model"),
        (["score", "--completions", "prompts.jsonl", "--output", "x"], "`completions` is missing"),
        (["evaluate", "--output", "x"], "give --scored FILE"),
        (["evaluate", "--pairs", "pairs.jsonl", "--output", "x"], "no reward: give --reward.model"),
        (["merge", "--output", "x"], "--models is missing"),
        (["merge", "--models", "a"], "--output is missing"),
    ],
)
def test_mistakes(run, files, arguments, message):
    arguments = ["./nowhere" if a == "m" else a for a in arguments]
    run(*arguments, fails=message)
    assert not (files / "x").exists()


def test_files_that_lack_a_field_are_named(run, files):
    group = {"prompt": {"id": "p", "messages": [], "metadata": {}}, "rewards": [1.0]}
    write_rows(files / "s.jsonl", [group])
    run("select", "--scored", "s.jsonl", "--output", "o", fails="s.jsonl:1: field `completions`")
    write_rows(files / "s.jsonl", [group | {"completions": [{"prompt": group["prompt"]}]}])
    message = "s.jsonl:1: must be what the stage before writes, got fields ['completions', 'p"
    run("select", "--scored", "s.jsonl", "--output", "o", fails=message)
    (files / "s.jsonl").write_text('{"prompt": ')
    run("select", "--scored", "s.jsonl", "--output", "o", fails="s.jsonl:1: not valid JSON")
    (files / "s.jsonl").write_text("")
    run("select", "--scored", "s.jsonl", "--output", "o", fails="s.jsonl: has no rows")
