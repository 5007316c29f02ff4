"""Merging: formulas by hand, and checkpoints on disk against the formulas in memory."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_fast.cli import main
from rlhf_fast.errors import UserError
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.language_model import load_causal_lm
from rlhf_fast.models.reward_model import GATE_FILE, RewardModel
from rlhf_fast.online.merging import (
    MergeConfig,
    dare,
    extrapolate,
    layer_group,
    linear,
    merge_checkpoints,
    slerp,
    task_arithmetic,
    ties,
    warp,
)
from tests.tiny import tiny_model, tiny_reward_model, tiny_tokenizer


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_linear_and_extrapolate_and_task():
    close(linear([t(1, 2), t(3, 6)], [0.25, 0.75]), t(2.5, 5))
    close(extrapolate(t(1, 1), t(2, 0), 0.5), t(2.5, -0.5))
    close(task_arithmetic(t(1, 1), [t(2, 1), t(1, 3)], [0.5, 0.5], 2.0), t(2, 3))


def test_slerp_keeps_the_norm_and_halves_the_angle():
    half = slerp(t(1, 0), t(0, 1), 0.5)
    close(half, t(math.sqrt(0.5), math.sqrt(0.5)))
    third = slerp(t(2, 0), t(0, 2), 1 / 3)
    close(third, 2 * t(math.cos(math.pi / 6), math.sin(math.pi / 6)))
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    close(slerp(a, b, 0.0), a)
    close(slerp(a, b, 1.0), b)


def test_slerp_of_parallel_or_zero_vectors_is_linear():
    close(slerp(t(1, 0), t(3, 0), 0.5), t(2, 0))
    close(slerp(t(0, 0), t(3, 0), 0.5), t(1.5, 0))


def test_warp_is_the_slerp_of_deltas_then_back_to_the_start():
    base, first, second = t(1, 1), t(2, 1), t(1, 2)
    close(warp(base, [first, second], 1.0), 1 + t(math.sqrt(0.5), math.sqrt(0.5)))
    close(warp(base, [first, second], 0.0), base)
    close(warp(base, [first], 0.5), t(1.5, 1))


def test_warp_of_three_equal_deltas_is_that_delta():
    base, model = torch.randn(4, 3), torch.randn(4, 3)
    close(warp(base, [model] * 3, 1.0), model)


def test_ties_trims_elects_and_averages():
    base = torch.zeros(4)
    first, second = t(4, -3, 0.1, 2), t(2, 5, 0.2, -0.1)
    # kept: (4, -3, 0, 2 trimmed to the two largest: 4, -3) and (2, 5); signs of sums: +, +
    close(ties(base, [first, second], density=0.5, scale=1.0), t(3, 5, 0, 0))
    close(ties(base + 1, [first + 1, second + 1], density=0.5, scale=0.5), t(2.5, 3.5, 1, 1))


def test_dare_is_unbiased_and_sparse():
    base, model = torch.zeros(20_000), torch.ones(20_000)
    generator = torch.Generator().manual_seed(0)
    merged = dare(base, [model], [1.0], density=0.2, scale=1.0, generator=generator)
    assert set(merged.unique().tolist()) == {0.0, 5.0}
    assert abs(merged.mean().item() - 1) < 4 * (0.2 * 0.8 / 20_000) ** 0.5 * 5


def test_layer_groups():
    assert [layer_group(f"model.layers.{i}.x", 4, 2) for i in range(4)] == [0, 0, 1, 1]
    assert layer_group("model.embed_tokens.weight", 4, 3) == 0
    assert layer_group("model.norm.weight", 4, 3) == layer_group("lm_head.weight", 4, 3) == 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three checkpoints of different weights; the first in several files."""
    paths = []
    for seed in range(3):
        path = tmp_path_factory.mktemp(f"model_{seed}") / "model"
        save_model(path, tiny_model(seed=seed), tiny_tokenizer())
        paths.append(path)
    (file,) = paths[0].glob("*.safetensors")
    state = load_file(file)
    names = sorted(state)
    file.unlink()
    for part, chosen in enumerate((names[:5], names[5:]), 1):
        tensors = {name: state[name] for name in chosen}
        save_file(tensors, paths[0] / f"model-{part:05}-of-00002.safetensors", {"format": "pt"})
    return paths


