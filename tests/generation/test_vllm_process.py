"""What can be said of the in-process engine without vLLM: its cache and what it may not leave."""

import psutil
import torch

from rlhf_fast.generation.vllm_process import kv_cache_bytes, process_state_kept


def test_the_cache_holds_64_responses_or_one_of_the_longest(model_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    size = kv_cache_bytes(model_path, 88, itemsize=2)
    assert size == 2 * per_token * 64 * (88 + 512)
    assert kv_cache_bytes(model_path, 88, itemsize=4) == 2 * size
    long = kv_cache_bytes(model_path, 88, itemsize=2, max_model_len=10**6)
    assert long == 2 * per_token * (10**6 + 128)


def test_the_cache_leaves_memory(model_path, monkeypatch):
    free = type("Memory", (), {"available": 4000})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert kv_cache_bytes(model_path, 1024, itemsize=2) == 1000


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
