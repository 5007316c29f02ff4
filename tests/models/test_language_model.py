"""Log-probabilities through backbone and head against the model's own logits."""

import warnings

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.models import lean
from rlhf_fast.models.attention import PRODUCTS
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.batches import TokenGroup, collate, micro_batches
from rlhf_fast.models.language_model import LanguageModel
from tests.tiny import tiny_model

GROUPS = [
    TokenGroup([10, 11, 12], [[20, 21, 3], [22, 3]]),
    TokenGroup([13, 14], [[23, 24, 25, 26, 3], [27, 28, 29]]),
    TokenGroup([15], [[30, 3], [31, 32, 3]]),
]


def expected_logps(model, groups):
    """Each response in a row of its own, by the model's own logits in float64."""
    result = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response])
            logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(group.prompt_ids)
            rows = logps[start - 1 : -1]
            result.append(rows.gather(1, ids[0, start:, None]).sum())
    return torch.stack(result)


@pytest.mark.parametrize(
    "architecture",
    ["llama", "qwen2", "qwen3", "gemma2", "mistral", "phi3", "gpt2", "cohere", "granite"],
)
def test_logps_equal_the_models_own(architecture):
    model = tiny_model(architecture)
    language_model = LanguageModel(model, pad_token_id=3, precision="fp32")
    assert language_model.shares_prompts
    logps = language_model.response_logps(language_model.collate(GROUPS))
    torch.testing.assert_close(logps.double(), expected_logps(model, GROUPS), rtol=1e-4, atol=1e-4)


def test_shared_prompt_gives_the_same_gradients_as_separate_rows():
    gradients = []
    for groups in (GROUPS, [single for group in GROUPS for single in group.split()]):
        model = tiny_model()
        language_model = LanguageModel(model, pad_token_id=3, precision="fp32")
        logps = language_model.response_logps(language_model.collate(groups))
        (logps * torch.arange(1, len(logps) + 1)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_head_with_recomputed_logits_is_the_head_at_once(monkeypatch):
    model = tiny_model()
    language_model = LanguageModel(model, pad_token_id=3, precision="fp32")
    batch = language_model.collate(GROUPS)
    whole = language_model.token_logps(batch)
    whole.sum().backward()
    gradient = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr("rlhf_fast.models.language_model.LOGITS_BUDGET_BYTES", 4 * 512 * 4)
    chunked = language_model.token_logps(batch)
    chunked.sum().backward()
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(model.get_output_embeddings().weight.grad, gradient)


def test_recurrent_model_falls_back_to_separate_rows():
    from transformers import AutoModelForCausalLM, MambaConfig

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="cannot share a prompt"):
        language_model = LanguageModel(model, pad_token_id=3, precision="fp32")
    assert language_model.collate(GROUPS).input_ids.shape[0] == 6


def test_one_probe_of_two_passes_finds_that_prompts_are_shared_and_rows_skipped():
    model, passes = tiny_model(), []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = Backbone(model, pad_token_id=3)
    assert found.shares_prompts and found._skips_rows and len(passes) == 2


def sees_siblings(self, batch):
    """A mask that lets a response see the one before it in its row."""
    return torch.ones_like(batch.attention_mask).tril()


@pytest.mark.parametrize("broken", ["rows", "trees", "both"])
def test_what_does_not_agree_is_not_used(broken, monkeypatch):
    if broken != "trees":
        monkeypatch.setattr(lean, "_on_rows", lambda forward, rows, x: torch.zeros_like(x))
    if broken != "rows":
        monkeypatch.setattr(Backbone, "_sees_all", lambda self, batch: False)
        monkeypatch.setattr(Backbone, "_tree_mask", sees_siblings)
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*cannot share a prompt")
        language_model = LanguageModel(model, pad_token_id=3, precision="fp32")
    assert language_model.shares_prompts == (broken == "rows")
    assert language_model._skips_rows == (broken == "trees")
    assert model.config._attn_implementation == (PRODUCTS if broken == "rows" else "sdpa")
    monkeypatch.undo()
    found = language_model.score_groups(GROUPS)
    expected = expected_logps(tiny_model(), GROUPS)
    torch.testing.assert_close(torch.tensor(sum(found, [])), expected.float(), atol=1e-4, rtol=1e-4)


def test_collate_layout():
    batch = collate(GROUPS[:1], pad_token_id=0)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 3, 22, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4]]
    assert batch.source.tolist() == [2, 3, 4, 2, 6]
    assert batch.labels.tolist() == [20, 21, 3, 22, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.last.tolist() == [5, 7]
    seen_by_second_response = batch.attention_mask[0, 0, 6].tolist()
    assert seen_by_second_response == [True, True, True, False, False, False, True, False]


def test_micro_batches_cover_everything_within_the_budget():
    sizes = [5, 100, 7, 30, 31, 2]
    batches = micro_batches(sizes, max_tokens=64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or max(sizes[i] for i in batch) * len(batch) <= 64


def test_a_head_that_is_more_than_its_weight_is_refused():
    hooked, replaced = tiny_model(), tiny_model()
    hooked.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    own = replaced.lm_head.forward
    replaced.lm_head.forward = lambda hidden: own(hidden) * 1.5
    for model in (hooked, replaced):
        with pytest.raises(UserError, match="its logits are not its output embedding"):
            LanguageModel(model, pad_token_id=3)


def test_rows_longer_than_the_learned_positions_are_refused():
    model = LanguageModel(tiny_model("gpt2", n_positions=8), pad_token_id=3, precision="fp32")
    fits, longer = TokenGroup([10] * 5, [[11, 12, 3], [3]]), TokenGroup([10] * 5, [[11, 12, 13, 3]])
    assert model.score_groups([fits])
    with pytest.raises(UserError, match="GPT2LMHeadModel has 8 positions, got .* of 9 tokens"):
        model.score_groups([fits, longer])