def weights(path):
    state = {}
    for file in path.glob("*.safetensors"):
        state |= load_file(file)
    return state


@pytest.mark.parametrize(
    ("config", "has_base", "expected"),
    [
        (MergeConfig("linear"), False, lambda a, b: (a + b) / 2),
        (MergeConfig("linear", weights=(3.0, 1.0)), False, lambda a, b: 0.75 * a + 0.25 * b),
        (MergeConfig("slerp", scale=0.3), False, lambda a, b: slerp(a, b, 0.3)),
        (MergeConfig("warp", scale=0.5), True, lambda a, b, c: warp(a, [b, c], 0.5)),
        (MergeConfig("extrapolate", scale=0.5), True, lambda a, b: b + 0.5 * (b - a)),
        (MergeConfig("task"), True, lambda a, b, c: a + ((b - a) + (c - a)) / 2),
        (MergeConfig("ties", density=0.3), True, lambda a, b, c: ties(a, [b, c], 0.3, 1.0)),
    ],
)
def test_checkpoints_merge_as_tensors_do(models, tmp_path, config, has_base, expected):
    count = expected.__code__.co_argcount
    base, others = (models[0], models[1:count]) if has_base else (None, models[:count])
    merge_checkpoints(tmp_path / "merged", others, config, base=base)
    merged, states = weights(tmp_path / "merged"), [weights(p) for p in models]
    assert merged.keys() == states[0].keys()
    for name in merged:
        close(merged[name], expected(*(s[name] for s in states[:count])))


def test_the_merged_directory_is_a_model(models, tmp_path):
    merge_checkpoints(tmp_path / "merged", models[:1], MergeConfig("linear"))
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == sorted(
        p.name for p in models[0].iterdir()
    )
    file = next((tmp_path / "merged").glob("*00001*.safetensors"))
    assert load_file(file).keys() == load_file(models[0] / file.name).keys()
    single = tmp_path / "single"
    merge_checkpoints(single, [models[1], models[2]], MergeConfig("slerp", scale=0.0))
    model = load_causal_lm(str(single))
    for ours, theirs in zip(model.parameters(), tiny_model(seed=1).parameters()):
        close(ours, theirs)


def test_weights_that_were_not_merged_are_left_behind(models, tmp_path):
    """Files of pickles, code and other formats would be the first model's."""
    first = Path(shutil.copytree(models[0], tmp_path / "first"))
    for name in ("pytorch_model.bin", "modeling.py", "model.gguf"):
        (first / name).touch()
    merge_checkpoints(tmp_path / "merged", [first], MergeConfig("linear"))
    merged, whole = (
        {file.name for file in path.iterdir()} for path in (tmp_path / "merged", models[0])
    )
    assert merged == whole


def test_a_reward_model_takes_what_a_language_model_knows(models, tmp_path):
    """The layers and embeddings are merged, the head stays, and the result is a reward model."""
    save_model(tmp_path / "rm", tiny_reward_model(seed=3), tiny_tokenizer())
    config = MergeConfig("shared", weights=(3.0, 1.0))
    merge_checkpoints(tmp_path / "m", [tmp_path / "rm", models[1]], config)
    before, expert, merged = (weights(p) for p in (tmp_path / "rm", models[1], tmp_path / "m"))
    assert before.keys() - expert.keys() == {"score.weight"} and "lm_head.weight" in expert
    for name, tensor in merged.items():
        head = name == "score.weight"
        close(tensor, before[name] if head else 0.75 * before[name] + 0.25 * expert[name])
    model = RewardModel.load(str(tmp_path / "m"), precision="fp32")
    close(model.head.weight, before["score.weight"])
    with pytest.raises(UserError, match="have different parameters"):
        merge_checkpoints(tmp_path / "n", [tmp_path / "rm", models[1]], MergeConfig("linear"))


