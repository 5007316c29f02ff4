"""The server backend against a real vLLM server on the loopback interface."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.generation.server import ServerGenerator
from rlhf_fast.types import Prompt
from tests.tiny import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.vllm

PROMPTS = [Prompt(f"p{i}", [{"role": "user", "content": "x"}]) for i in range(3)]
TOKEN_IDS = [[30, 31, 32], [40], [50, 51]]
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=8)


def make_model(seed=0):
    """The tiny model with heads of 32: vLLM's attention on CPUs has no smaller ones."""
    from transformers import AutoModelForCausalLM

    config = tiny_config()
    config.head_dim = 32
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("vllm", reason="vLLM is not installed", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "--model": folder,
        "--served-model-name": "tiny",
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--max-model-len": 64,
        "--gpu-memory-utilization": 0.2,
        "--worker-extension-cls": "rlhf_fast.generation.vllm.WorkerExtension",
    }
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--enforce-eager", "--no-enable-chunked-prefill"]
    command += [str(x) for item in options.items() for x in item]
    log = open(folder / "server.log", "w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _wait_until_up(url, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def greedy(model, prompt):
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == 3:
            break
    return ids[len(prompt) :]


def test_tokens_seeds_and_weight_updates(server):
    url, folder = server
    generator = ServerGenerator(
        url, folder, model="tiny", decode=tiny_tokenizer().decode, stop_token_ids=[3]
    )

    def sample(sampling, seed=0, count=2):
        return generator.generate(
            PROMPTS, TOKEN_IDS, num_generations=count, seed=seed, sampling=sampling
        )

    for seed in (0, 1, 0):
        model = make_model(seed)
        generator.load_weights(model.named_parameters())
        for ids, group in zip(TOKEN_IDS, sample(GREEDY)):
            assert [c.token_ids for c in group] == [greedy(model, ids)] * 2
    sampling = SamplingConfig(max_new_tokens=8)
    once = sample(sampling)
    assert once == sample(sampling) != sample(sampling, seed=1)
    model = make_model()
    for group in once:
        for completion in group:
            prompt, tokens = completion.prompt_token_ids, completion.token_ids
            logps = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            expected = logps[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
            recorded = torch.tensor(completion.sampling_logps)
            torch.testing.assert_close(recorded, expected, rtol=1e-3, atol=1e-3)
            assert completion.finished == (tokens[-1] == 3)
