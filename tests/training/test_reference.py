"""Reference log-probabilities: computed once, kept on disk, never mistaken for others."""

import multiprocessing
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.nn import functional as F

from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import TokenGroup
from rlhf_fast.models.language_model import LanguageModel
from rlhf_fast.training import reference
from rlhf_fast.training.optimizer import OptimizerConfig
from rlhf_fast.training.preference import DPOConfig, train_preference
from rlhf_fast.training.reference import reference_logps
from tests.tiny import tiny_model

GROUPS = [
    TokenGroup([10, 11], [[20, 3], [21, 22, 3]]),
    TokenGroup([12], [[23, 3], [24, 3]]),
    TokenGroup([10, 11], [[25, 3], [20, 3]]),
]


def language_model(seed=0, precision="fp32"):
    return LanguageModel(tiny_model(seed=seed), pad_token_id=3, precision=precision)


def test_kept_on_disk_and_read_back(tmp_path, monkeypatch):
    model = language_model()
    expected = model.score_groups(GROUPS)
    first = reference_logps(model, GROUPS, cache=tmp_path)
    for mine, theirs in zip(first, expected):
        assert mine == pytest.approx(theirs, rel=1e-5)
    monkeypatch.setattr(LanguageModel, "score_groups", lambda *_: pytest.fail("computed again"))
    assert reference_logps(model, GROUPS, cache=tmp_path) == first


def test_two_runs_on_the_same_data_keep_theirs_at_once(tmp_path, monkeypatch):
    model, meanwhile = language_model(), []

    def save(tensors, place):
        save_file(tensors, place)
        if not meanwhile:
            meanwhile.append(True)
            meanwhile[:] = reference_logps(model, GROUPS, cache=tmp_path)

    monkeypatch.setattr(reference, "save_file", save)
    assert reference_logps(model, GROUPS, cache=tmp_path) == meanwhile
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(LanguageModel, "score_groups", lambda *_: pytest.fail("computed again"))
    assert reference_logps(model, GROUPS, cache=tmp_path) == [pytest.approx(r) for r in meanwhile]


def _process(rank, folder, answers):
    """One of two; each has a cache of its own."""
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": 2, "timeout": timedelta(seconds=20)}
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", **options)
    accelerator = SimpleNamespace(num_processes=2, process_index=rank, is_main_process=rank == 0)
    cache = folder / f"cache_{rank}"
    answers.put(reference_logps(language_model(), GROUPS, cache=cache, accelerator=accelerator))
    torch.distributed.destroy_process_group()


def test_processes_agree_whether_there_is_a_file(tmp_path):
    """Another launch may write it between their looks: one would wait for the other for ever."""
    expected = reference_logps(language_model(), GROUPS, cache=tmp_path / "cache_1")
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    processes = [context.Process(target=_process, args=(r, tmp_path, answers)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(170)
    assert [process.exitcode for process in processes] == [0, 0]
    for found in (answers.get(), answers.get()):
        assert found == [pytest.approx(row, rel=1e-5) for row in expected]


def test_other_weights_precision_or_data_are_other_files(tmp_path):
    other = [*GROUPS[:2], TokenGroup([10, 11], [[25, 3], [20, 4]])]
    nudged = language_model()
    with torch.no_grad():
        nudged.model.model.norm.weight[0] += 1e-6
    reference_logps(language_model(), GROUPS, cache=tmp_path)
    reference_logps(nudged, GROUPS, cache=tmp_path)
    reference_logps(language_model(precision="bf16"), GROUPS, cache=tmp_path)
    reference_logps(language_model(), other, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_file_is_named(tmp_path):
    reference_logps(language_model(), GROUPS, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=f"{file.name}.*damaged"):
        reference_logps(language_model(), GROUPS, cache=tmp_path)


def test_only_learned_tokens_count():
    mask = [True, False]
    groups = [TokenGroup([10, 11], [[20, 3], [21, 3]], [mask, mask]), GROUPS[0]]
    model = language_model()
    expected = [model.score_groups([group])[0] for group in groups]
    for found, wanted in zip(reference_logps(model, groups), expected):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_adapters_of_another_model_belong_to_the_reference(tmp_path):
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    other = LanguageModel(get_peft_model(tiny_model(), settings), pad_token_id=3, precision="fp32")
    pairs = [TokenGroup([10, 11], [[20, 3], [21, 22, 3]])]
    config = DPOConfig(optimizer=OptimizerConfig(learning_rate=1e-9, batch_size=1))
    policy, reference = (torch.tensor(m.score_groups(pairs)[0]) for m in (language_model(), other))
    margin = 0.1 * (policy - reference) @ torch.tensor([1.0, -1.0])
    for _ in range(2):  # the second time read from disk
        options = {"reference": other, "reference_cache": tmp_path, "seed": 0}
        rows = train_preference(language_model(), pairs, config=config, **options)
        assert rows[0]["loss"] == pytest.approx(-F.logsigmoid(margin).item(), rel=1e-4)
    reference_logps(other, pairs, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # with its adapters and without
