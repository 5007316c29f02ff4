"""Comparisons with other libraries are collected where these are installed."""

from importlib.util import find_spec

PEERS = {"trl": "trl", "openrlhf": "openrlhf", "verl": "verl", "scikit_learn": "sklearn"}
collect_ignore_glob = [f"test_{peer}_*.py" for peer, name in PEERS.items() if not find_spec(name)]
