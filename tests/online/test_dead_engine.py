"""An engine that dies in the middle of a run: a clear error, and the run goes on later."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.endpoint import Endpoint
from rlhf_fast.errors import UserError
from rlhf_fast.online.config import RewardConfig
from rlhf_fast.online.workflow import resume, run_online
from tests.loopback import serve
from tests.online.helpers import rows_without_times
from tests.vllm_stub import Stub


class Server(Stub):
    """Answers random words, the same for the same request; dies after a number of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.requests_left = 10**6

    def __call__(self, path, body):
        if path != "/v1/completions":
            return super().__call__(path, body)
        self.requests_left -= 1
        if self.requests_left < 0:
            return 503, {"error": "the engine is dead"}
        draw = random.Random(f"{body['prompt']} {body['seed']}")
        choices = [
            {
                "index": i,
                "token_ids": [*(draw.randrange(20, 500) for _ in range(3)), 3],
                "logprobs": {"token_logprobs": [-1.0] * 4},
                "finish_reason": "stop",
            }
            for i in range(body["n"])
        ]
        return 200, {"choices": choices}


def test_a_dead_server_loses_nothing(config, tmp_path, monkeypatch):
    original = Endpoint.__init__
    monkeypatch.setattr(Endpoint, "__init__", lambda *a, **k: original(*a, **{**k, "retries": 0}))
    server = Server()
    with serve(server) as url:
        generation = replace(config.generation, backend="server", server_url=url)
        reward = RewardConfig(function="helpers:varied")
        config = replace(config, generation=generation, reward=reward)
        run_online(replace(config, output_dir=str(tmp_path / "whole")))
        server.requests_left = 3 + 9 + 3 + 4  # dies while iteration 2 is sampled
        run = Path(config.output_dir)
        with pytest.raises(UserError, match=f"503.*continue with `rlhf-fast resume {run}`$"):
            run_online(config)
        assert not (run / "iteration_2" / "completions.jsonl").exists()
        with pytest.raises(UserError, match="the engine is dead"):
            resume(run)  # still dead
        server.requests_left = 10**6
        resume(run)
    assert rows_without_times(run) == rows_without_times(tmp_path / "whole")
