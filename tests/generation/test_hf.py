"""Sampling with transformers' generate: distribution, seeds, log-probabilities, weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.generation.hf import HFGenerator, _Sampler
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.types import Prompt
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [Prompt(f"p{i}", [{"role": "user", "content": "x"}]) for i in range(5)]
TOKEN_IDS = [[10 + i, *range(20, 21 + i)] for i in range(5)]


@pytest.fixture
def generator(model_path):
    tokenizer = tiny_tokenizer()
    return HFGenerator(
        model_path, decode=tokenizer.decode, stop_token_ids=[3, 40], dtype="float32", batch_size=6
    )


def sample(generator, seed=0, **options):
    sampling = SamplingConfig(max_new_tokens=10, **options)
    return generator.generate(PROMPTS, TOKEN_IDS, num_generations=3, seed=seed, sampling=sampling)


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.7}])
def test_drawn_tokens_follow_the_distribution(options):
    sampling = SamplingConfig(temperature=0.7, **options)
    logits = torch.randn(1, 32) * 2
    expected = torch.softmax(logits[0].double() / 0.7, -1)
    order = expected.argsort(descending=True)
    keep = torch.zeros(32, dtype=torch.bool)
    keep[order[: options.get("top_k", 32)]] = True
    expected = expected * keep / expected[keep].sum()
    ahead = expected[order].cumsum(0) - expected[order]
    expected[order[ahead >= options.get("top_p", 1.0)]] = 0
    expected /= expected.sum()
    count = 40_000
    sampler = _Sampler(sampling, torch.Generator().manual_seed(0))
    tokens = sampler(torch.zeros(count, 1), logits.repeat(count, 1)).argmax(-1)
    frequency = torch.bincount(tokens, minlength=32).double() / count
    assert ((expected == 0) <= (frequency == 0)).all()
    error = (frequency - expected).abs() / (expected / count).sqrt().clamp_min(1e-9)
    assert error[expected > 0].max() < 4.5


def test_a_models_own_generation_settings_change_nothing(generator, model_path, tmp_path):
    """Qwen2.5 brings a repetition penalty, others a least length or tokens that are banned."""
    settings = json.loads((Path(model_path) / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 1.5, "min_new_tokens": 9, "suppress_tokens": [40, 41]}
    changed = tmp_path / "model"
    shutil.copytree(model_path, changed)
    (changed / "generation_config.json").write_text(json.dumps(settings))
    options = {"decode": generator.decode, "stop_token_ids": [3, 40], "dtype": "float32"}
    assert sample(HFGenerator(str(changed), batch_size=6, **options)) == sample(generator)


def test_groups_are_whole_and_in_order(generator):
    groups = sample(generator)
    assert [g[0].prompt.id for g in groups] == [p.id for p in PROMPTS]
    for group, ids in zip(groups, TOKEN_IDS):
        assert len(group) == 3
        for completion in group:
            assert completion.prompt_token_ids == ids
            tokens = completion.token_ids
            assert completion.finished == (tokens[-1] in (3, 40))
            assert completion.finished or len(tokens) == 10
            assert not {3, 40} & set(tokens[:-1])
            assert len(completion.sampling_logps) == len(tokens)


def test_sampling_logps_are_the_models(generator):
    model = tiny_model()
    for group in sample(generator, temperature=0.5, top_k=20):
        for completion in group:
            ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
            logps = model(ids).logits[0].log_softmax(-1)
            start = len(completion.prompt_token_ids)
            expected = logps[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
            torch.testing.assert_close(
                torch.tensor(completion.sampling_logps), expected, rtol=1e-4, atol=1e-4
            )


def test_seeds_decide_the_samples(generator):
    assert sample(generator) == sample(generator)
    assert sample(generator) != sample(generator, seed=1)


def test_processes_do_not_repeat_each_others_numbers(generator):
    first = sample(generator)
    generator.process = 1
    pairs = [(a, b) for x, y in zip(first, sample(generator)) for a, b in zip(x, y)]
    assert not any(a.token_ids == b.token_ids for a, b in pairs)


def test_batches_do_not_repeat_each_others_numbers(generator):
    """Two prompts fit into a batch of six responses; alike prompts must get other responses."""
    sampling = SamplingConfig(max_new_tokens=10)
    groups = generator.generate(
        PROMPTS[:4], [[20, 21]] * 4, num_generations=3, seed=0, sampling=sampling
    )
    assert len({tuple(c.token_ids) for group in groups for c in group}) == 12


def test_a_prompt_with_more_responses_than_a_batch_is_sampled_in_parts(generator, monkeypatch):
    sizes, whole = [], generator.model.generate

    def counted(input_ids, **options):
        sizes.append(len(input_ids))
        return whole(input_ids, **options)

    monkeypatch.setattr(generator.model, "generate", counted)
    finished = []
    sampling = SamplingConfig(max_new_tokens=10)

    def groups():
        return generator.generate(
            PROMPTS[:2],
            [[20, 21]] * 2,
            num_generations=14,
            seed=0,
            sampling=sampling,
            on_group=finished.append,
        )

    first = groups()
    assert sizes == [6, 6, 2] * 2 and finished == [1, 1]
    assert [[c.prompt.id for c in group] for group in first] == [["p0"] * 14, ["p1"] * 14]
    assert len({tuple(c.token_ids) for group in first for c in group}) == 28
    assert groups() == first


def test_guidance_goes_with_its_responses(generator, monkeypatch):
    seen = []

    def sample(prompts, count, seed, sampling, guidance):
        seen.append(guidance)
        return [[3]] * len(prompts) * count, [[0.0]] * len(prompts) * count

    monkeypatch.setattr(generator, "_sample", sample)
    for count in (3, 8):
        guidance = [[10 * i + k for k in range(count)] for i in range(2)]
        generator.generate(
            PROMPTS[:2],
            [[20, 21]] * 2,
            num_generations=count,
            seed=0,
            sampling=SamplingConfig(max_new_tokens=10),
            guidance=guidance,
        )
    whole, *parts = seen
    assert whole == [0, 1, 2, 10, 11, 12]
    assert parts == [[0, 1, 2, 3, 4, 5], [6, 7], [10, 11, 12, 13, 14, 15], [16, 17]]


def test_greedy_is_the_argmax_and_follows_the_weights(generator):
    before = sample(generator, temperature=0)
    assert all(c.token_ids == group[0].token_ids for group in before for c in group)
    generator.load_weights(tiny_model(seed=1).named_parameters())
    changed = sample(generator, temperature=0)
    generator.load_weights(tiny_model(seed=0).named_parameters())
    assert changed != before and sample(generator, temperature=0) == before


@pytest.mark.parametrize("temperature", [0, 1])
def test_broken_weights_are_no_samples(generator, temperature):
    with torch.no_grad():
        generator.model.lm_head.weight[7] = torch.nan
    with pytest.raises(UserError, match="hf: .* got logits that are not, at a prompt like 'p"):
        sample(generator, temperature=temperature)


def test_weights_that_are_missing_are_refused(generator):
    named = dict(tiny_model(seed=1).named_parameters())
    del named["model.norm.weight"]
    with pytest.raises(UserError, match="every weight of the model, got 20 without model.norm"):
        generator.load_weights(named.items())


def test_a_tied_head_comes_with_the_embedding(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    decode = tiny_tokenizer().decode
    generator = HFGenerator(str(tmp_path), decode=decode, stop_token_ids=[3], dtype="float32")
    other = tiny_model(seed=1, tie_word_embeddings=True)
    generator.load_weights(other.named_parameters())
    head = generator.model.get_output_embeddings().weight
    torch.testing.assert_close(head, other.model.embed_tokens.weight)


def test_too_long_prompt_names_the_prompt(generator):
    with pytest.raises(UserError, match="prompt 'p1' has 300 tokens"):
        generator.generate(
            PROMPTS[1:2],
            [[10] * 300],
            num_generations=1,
            seed=0,
            sampling=SamplingConfig(max_new_tokens=1),
        )
