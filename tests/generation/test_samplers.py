"""Samplers on the tiny model: what each adds, and that mixtures follow the mixed distribution."""

from dataclasses import replace

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.generation.chat import ChatGenerator
from rlhf_fast.generation.hf import HFGenerator
from rlhf_fast.generation.samplers import SAMPLERS, SamplerConfig
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.models.chat import ChatFormat
from rlhf_fast.types import Prompt
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [
    Prompt(f"p{i}", [{"role": "user", "content": f"w{30 + i}"}], {"response": "w21 w22 w23 w24"})
    for i in range(6)
]


@pytest.fixture(scope="module")
def reference_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference")
    tiny_model(seed=1).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def generator(model_path, reference_path):
    chat = ChatFormat(tiny_tokenizer())
    backend = HFGenerator(
        model_path,
        decode=chat.decode,
        stop_token_ids=chat.stop_token_ids,
        dtype="float32",
        batch_size=8,
        reference_path=reference_path,
    )
    return ChatGenerator(backend, chat, SamplingConfig(max_new_tokens=6))


def sample(generator, count=4, prompts=PROMPTS, seed=0, **options):
    config = SamplerConfig(**options)
    sampler = SAMPLERS[config.kind](generator, config)
    return sampler.generate(prompts, num_generations=count, seed=seed)


def logits_of(model, completion):
    ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
    return model(ids).logits[0, len(completion.prompt_token_ids) - 1 : -1]


def test_greedy_extra_is_the_last_and_marked(generator):
    groups = sample(generator, kind="greedy_extra")
    assert [len(g) for g in groups] == [5] * 6
    assert groups == [[*p, g[-1]] for p, g in zip(sample(generator), groups)]
    model = tiny_model()
    for group in groups:
        assert [c.source for c in group] == ["policy"] * 4 + ["greedy"]
        assert logits_of(model, group[-1]).argmax(-1).tolist() == group[-1].token_ids


def test_prefix_reset_goes_on_from_the_offline_response(generator):
    chat = generator.chat
    groups = sample(generator, kind="prefix_reset")
    lengths = set()
    for prompt, group in zip(PROMPTS, groups):
        plain = chat.prompt_ids(prompt.messages)
        prefix = group[0].prompt_token_ids[len(plain) :]
        lengths.add(len(prefix))
        assert prefix == [21, 22, 23, 24][: len(prefix)] and len(prefix) < 4
        for completion in group:
            assert completion.prompt_token_ids == plain + prefix
            assert completion.text == chat.decode(prefix + completion.token_ids)
    assert len(lengths) > 1
    assert sample(generator, kind="prefix_reset", prefix_share=0.0) == sample(generator)
    with pytest.raises(UserError, match="prompt 'p0' needs the field `answer`"):
        sample(generator, kind="prefix_reset", prefix_field="answer")


def test_the_rows_response_joins_the_samples(generator):
    chat = generator.chat
    for prompt, plain, group in zip(
        PROMPTS, sample(generator), sample(generator, kind="with_response"), strict=True
    ):
        *sampled, given = group
        assert sampled == plain and given.prompt == prompt
        assert (given.source, given.finished, given.sampling_logps) == ("data", True, None)
        assert given.prompt_token_ids == chat.prompt_ids(prompt.messages)
        assert given.token_ids == [21, 22, 23, 24, 3] and given.text == "w21 w22 w23 w24"
    with pytest.raises(UserError, match="prompt 'p0' needs the field `answer`"):
        sample(generator, kind="with_response", prefix_field="answer")


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_mixture_records_the_mixed_log_probabilities(generator, strength):
    policy, reference = tiny_model(), tiny_model(seed=1)
    for group in sample(generator, kind="mixture", strength=strength):
        other = "reference" if strength == 1 else "mixture"
        assert [c.source for c in group] == ["policy"] * 2 + [other] * 2
        for completion in group:
            g = 0.0 if completion.source == "policy" else -strength
            ours, theirs = logits_of(policy, completion), logits_of(reference, completion)
            logps = ((1 + g) * ours - g * theirs).log_softmax(-1)
            expected = logps.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(
                torch.tensor(completion.sampling_logps), expected, rtol=1e-4, atol=1e-4
            )