def test_a_gate_is_not_left_behind_in_silence(models, tmp_path):
    """The merged model would weigh its outputs by the gate no more."""
    gated = Path(shutil.copytree(models[0], tmp_path / "gated"))
    (gated / GATE_FILE).parent.mkdir()
    (gated / GATE_FILE).touch()
    with pytest.raises(UserError, match="models: .*gated is a reward model with a gate"):
        merge_checkpoints(tmp_path / "m", [gated, models[1]], MergeConfig("linear"))


def test_layers_that_only_one_model_has_are_refused(models, tmp_path):
    """Else models whose parameters have other names would be merged in nothing but the rest."""
    save_model(tmp_path / "deep", tiny_model(num_hidden_layers=3), tiny_tokenizer())
    with pytest.raises(UserError, match=r"different parameters: \['model.layers.2."):
        merge_checkpoints(tmp_path / "m", [models[0], tmp_path / "deep"], MergeConfig("shared"))


def test_layer_ratios_and_dtype(tmp_path):
    for seed, name in enumerate(["before", "after"]):
        save_model(tmp_path / name, tiny_model(seed=seed).bfloat16(), tiny_tokenizer())
    config = MergeConfig("layers", weights=(0.0, 1.0))
    merge_checkpoints(tmp_path / "m", [tmp_path / "after"], config, base=tmp_path / "before")
    before, after, merged = (weights(tmp_path / n) for n in ("before", "after", "m"))
    for name, tensor in merged.items():
        source = before if "embed" in name or ".layers.0." in name else after
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, source[name]), name


def test_dare_draws_the_same_for_the_same_seed(models, tmp_path):
    results = []
    for seed in (0, 0, 1):
        config = MergeConfig("dare", density=0.5, seed=seed)
        merge_checkpoints(tmp_path / "m", models[1:], config, base=models[0])
        results.append(weights(tmp_path / "m")["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("config", "count", "base", "message"),
    [
        (MergeConfig("warp"), 2, False, "warp needs a base model"),
        (MergeConfig("linear"), 2, True, "linear takes no base model"),
        (MergeConfig("slerp"), 3, False, "slerp takes 2 models, got 3"),
        (MergeConfig("extrapolate"), 2, True, "extrapolate takes 1 models, got 2"),
        (
            MergeConfig("linear", weights=(1.0,)),
            2,
            False,
            "weights must be one per model, got 1 for 2",
        ),
        (MergeConfig("linear", weights=(1.0, -1.0)), 2, False, "must not sum to 0"),
    ],
)
def test_bad_merges(models, tmp_path, config, count, base, message):
    chosen = models[:count]
    with pytest.raises(UserError, match=message):
        merge_checkpoints(tmp_path / "m", chosen, config, base=models[0] if base else None)
    assert not (tmp_path / "m").exists()


def test_the_command_is_named_once(models, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "other" / "model.safetensors")
    command = ["merge", "--output", str(tmp_path / "m"), "--models", str(models[0])]
    for options in (
        [str(tmp_path / "other")],
        ["--merge.method", "slerp"],
        ["--merge.method", "ties"],
        ["--merge.weights", "0"],
        ["--merge.weights", "1", "1"],
        ["--merge.method", "layers"],
        ["--merge.density", "2"],
    ):
        assert main([*command, *options]) == 1
        assert capsys.readouterr().err.count("merge: ") == 1
    (tmp_path / "metrics.jsonl").write_text("{")
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("report: ") == 1


def test_a_model_without_one_of_its_files(tmp_path):
    """The result would lack those weights, too, and a loader would draw them at random."""
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="must be whole, got none of model-00002-of-00003"):
        merge_checkpoints(tmp_path / "merged", [tmp_path / "model"] * 2, MergeConfig())
    assert not (tmp_path / "merged").exists()


def test_models_of_different_shape(models, tmp_path):
    (tmp_path / "other").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(UserError, match="have different parameters"):
        merge_checkpoints(tmp_path / "m", [models[1], tmp_path / "other"], MergeConfig("linear"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no .safetensors file"):
        merge_checkpoints(tmp_path / "m", [tmp_path / "empty"], MergeConfig("linear"))


def test_bad_options():
    with pytest.raises(UserError, match="density must be in"):
        MergeConfig("ties", density=0.0)
    with pytest.raises(UserError, match="layers needs weights"):
        MergeConfig("layers")
