"""The vLLM backend on a tiny random Llama: tokens, seeds, log-probs, weight updates, errors."""

import random
from dataclasses import replace

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.types import Prompt

pytestmark = pytest.mark.vllm

VOCAB = 512
STOP = [1, 7, 8, 9, 10, 11]
SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=24)
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)
MAX_MODEL_LEN = 64


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="w2"
    )


def _model(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,  # at the usual 0.02 a random model is too flat to tell apart
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return _model(0)


@pytest.fixture(scope="module")
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def generator(vllm, model, tmp_path_factory):
    from rlhf_fast.generation.vllm import VLLMGenerator

    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    generator = VLLMGenerator(
        str(folder),
        sampling=SAMPLING,
        stop_token_ids=STOP,
        seed=0,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        # Few tokens a step: the prompts of every test are spread over several steps.
        engine_options={"max_num_batched_tokens": MAX_MODEL_LEN, "max_num_seqs": 48},
    )
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def prompts():
    return [Prompt(f"p{i}", [{"role": "user", "content": f"{i}"}]) for i in range(6)]


@pytest.fixture(scope="module")
def token_ids():
    draw = random.Random(0)
    return [[0] + [draw.randrange(12, VOCAB) for _ in range(3 + i)] for i in range(6)]


def _texts(groups):
    return [[c.text for c in group] for group in groups]


def _tokens(groups):
    return [[c.token_ids for c in group] for group in groups]


def test_groups_come_complete_and_in_order(generator, prompts, token_ids):
    groups = generator.generate(prompts, token_ids, num_generations=4, seed=1)
    assert [len(group) for group in groups] == [4] * len(prompts)
    for prompt, ids, group in zip(prompts, token_ids, groups):
        assert all(c.prompt is prompt and c.prompt_token_ids == ids for c in group)
        assert len({tuple(c.token_ids) for c in group}) == 4
        assert all(len(c.sampling_logps) == len(c.token_ids) for c in group)
    assert generator.generate([], [], num_generations=4, seed=1) == []


def test_a_finished_response_ends_with_its_only_stop_token(generator, prompts, token_ids):
    groups = generator.generate(prompts, token_ids, num_generations=32, seed=2)
    completions = [c for group in groups for c in group]
    assert {c.finished for c in completions} == {True, False}
    for c in completions:
        assert not set(c.token_ids[:-1]) & set(STOP)
        assert (c.token_ids[-1] in STOP) == c.finished
        assert c.finished or len(c.token_ids) == SAMPLING.max_new_tokens
    assert any(c.token_ids[-1] == 1 for c in completions)
    assert not any("</s>" in c.text for c in completions)


def test_only_listed_tokens_stop(generator, prompts, token_ids, monkeypatch):
    monkeypatch.setattr(generator, "stop_token_ids", [])
    groups = generator.generate(prompts, token_ids, num_generations=32, seed=2)
    completions = [c for group in groups for c in group]
    assert any(1 in c.token_ids[:-1] for c in completions)
    assert not any(c.finished for c in completions)


def test_the_seed_fixes_the_samples(generator, prompts, token_ids):
    first = _tokens(generator.generate(prompts, token_ids, num_generations=3, seed=3))
    assert _tokens(generator.generate(prompts, token_ids, num_generations=3, seed=3)) == first
    assert _tokens(generator.generate(prompts, token_ids, num_generations=3, seed=4)) != first
    reverse = generator.generate(prompts[::-1], token_ids[::-1], num_generations=3, seed=3)
    assert _tokens(reverse)[::-1] == first
    same = generator.generate(prompts[:2], token_ids[:1] * 2, num_generations=3, seed=3)
    assert _tokens(same)[0] != _tokens(same)[1]


def _logp_difference(model, groups):
    """Mean absolute difference of sampling_logps from the model's own in float32."""
    differences = []
    for c in (c for group in groups for c in group):
        with torch.no_grad():
            logits = model(torch.tensor([c.prompt_token_ids + c.token_ids])).logits[0]
        logps = logits.log_softmax(-1)[len(c.prompt_token_ids) - 1 : -1]
        expected = logps.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
        differences.append(expected - torch.tensor(c.sampling_logps))
    difference = torch.cat(differences).abs()
    print(f"log-probs: mean {difference.mean():.1e}, worst {difference.max():.1e}")
    return difference.mean()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_sampling_logps_are_the_models_at_temperature_one(
    generator, model, prompts, token_ids, temperature
):
    sampling = replace(SAMPLING, temperature=temperature, top_k=50 if temperature else 0)
    groups = generator.generate(prompts, token_ids, num_generations=2, seed=5, sampling=sampling)
    assert _logp_difference(model, groups) <= 0.005


def test_greedy_is_argmax_and_fills_the_group(generator, model, prompts, token_ids):
    group = generator.generate(prompts[:1], token_ids[:1], num_generations=3, seed=0,
                               sampling=GREEDY)[0]  # fmt: skip
    assert len(group) == 3 and len({tuple(c.token_ids) for c in group}) == 1
    with torch.no_grad():
        first = model(torch.tensor(token_ids[:1])).logits[0, -1].argmax().item()
    assert group[0].token_ids[0] == first


@pytest.mark.parametrize("in_process", [True, False])
def test_new_weights_are_the_ones_that_sample_and_old_ones_come_back(
    generator, model, prompts, token_ids, monkeypatch, in_process
):
    monkeypatch.setattr(generator, "_is_in_process", in_process)
    monkeypatch.setattr("rlhf_fast.generation.weights._SHARD_BYTES", 1 << 16)

    def greedy():
        return generator.generate(prompts, token_ids, num_generations=1, seed=0, sampling=GREEDY)

    before, other = greedy(), _model(1)
    generator.load_weights(other.state_dict().items())
    changed = greedy()
    generator.load_weights(model.named_parameters())
    assert all(old != new for old, new in zip(_texts(before), _texts(changed)))
    # Changed text alone would also pass with one layer left at its old weights.
    assert _logp_difference(other, changed) <= 0.005
    assert greedy() == before


def test_a_missing_weight_is_an_error(generator, model):
    named = dict(model.named_parameters())
    named.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError, match="without model.layers.1.mlp.up_proj.weight"):
        generator.load_weights(named.items())


