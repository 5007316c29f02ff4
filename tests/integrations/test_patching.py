"""Patching, undoing and refusing, on a stand-in for TRL."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import ACTIVE, PatchRefused, llamafactory, trl
from rlhf_fast.integrations.__main__ import main
from tests.integrations import standins

UTILS = standins.TRL["trl/trainer/utils.py"]
NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")


@pytest.fixture
def trl_standin(tmp_path, monkeypatch):
    """Installs a stand-in; the real package, if there is one, comes back afterwards."""
    for name in [n for n in sys.modules if n == "trl" or n.startswith("trl.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)

    def install(version="1.16.0", **changed):
        files = standins.TRL | {f"trl/trainer/{n}.py": text for n, text in changed.items()}
        standins.install(tmp_path, "trl", version, files)
        importlib.invalidate_caches()

    yield install
    if "trl" in ACTIVE:
        ACTIVE["trl"].undo()
    for name in [n for n in sys.modules if n == "trl" or n.startswith("trl.")]:
        del sys.modules[name]


def load(name):
    return importlib.import_module(f"trl.trainer.{name}")


def test_patched_functions_are_ours_and_undo_restores_identity(trl_standin):
    trl_standin()
    utils, trainer = load("utils"), load("dpo_trainer")
    before = {name: getattr(utils, name) for name in NAMES}
    logits = torch.randn(3, 5, 11, requires_grad=True)
    index = torch.randint(11, (3, 5))
    expected = trainer.loss(logits, index)
    (expected_grad,) = torch.autograd.grad(expected, logits)

    with trl.patch() as handle:
        assert ACTIVE["trl"] is handle
        for name, original in before.items():
            assert getattr(utils, name) is not original
            assert getattr(utils, name).__name__ == name
        assert trainer.selective_log_softmax is utils.selective_log_softmax
        got = trainer.loss(logits, index)
        (got_grad,) = torch.autograd.grad(got, logits)
        assert "SelectBackward" not in str(got.grad_fn)

    assert "trl" not in ACTIVE
    for name, original in before.items():
        assert getattr(utils, name) is original
    assert trainer.selective_log_softmax is before["selective_log_softmax"]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_grad, expected_grad)


def test_modules_imported_while_patched_are_undone_too(trl_standin):
    trl_standin()
    original = load("utils").selective_log_softmax
    handle = trl.patch()
    late = load("late_trainer")
    assert late.selective_log_softmax is not original
    handle.undo()
    assert late.selective_log_softmax is original
    handle.undo()  # a second call does nothing


def test_undo_survives_an_exception_in_the_block(trl_standin):
    trl_standin()
    original = load("utils").selective_log_softmax
    with pytest.raises(KeyError), trl.patch():
        raise KeyError
    assert load("utils").selective_log_softmax is original


def test_a_second_patch_is_the_first(trl_standin):
    """A notebook's cell that runs twice; a script that patches, under the launcher that has."""
    trl_standin()
    handle = trl.patch()
    ours = load("utils").selective_log_softmax
    assert trl.patch() is handle and load("utils").selective_log_softmax is ours
    with trl.patch():
        with trl.patch():
            pass
        assert ACTIVE["trl"] is handle and load("utils").selective_log_softmax is ours
    assert not ACTIVE and load("utils").selective_log_softmax is not ours


@pytest.mark.parametrize("version", ["0.23.1", "1.17.0", "2.0.0"])
def test_an_unknown_version_is_refused(trl_standin, version):
    trl_standin(version)
    with pytest.raises(PatchRefused, match=rf"trl >=.*, got {version}"):
        trl.patch()
    assert not ACTIVE


def test_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setattr(type(trl.FRAMEWORK), "installed", lambda self: None)
    with pytest.raises(PatchRefused, match="must be installed"):
        trl.patch()


def test_another_signature_is_refused_and_nothing_is_patched(trl_standin):
    changed = UTILS.replace("chunk_size=128", "chunk_size=256")
    trl_standin(utils=changed)
    original = load("utils").selective_log_softmax
    with pytest.raises(PatchRefused, match=r"entropy_from_logits .*chunk_size=128.*=256"):
        trl.patch()
    assert load("utils").selective_log_softmax is original
    assert not ACTIVE


def test_a_missing_function_is_refused(trl_standin):
    trl_standin(utils=UTILS.replace("def entropy_from_logits", "def entropy"))
    with pytest.raises(PatchRefused, match="entropy_from_logits must exist, got trl 1.16.0"):
        trl.patch()


def test_a_package_that_the_framework_lacks_is_named(trl_standin):
    trl_standin(utils="import a_package_that_is_not_there")
    with pytest.raises(PatchRefused, match="; install a_package_that_is_not_there, which trl imp"):
        trl.patch()


