"""What the server backend sees of a vLLM server."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file


class Stub:
    """A vLLM server that answers each prompt with its first token and the response's number."""

    def __init__(self):
        self.requests = []
        self.weights = []
        self.label = None
        self.choice = {}

    def __call__(self, path, body):
        self.requests.append((path, body))
        if path == "/collective_rpc":
            if body["method"] == "label_of_weights":
                return 200, {"results": [self.label]}
            if body["method"] == "take_weights":
                self.label = body["kwargs"]["label"]
                folder = Path(body["kwargs"]["weights_path"])
                state = {}
                for file in folder.glob("*.safetensors"):
                    state |= load_file(file)
                self.weights.append(state)
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        choices = [
            {
                "index": i,
                "token_ids": [body["prompt"][0] + 10, 20 + i, 3],
                "logprobs": {"token_logprobs": [-0.5, -0.25, -1.0]},
                "finish_reason": "length" if i else "stop",
            }
            | self.choice
            for i in range(body["n"])
        ]
        return 200, {"choices": choices[::-1]}
