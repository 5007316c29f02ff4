"""What can be said of the in-process engine without vLLM: its cache and what it may not leave."""

import os

import psutil
import torch

from rlhf_fast.generation.vllm_process import (
    apart_from_launch,
    context_length,
    kv_cache_bytes,
    process_state_kept,
)


def test_the_cache_holds_64_responses_or_one_of_the_longest(model_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width

    def tokens(max_new_tokens, itemsize=2, **options):
        size = kv_cache_bytes(model_path, max_new_tokens, itemsize=itemsize, **options)
        return size / (itemsize * per_token)

    assert tokens(88) == tokens(88, itemsize=4) == 64 * 256  # the model's length
    assert tokens(88, max_model_len=2048) == 64 * 640  # 88 + 512, in blocks of 128
    assert tokens(40, max_model_len=100) == 64 * 128  # prompts of 60 tokens at most
    assert tokens(88, max_model_len=10**6) == 10**6 + 128


def test_prompts_decide_how_long_the_engine_may_read(model_path, monkeypatch):
    from rlhf_fast.generation import chat
    from rlhf_fast.generation.samplers import SamplerConfig
    from rlhf_fast.generation.sampling import SamplingConfig
    from rlhf_fast.online import parts
    from rlhf_fast.online.config import GenerationConfig
    from rlhf_fast.rewards import Compute
    from rlhf_fast.types import Prompt

    assert context_length(model_path, 100) == 100
    assert context_length(model_path, 10**6) == 256 and context_length(model_path, None) is None
    seen = []
    monkeypatch.setattr(chat, "make_backend", lambda *_, **options: seen.append(options))
    built = parts.Parts(model_path, Compute("cpu", "fp32", 64))
    prompts = [Prompt(str(n), [{"role": "user", "content": "w30 " * n}]) for n in (3, 9)]
    for kind in ("plain", "prefix_reset"):
        config = GenerationConfig(
            "vllm", sampling=SamplingConfig(max_new_tokens=5), sampler=SamplerConfig(kind)
        )
        built.generator(model_path, config, seed=0, prompts=prompts)
    longest = len(built.chat.prompt_ids(prompts[1].messages))
    assert [options["longest_prompt"] for options in seen] == [longest, None]


def test_the_cache_leaves_memory(model_path, monkeypatch):
    free = type("Memory", (), {"available": 4000})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert kv_cache_bytes(model_path, 1024, itemsize=2) == 1000


def test_an_engine_knows_nothing_of_a_launch(monkeypatch):
    given = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "1",
        "CUDA_VISIBLE_DEVICES": "4,6",
    }
    for name, value in {**given, "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    before = dict(os.environ)
    with apart_from_launch():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6" and os.environ["OMP_NUM_THREADS"] == "1"
        gone = {"WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
        assert before.keys() - os.environ.keys() == gone
    assert os.environ == before
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with apart_from_launch():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "1")
    with apart_from_launch():
        assert os.environ["LOCAL_RANK"] == "1"


def test_threads_and_random_state_stay():
    before, function = torch.get_num_threads(), torch.set_num_threads
    try:
        function(2)
        state = torch.get_rng_state()
        with process_state_kept():
            torch.set_num_threads(1)
            torch.set_num_threads = lambda count: None  # as vLLM's CPU worker does
            torch.rand(3)
        assert torch.get_num_threads() == 2 and torch.set_num_threads is function
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads = function
        function(before)
