"""The server backend against a stub: requests, order, weight updates, errors."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from rlhf_fast.generation.sampling import SamplingConfig
from rlhf_fast.generation.server import ServerGenerator
from rlhf_fast.generation.vllm import WorkerExtension
from rlhf_fast.types import Prompt
from tests.loopback import serve
from tests.vllm_stub import Stub

PROMPTS = [Prompt(f"p{i}", [{"role": "user", "content": "x"}]) for i in range(3)]
TOKEN_IDS = [[10], [11, 12], [13]]
SAMPLING = SamplingConfig(temperature=0.7, top_k=5, max_new_tokens=4)


@pytest.fixture
def stub():
    return Stub()


@pytest.fixture
def url(stub):
    with serve(stub) as url:
        yield url


@pytest.fixture
def generator(url, model_path):
    return make_generator(url, model_path)


def make_generator(url, model_path):
    return ServerGenerator(
        url,
        model_path,
        model="m",
        decode=lambda ids: " ".join(map(str, ids)),
        stop_token_ids=[3],
        endpoint=Endpoint(url, retries=0),
    )


def sample(generator, sampling=SAMPLING, seed=0):
    return generator.generate(PROMPTS, TOKEN_IDS, num_generations=2, seed=seed, sampling=sampling)


def test_groups_come_in_order_with_tokens_and_logps(generator, stub):
    groups = sample(generator)
    for prompt, ids, group in zip(PROMPTS, TOKEN_IDS, groups):
        assert [c.token_ids for c in group] == [[ids[0] + 10, 20, 3], [ids[0] + 10, 21, 3]]
        assert [c.finished for c in group] == [True, False]
        assert {c.prompt.id for c in group} == {prompt.id}
        assert group[0].sampling_logps == [-0.5, -0.25, -1.0]
        assert group[0].prompt_token_ids == ids and group[0].text == f"{ids[0] + 10} 20 3"


def test_requests_say_what_is_sampled(generator, stub):
    sample(generator)
    bodies = [body for path, body in stub.requests if path == "/v1/completions"]
    assert sorted(body["prompt"] for body in bodies) == TOKEN_IDS
    assert len({body["seed"] for body in bodies}) == 3
    for body in bodies:
        assert body["model"] == "m" and body["n"] == 2 and body["temperature"] == 0.7
        assert (body["top_k"], body["max_tokens"], body["stop_token_ids"]) == (5, 4, [3])
        assert body["ignore_eos"] and body["return_token_ids"] and body["logprobs"] == 0


def test_greedy_is_asked_for_once(generator, stub):
    groups = sample(generator, SamplingConfig(temperature=0.0, max_new_tokens=4))
    assert all(group[0] == group[1] for group in groups)
    assert {body["n"] for path, body in stub.requests if path == "/v1/completions"} == {1}


def test_weights_are_sent_before_the_first_response_and_on_update(generator, stub, model_path):
    (begin,) = stub.weights
    assert begin.keys() == load_file(Path(model_path) / "model.safetensors").keys()
    paths = [path for path, _ in stub.requests]
    assert paths == ["/collective_rpc", "/reset_prefix_cache"]
    generator.load_weights([("a", torch.ones(2)), ("b", torch.zeros(3, dtype=torch.bfloat16))])
    assert set(stub.weights[1]) == {"a", "b"} and stub.weights[1]["a"].tolist() == [1.0, 1.0]
    assert [path for path, _ in stub.requests][2:] == paths


def test_a_server_without_token_ids_is_refused(generator, stub):
    stub.choice = {"logprobs": None}
    with pytest.raises(UserError, match="the server must be vLLM >= 0.10.2"):
        sample(generator)


@pytest.mark.parametrize("value", [float("nan"), None])
def test_logits_that_are_not_finite_are_told(generator, stub, value):
    """As of a policy that diverged: its responses say nothing, and training on them less."""
    stub.choice = {"logprobs": {"token_logprobs": [-0.5, value, -1.0]}}
    with pytest.raises(UserError, match="logits must be finite, .* at a prompt like 'p0'"):
        sample(generator)


def test_a_server_without_weight_updates_is_refused(model_path):
    with serve(lambda path, body: (404, {"detail": "Not Found"})) as url:
        with pytest.raises(UserError, match="answered 404.*VLLM_SERVER_DEV_MODE=1 vllm serve"):
            make_generator(url, model_path)


def test_two_runs_on_one_server_are_told(url, stub, generator, model_path):
    """Their responses would come from each other's policies."""
    ours = stub.label
    assert f"process {os.getpid()}" in ours
    other = make_generator(url, model_path)
    assert len(sample(other)) == len(PROMPTS)
    asked = len(stub.requests)
    with pytest.raises(UserError, match=f"weights {ours}, .* got {stub.label}; another run"):
        sample(generator)
    assert len(stub.requests) == asked + 1  # nothing was sampled
    generator.load_weights([("a", torch.ones(2))])
    assert len(sample(generator)) == len(PROMPTS)


@pytest.mark.parametrize("label", ["another run's", None])
def test_weights_replaced_while_it_samples_are_told(url, stub, generator, label):
    """The last word is the server's after the batch; None is that of a server started again."""

    def answer(path, body):
        if path == "/v1/completions":
            stub.label = label
        return Stub.__call__(stub, path, body)

    with serve(answer) as other:
        generator.endpoint = Endpoint(other, retries=0)
        with pytest.raises(UserError, match=f"must sample from weights .* got {label}; "):
            sample(generator)


def test_workers_know_whose_weights_they_have():
    class Worker(WorkerExtension):
        def reload_weights(self, weights_path):
            assert self.label_of_weights() is None
            if weights_path == "missing":
                raise OSError

    worker = Worker()
    worker.take_weights("folder", label="ours", is_tied=False)
    assert worker.label_of_weights() == "ours"
    with pytest.raises(OSError):
        worker.take_weights("missing", label="theirs", is_tied=False)
    assert worker.label_of_weights() is None