def test_a_function_that_is_none_is_refused(trl_standin):
    """TRL 1.15 without Triton."""
    text = UTILS + "\n_ChunkedLogProbFunction = None\n"
    trl_standin("1.15.0", utils=text)
    with pytest.raises(PatchRefused, match="_ChunkedLogProbFunction must be a function, got None"):
        trl.patch()
    assert not ACTIVE


def test_a_trainer_that_cannot_be_imported_is_left_out(trl_standin, tmp_path):
    trl_standin()
    path = tmp_path / "trl" / "experimental" / "online_dpo" / "online_dpo_trainer.py"
    path.write_text("import a_package_that_nobody_has")
    with trl.patch() as handle:
        assert not any("OnlineDPO" in target for target in handle.targets)
        assert any("_ChunkedLogProbFunction" in target for target in handle.targets)


def test_what_the_kernel_does_not_take_stays_with_the_original(trl_standin):
    trl_standin()
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    index = torch.randint(7, (2, 5))
    with trl.patch():
        got = load("utils").selective_log_softmax(logits, index)
    assert got.dtype == torch.float64


def test_description_says_what_is_patched(trl_standin):
    trl_standin()
    target = "  trl.trainer.utils:selective_log_softmax"
    lines = trl.FRAMEWORK.describe()
    assert lines[0] == "trl 1.16.0: not patched; patch() replaces" and target in lines
    with trl.patch():
        lines = trl.FRAMEWORK.describe()
        assert lines[0] == "trl 1.16.0: patched" and target in lines


def test_description_of_an_unknown_version(trl_standin):
    trl_standin("2.0")
    (line,) = trl.FRAMEWORK.describe()
    assert line.startswith("trl 2.0: cannot be patched (trl: the version must be")


def run_program(tmp_path, *arguments, **environment):
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "rlhf_fast.integrations", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"} | environment,
    )


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_program_runs_patched(tmp_path, how):
    standins.install(tmp_path, "trl", "1.16.0", standins.TRL)
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "beside.py").write_text("found = 'beside'")
    (folder / "job.py").write_text(
        "import sys, beside\n"
        "from trl.trainer.utils import selective_log_softmax as f\n"
        "print(f.__module__, __name__, sys.argv[1:], beside.found)\n"
    )
    if how == "script":
        job = str(folder / "job.py")
        result = run_program(tmp_path, "--local_rank=1", "trl", job, "--steps", "3")
    else:
        path = f"{tmp_path}:{folder}:{Path(__file__).parents[2]}"
        result = run_program(tmp_path, "trl", "-m", "job", "--steps", "3", PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    given = ["--local_rank=1", "--steps", "3"] if how == "script" else ["--steps", "3"]
    said = f"rlhf_fast.integrations __main__ {given} beside"
    assert result.stdout.split("\n")[0] == said
    assert "patched <trl 1.16.0: " in result.stderr


def test_a_refusal_is_one_line(tmp_path):
    standins.install(tmp_path, "trl", "2.0", standins.TRL)
    (tmp_path / "job.py").write_text("")
    result = run_program(tmp_path, "trl", str(tmp_path / "job.py"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: trl: the version must be")


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        main(list(arguments))
    assert not ACTIVE
    return str(caught.value)


def test_a_program_that_is_not_there(tmp_path):
    for program in (str(tmp_path / "nothing.py"), "no-such-command"):
        assert "must be a script or an installed command" in refusal("trl", program)


@pytest.mark.parametrize(
    ("command", "instead"),
    [
        (("trl", "dpo"), "-m rlhf_fast.integrations trl -m trl.scripts.dpo"),
        (("/venv/bin/trl", "dpo"), "-m rlhf_fast.integrations trl -m trl.scripts.dpo"),
        (("-m", "trl.cli", "dpo"), "-m rlhf_fast.integrations trl -m trl.scripts.dpo"),
        (("accelerate", "launch", "x.py"), "accelerate launch -m rlhf_fast.integrations"),
        (("torchrun", "x.py"), "torchrun --nproc-per-node GPUS -m rlhf_fast.integrations"),
    ],
)
def test_commands_that_leave_training_to_others_are_refused(command, instead):
    said = refusal("trl", *command)
    assert "the process must be the one that trains" in said and instead in said


def test_processes_that_would_not_be_patched_are_refused(monkeypatch):
    """LLaMA-Factory starts torchrun by itself: training would run, but without the kernels."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    command = ("llamafactory", "-m", "llamafactory.cli", "train", "dpo.yaml")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    said = refusal(*command)
    assert "got 4 GPUs" in said and "torchrun --nproc-per-node GPUS -m" in said
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    assert "got FORCE_TORCHRUN" in refusal(*command)
    monkeypatch.setenv("LOCAL_RANK", "0")  # one that torchrun has started
    monkeypatch.setattr(type(llamafactory.FRAMEWORK), "installed", lambda self: None)
    assert "must be installed" in refusal(*command)
