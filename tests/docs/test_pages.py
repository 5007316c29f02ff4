"""What README and docs/ show is run as it stands, on tiny models; nothing is left out unnamed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch

from rlhf_fast.cli import main
from rlhf_fast.cli.main import COMMANDS
from rlhf_fast.integrations import ACTIVE
from rlhf_fast.online.config import OnlineConfig
from rlhf_fast.training.runs import PreferenceRun, RewardRun
from tests.docs.pages import ROOT, Block, blocks, inline_code, links
from tests.integrations import standins
from tests.online.helpers import pair_rows, prompt_rows, write_rows
from tests.tiny import tiny_reward_model, tiny_tokenizer

SHOWN = blocks()
NOT_IMPORTED = "model = AutoModelForCausalLM.from_pretrained(path, quantization_config"
"""Needs bitsandbytes: tests/models/test_qlora.py."""
PYTHON = [b for b in SHOWN if b.language == "python" and not b.text.startswith(NOT_IMPORTED)]
SHELL = [block for block in SHOWN if block.language in ("", "bash")]
LINES = [(block, line) for block in SHELL for line in block.commands]
# Beginnings of the lines that are not run here, and why. Their options are still checked.
NOT_RUN = {
    "python -m venv": "sets up an environment",
    "pip install": "sets up an environment",
    "pytest": "the tests themselves",
    "RLHF_FAST_EMULATE=ON": "builds the package",
    "cmake": "builds the package",
    "for body in": "needs the sanitizers' build",
    "build/sanitizers": "needs the sanitizers' build",
    "python -m benchmarks": "tests/benchmarks runs them with the smallest shapes",
    "rlhf-fast bench": "tests/cli/test_bench.py",
    "accelerate launch --config_file": "tests/training/test_operation.py, with that file",
    "accelerate launch -m rlhf_fast.integrations": "needs TRL",
    "deepspeed": "needs OpenRLHF and DeepSpeed",
    "ray job": "needs OpenRLHF and Ray",
    "VERL_USE_EXTERNAL_MODULES": "needs verl",
    "python -m rlhf_fast.integrations llamafactory": "needs LLaMA-Factory",
    "torchrun": "needs LLaMA-Factory",
}
SMALL = "--generation.num-generations 3 --generation.sampling.max-new-tokens 8 --num-iterations 1"
TRAIN = "import sys; from trl.trainer.utils import selective_log_softmax as f\n"
TRAIN += "print(f.__module__, sys.argv[1:])\n"


def test_every_block_has_a_language_that_is_run():
    assert {block.language for block in SHOWN} <= {"python", "bash", ""}
    assert len(PYTHON) > 5 and len(SHELL) > 5


@pytest.fixture
def folder(tmp_path, monkeypatch, model_path):
    """A directory in which the examples' files and models are, and TRL's stand-in."""
    (tmp_path / "base").symlink_to(model_path)
    for name, rows in {"prompts": prompt_rows(), "pairs": pair_rows()}.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    import datasets

    datasets.Dataset.from_list(pair_rows()).to_parquet(tmp_path / "pairs.parquet")
    turns = [{"role": "user", "content": "w30"}, {"role": "assistant", "content": "w31 ."}]
    write_rows(tmp_path / "talks.jsonl", [{"messages": turns}] * 8)
    tiny_reward_model().save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    (tmp_path / "train.py").write_text(TRAIN)
    standins.install(tmp_path, "trl", "1.16.0", standins.TRL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trl(folder, monkeypatch):
    """The stand-in can be imported, and the real package comes back afterwards."""
    for name in [n for n in sys.modules if n == "trl" or n.startswith("trl.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield
    for handle in list(ACTIVE.values()):
        handle.undo()
    for name in [n for n in sys.modules if n == "trl" or n.startswith("trl.")]:
        del sys.modules[name]


def names_in_examples() -> dict:
    """What the reader has where an example begins."""
    head = torch.nn.Linear(8, 50, bias=False)
    return {
        "head": head,
        "lm_head": head,
        "hidden": torch.randn(12, 8),
        "logits": torch.randn(12, 50),
        "student_logits": torch.randn(12, 50),
        "teacher_logits": torch.randn(12, 50),
        "labels": torch.arange(12),
        "cu_seqlens": torch.tensor([0, 3, 6, 9, 12]),
        **{name: torch.randn(2) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")},
        **{name: torch.randn(3, 4) for name in ("logps", "old_logps", "advantages")},
        **{name: torch.randn(3, 4) for name in ("rewards", "values")},
        "DPOTrainer": lambda *arguments: arguments,
    }


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python(block: Block, trl):
    names = names_in_examples()
    exec(block.text, names)
    if "def reward(" in block.text:
        assert names["reward"](["a"], ["please, please"], [True], id=["0"]) == [2.0]


@pytest.mark.parametrize("line", [line for _, line in LINES if not line.startswith(tuple(NOT_RUN))])
def test_command(line, folder):
    words = shlex.split(line.replace("REWARD_MODEL", "reward").replace("MODEL", "base"))
    if words[:2] == ["rlhf-fast", "online"]:
        words = [sys.executable, "-m", "rlhf_fast.cli", *words[1:], *SMALL.split()]
    words = [sys.executable if word == "python" else word for word in words]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_is_not_run_is_still_shown():
    assert any(block.text.startswith(NOT_IMPORTED) for block in SHOWN)
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for _, line in LINES), beginning


@functools.cache
def options_of(command: str) -> set[str]:
    """All options of `rlhf-fast NAME` or `python -m MODULE [KIND]`, from its own help."""
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured), contextlib.suppress(SystemExit):
        if command.startswith("rlhf-fast"):
            named = command.split()[1:2]
            main([*named, "--help", *(["all"] if has_groups(named) else [])])
        else:
            _, _, module, *kind = command.split()
            before, sys.argv = sys.argv, [module, *kind, "--help"]
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            finally:
                sys.argv = before
    return set(re.findall(r"--[\w.-]*\w", captured.getvalue()))


def has_groups(named: list[str]) -> bool:
    return bool(named) and named[0] not in ("resume", "report", "export", "env", "bench")


OURS = re.compile(
    r"(rlhf-fast \w+|python -m (?:benchmarks|rlhf_fast\.integrations|tests)[\w.]*"
    r"|python -m rlhf_fast\.training(?: [a-z]+)?)(?: |$)"
)
PASSED_ON = ("rlhf_fast.integrations", "tests.")
"""Programs whose later words are another program's, and those without options."""


