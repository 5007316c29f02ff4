"""A folder of adapters stands for its base with them merged in, in merging and elsewhere."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_fast.cli import main
from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import LoraConfig, add_lora, has_adapters, merged_parameters
from rlhf_fast.models.chat import load_tokenizer
from rlhf_fast.models.checkpoint import save_model
from rlhf_fast.models.language_model import load_causal_lm
from rlhf_fast.models.merging import task_arithmetic
from rlhf_fast.models.reward_model import RewardModel, fresh_reward_model
from rlhf_fast.online.merging import MergeConfig, merge_checkpoints
from rlhf_fast.training.critic import Critic
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folders(request, tmp_path_factory):
    """Base and two folders of adapters."""
    path = tmp_path_factory.mktemp(request.param)
    save_model(path / "base", tiny_model(request.param), tiny_tokenizer())
    for seed in (1, 2):
        save_model(path / f"adapters_{seed}", adapted(path / "base", seed), tiny_tokenizer())
    return path


def adapted(base, seed):
    model = load_causal_lm(str(base))
    add_lora(model, LoraConfig(rank=4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


def weights(path):
    """As transformers alone reads the model, with adapters merged parameter by parameter."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: value.clone() for name, value in merged_parameters(model)}


def test_what_is_averaged_are_the_merged_weights(folders, tmp_path):
    names = [folders / "adapters_1", folders / "adapters_2"]
    assert main(["merge", "--models", *map(str, names), "--output", str(tmp_path / "m")]) == 0
    merged, first, second = map(weights, (tmp_path / "m", *names))
    assert not (tmp_path / "m" / "adapter_config.json").exists()
    for name, value in merged.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)
    assert any((first[name] != second[name]).any() for name in merged)


def test_adapters_beside_whole_models(folders, tmp_path):
    save_model(tmp_path / "other", tiny_model_like(folders), tiny_tokenizer())
    models = [folders / "adapters_1", tmp_path / "other"]
    merge_checkpoints(tmp_path / "m", models, MergeConfig("task"), base=folders / "base")
    merged, base, *others = map(weights, (tmp_path / "m", folders / "base", *models))
    for name, value in merged.items():
        expected = task_arithmetic(base[name], [o[name] for o in others], [0.5, 0.5], 1.0)
        torch.testing.assert_close(value, expected)


def tiny_model_like(folders):
    model = load_causal_lm(str(folders / "base"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return model


def test_the_dtype_is_the_base_s(tmp_path):
    save_model(tmp_path / "base", tiny_model().bfloat16(), tiny_tokenizer())
    save_model(tmp_path / "adapters", adapted(tmp_path / "base", 1), tiny_tokenizer())
    merge_checkpoints(tmp_path / "m", [tmp_path / "adapters"], MergeConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_adapters_without_a_tokenizer_take_the_base_s(folders, tmp_path):
    adapted(folders / "base", 1).save_pretrained(tmp_path / "adapters")
    merge_checkpoints(tmp_path / "m", [tmp_path / "adapters"], MergeConfig())
    for name in ("adapters", "m"):
        assert load_tokenizer(str(tmp_path / name)).chat_template


def test_loading_merges_so_that_training_changes_what_is_saved(folders):
    path = str(folders / "adapters_1")
    expected = weights(path)
    for model in (load_causal_lm(path), fresh_reward_model(path)):
        assert not has_adapters(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
        found = dict(model.named_parameters())
        for name in expected.keys() & found.keys():
            torch.testing.assert_close(found[name], expected[name])
    with pytest.raises(UserError, match="lora: the base of new adapters needs a whole model"):
        add_lora(load_causal_lm(path), LoraConfig(rank=4))


def test_a_critic_of_adapters(tmp_path):
    save_model(tmp_path / "base", tiny_model(), tiny_tokenizer())
    save_model(tmp_path / "adapters", adapted(tmp_path / "base", 1), tiny_tokenizer())
    critic = Critic.load(tmp_path / "adapters", device="cpu", pad_token_id=3)
    assert not has_adapters(critic.model)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_reward_model_s_adapters(tmp_path, num_outputs):
    save_model(tmp_path / "base", tiny_model(), tiny_tokenizer())
    model = fresh_reward_model(str(tmp_path / "base"), num_outputs=num_outputs)
    add_lora(model, LoraConfig(rank=4), trained_modules=("score",))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_model(tmp_path / "adapters", model, tiny_tokenizer())
    merge_checkpoints(tmp_path / "m", [tmp_path / "adapters"], MergeConfig())
    models = [RewardModel(model, tiny_tokenizer(), precision="fp32")]
    models += [RewardModel.load(str(tmp_path / n), precision="fp32") for n in ("adapters", "m")]
    group = models[0].token_group([{"role": "user", "content": "w30"}], ["w31", "w32"], [True] * 2)
    trained, *loaded = [m.map_responses([group], m.rewards)[0] for m in models]
    assert trained[0] != trained[1]
    for scores in loaded:
        assert scores == pytest.approx(trained, rel=1e-4)
    if num_outputs == 1:
        critic = Critic.load(tmp_path / "adapters", device="cpu", pad_token_id=3)
        assert torch.equal(critic.head.weight, models[2].head.weight) and critic.head.bias == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "adapters must be of kind LORA"),
        ({"base_model_name_or_path": "./gone"}, "the base of the adapters in .*: no such model"),
        ({"base_model_name_or_path": None}, "must name its base_model_name_or_path"),
    ],
)
def test_adapters_that_cannot_be_merged(folders, tmp_path, changes, message):
    (tmp_path / "bad").mkdir()
    for file in (folders / "adapters_1").iterdir():
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "bad" / "adapter_config.json").read_text())
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(UserError, match=message):
        merge_checkpoints(tmp_path / "m", [tmp_path / "bad"], MergeConfig())
    assert not (tmp_path / "m").exists()


def test_adapters_that_lack_a_layer(folders, tmp_path):
    shutil.copytree(folders / "adapters_1", tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(iter(tensors))]
    save_file(tensors, file)
    with pytest.raises(UserError, match="bad: adapters must be complete, got none for"):
        load_causal_lm(str(tmp_path / "bad"))


def test_a_server_needs_a_whole_model(folders, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w30"}\n')
    code = main(
        [
            *("generate", "--model", str(folders / "adapters_1"), "--output", str(tmp_path / "o")),
            *("--prompts", str(tmp_path / "prompts.jsonl"), "--generation.backend", "server"),
            *("--generation.server-url", "http://127.0.0.1:9"),
        ]
    )
    error = capsys.readouterr().err
    assert code == 1 and "backend server needs a whole model, got adapters in" in error
    assert f"rlhf-fast merge --models {folders / 'adapters_1'}" in error