def test_the_mixture_samples_the_mixture(generator, reference_path):
    """Greedy decoding from guidance -1 is greedy decoding of the reference."""
    greedy = replace(generator.sampling, temperature=0.0)
    mixed = generator.generate(
        PROMPTS, num_generations=1, seed=0, sampling=greedy, guidance=[[-1.0]] * 6
    )
    reference = tiny_model(seed=1)
    for (completion,) in mixed:
        assert logits_of(reference, completion).argmax(-1).tolist() == completion.token_ids
    plain = generator.generate(PROMPTS, num_generations=1, seed=0, sampling=greedy)
    assert [c.token_ids for (c,) in plain] != [c.token_ids for (c,) in mixed]


def test_pilaf_moves_half_of_the_prompts_both_ways(generator):
    prompts = [replace(PROMPTS[0], id=str(i)) for i in range(60)]
    groups = sample(generator, prompts=prompts, count=2, kind="pilaf", strength=0.5)
    sources = [tuple(c.source for c in group) for group in groups]
    assert set(sources) == {("policy", "policy"), ("mixture", "mixture")}
    assert 15 < sources.count(("policy", "policy")) < 45
    moved = groups[sources.index(("mixture", "mixture"))]
    policy, reference = tiny_model(), tiny_model(seed=1)
    for completion, g in zip(moved, (0.5, -0.5)):
        ours, theirs = logits_of(policy, completion), logits_of(reference, completion)
        logps = ((1 + g) * ours - g * theirs).log_softmax(-1)
        expected = logps.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(completion.sampling_logps), expected, rtol=1e-4, atol=1e-4
        )


def shout(messages, index):
    return [{"role": "system", "content": f"w{400 + index}"}, *messages]


def test_rewritten_prompts_are_trained_as_the_plain_ones(generator, monkeypatch):
    groups = sample(generator, kind="rewrite", function=f"{__name__}:shout")
    for prompt, group in zip(PROMPTS, groups):
        for completion in group:
            assert completion.prompt == prompt and completion.source == "rewritten"
            assert completion.prompt_token_ids == generator.chat.prompt_ids(prompt.messages)
            assert completion.sampling_logps is None
    assert [c.token_ids for c in groups[0]] != [c.token_ids for c in sample(generator)[0]]


def try_again(prompt, completion):
    return "w99" if prompt.id.endswith(("p1", "p1/turn-2-0")) else None


def test_multi_turn_answers_feedback(generator):
    function = f"{__name__}:try_again"
    groups = sample(generator, count=2, kind="multi_turn", function=function, turns=3)
    ids = [group[0].prompt.id for group in groups]
    assert ids[:6] == [p.id for p in PROMPTS]
    assert ids[6:] == ["p1/turn-2-0", "p1/turn-2-1", "p1/turn-2-0/turn-3-0", "p1/turn-2-0/turn-3-1"]
    first, later = groups[1][0], groups[6][0]
    assert later.prompt.messages == [
        *PROMPTS[1].messages,
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "w99"},
    ]
    assert later.prompt_token_ids == generator.chat.prompt_ids(later.prompt.messages)
    assert groups[:6] == sample(generator, count=2)


def test_a_conversation_ends_where_the_next_turn_would_not_fit(generator, monkeypatch):
    options = {"count": 2, "kind": "multi_turn", "function": f"{__name__}:try_again", "turns": 3}
    groups = sample(generator, **options)
    latest = len(groups[-1][0].prompt_token_ids) + generator.sampling.max_new_tokens
    monkeypatch.setattr(generator.backend, "max_model_len", latest - 1)
    assert [group[0].prompt.id for group in sample(generator, **options)] == [
        *(p.id for p in PROMPTS),
        *("p1/turn-2-0", "p1/turn-2-1"),
    ]


def test_every_turn_draws_numbers_of_its_own(generator, monkeypatch):
    seeds, plainly = [], generator.generate

    def noted(prompts, **options):
        seeds.append(options["seed"])
        return plainly(prompts, **options)

    monkeypatch.setattr(generator, "generate", noted)
    function = f"{__name__}:try_again"
    sample(generator, count=2, kind="multi_turn", function=function, turns=3)
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rewrite"}, "`function` goes with kinds rewrite and multi_turn"),
        ({"function": "a:b"}, "`function` goes with kinds"),
        ({"prefix_share": 2.0}, "prefix_share must be in"),
        ({"kind": "mixture", "strength": 2.0}, "strength must be in"),
        ({"kind": "pilaf", "strength": 0.0}, "strength must be > 0 for pilaf"),
        ({"turns": 1}, "turns must be >= 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**options)