def our_commands() -> list[tuple[str, str]]:
    lines = [(block.page, line) for block, line in LINES] + inline_code()
    return [(page, line) for page, line in lines if OURS.match(line)]


@pytest.mark.parametrize(("page", "line"), our_commands(), ids=lambda text: text[:50])
def test_options_exist(page, line):
    command = OURS.match(line)[1]
    if command.startswith("rlhf-fast"):
        alternatives = line.removeprefix("rlhf-fast ").partition(" --")[0].split(" | ")
        assert {words.split()[0] for words in alternatives} <= {*COMMANDS, "COMMAND"}, page
    given = set(re.findall(r"(?<!\S)--[a-z][\w.-]*", line))
    if given and not any(name in command for name in PASSED_ON):
        assert given <= options_of(command), page


def test_options_in_the_text_exist():
    """Those in backticks by themselves, as in "`--reward.pairs FILE`"."""
    known = set.union(
        *(options_of(f"rlhf-fast {name}") for name in COMMANDS if name != "iterate"),
        options_of("python -m benchmarks"),
        options_of("python -m rlhf_fast.training preference"),
    )
    given = [(page, code.split()[0]) for page, code in inline_code() if code.startswith("--")]
    assert len(given) > 10
    foreign = {("CONTRIBUTING.md", "--use_fast_math")}
    assert not [x for x in given if x[1] not in known and x not in foreign]


def test_settings_in_the_text_exist():
    """`reward.training.objective` and its like are fields of the workflow's or a run's."""
    roots = (OnlineConfig(), PreferenceRun(), RewardRun())
    groups = {f.name for root in roots for f in dataclasses.fields(root)}
    code = {(page, text) for page, text in inline_code() if re.fullmatch(r"[a-z_]+(\.\w+)+", text)}
    dotted = [(page, text) for page, text in code if text.partition(".")[0] in groups]
    dotted = [(page, text) for page, text in dotted if not text.endswith((".json", ".py"))]
    assert len(dotted) > 5
    for page, text in dotted:
        assert any(has_setting(root, text) for root in roots), f"{page}: {text}"


def has_setting(config: object, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def test_links_lead_somewhere():
    for page, target in links():
        path, _, _ = target.partition("#")
        assert (page.parent / path).exists(), f"{page.name}: {target}"