def test_the_process_keeps_its_random_state(generator, prompts, token_ids):
    set_num_threads = torch.set_num_threads
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    generator.generate(prompts, token_ids, num_generations=2, seed=6)
    assert torch.equal(torch.rand(3), expected)
    assert torch.set_num_threads is set_num_threads
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"


def test_a_prompt_that_does_not_fit_is_an_error(generator, prompts, token_ids):
    length = MAX_MODEL_LEN - SAMPLING.max_new_tokens + 1
    ids = [token_ids[0], [5] * length]
    with pytest.raises(UserError, match=rf"'p1'.*max_model_len=64.*{length}.*max_new_tokens=24"):
        generator.generate(prompts[:2], ids, num_generations=1, seed=0)
    ids[1].pop()
    assert len(generator.generate(prompts[:2], ids, num_generations=1, seed=0)) == 2
    with pytest.raises(UserError, match="'p0' must have tokens"):
        generator.generate(prompts[:1], [[]], num_generations=1, seed=0)


@pytest.mark.parametrize("dead", [True, False])
def test_a_dead_engine_is_told(generator, prompts, token_ids, monkeypatch, dead):
    from vllm.v1.engine.exceptions import EngineDeadError

    def dies(*arguments, **options):
        raise EngineDeadError() if dead else RuntimeError("out of memory")

    monkeypatch.setattr(generator._llm, "generate", dies)
    with pytest.raises(UserError, match="the engine must live.*rlhf-fast resume RUN"):
        generator.generate(prompts, token_ids, num_generations=2, seed=0)


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    import sys

    from rlhf_fast.generation.vllm import VLLMGenerator

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install rlhf-fast\[vllm\].*GENERATOR=vllm"):
        VLLMGenerator("nowhere", sampling=SAMPLING, stop_token_ids=[1], seed=0)
