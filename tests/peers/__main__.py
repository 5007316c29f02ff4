"""python -m tests.peers [NAME ...]: compares with each package in turn, then prints one table.

Versions exclude each other, so every set goes to a folder of its own, build/peers/NAME, in front of
this environment, which brings torch, transformers and the rest of `pip install -e .[dev]`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.peers import summary

ROOT = Path(__file__).resolve().parents[2]
TRANSFORMERS_4 = (
    "transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.0", "peft==0.18.1",
    "accelerate==1.11.0", "datasets==4.0.0",
)  # fmt: skip
RAY = ("ray", "click", "filelock", "jsonschema", "msgpack", "packaging", "protobuf", "requests")
SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "trl-1.16.0": (("trl==1.16.0",), (), ("integrations/test_trl_*", "peers/test_trl_*")),
    **{
        f"trl-{version}": ((f"trl=={version}",), (), ("integrations/test_trl_*",))
        for version in ("1.14.2", "1.8.0", "1.6.0", "1.0.0", "0.29.1")
    },
    "trl-0.24.0": (("trl==0.24.0", *TRANSFORMERS_4), (), ("integrations/test_trl_*",)),
    "openrlhf-0.11.2": (
        ("openrlhf==0.11.2",),
        (*RAY, "pylatexenc"),
        ("integrations/test_openrlhf_*", "peers/test_openrlhf_*"),
    ),
    "verl-0.9.1": (
        ("verl==0.9.1", "tensordict", "pyvers", "torchdata"),
        (*RAY, "hydra-core", "codetiming", "pylatexenc", "orjson", "cloudpickle"),
        ("integrations/test_verl_*", "peers/test_verl_*"),
    ),
    "llamafactory-0.9.5": (
        ("llamafactory==0.9.5", "trl==0.24.0", *TRANSFORMERS_4),
        ("av", "fire", "omegaconf", "sse-starlette"),
        ("integrations/test_llamafactory_*",),
    ),
    "deepspeed-0.19.8": (
        ("deepspeed==0.19.8",),
        ("einops", "hjson", "msgpack", "ninja", "py-cpuinfo"),
        ("training/test_zero.py",),
    ),
    "scikit-learn-1.9.1": (
        ("scikit-learn==1.9.1",),
        ("scipy", "joblib", "threadpoolctl", "narwhals"),
        ("peers/test_scikit_learn_*",),
    ),
    "liger-0.8.5": (("liger-kernel==0.8.5",), (), ("integrations/test_liger_*",)),
}  # fmt: skip
"""Name -> (packages without what they require, packages with it, tests)."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*SETS, []], help="all, if none is given")
    names = parser.parse_args().names or list(SETS)
    found, broken = [], []
    for name in names:
        try:
            rows, passed = run(name)
        except subprocess.CalledProcessError as error:
            rows, passed = [], False
            print(f"{name}: could not be installed ({error})")
        found += rows
        broken += [] if passed else [name]
    print("\n" + summary.table(found))
    if broken:
        raise SystemExit(f"not everything passed: {', '.join(broken)}")


def run(name: str) -> tuple[list[summary.Row], bool]:
    bare, whole, patterns = SETS[name]
    folder = ROOT / "build" / "peers" / name
    install(folder, bare, whole)
    table = folder / "table.jsonl"
    table.unlink(missing_ok=True)
    patterns = (*patterns, "peers/test_installed.py")
    tests = [str(p) for pattern in patterns for p in sorted((ROOT / "tests").glob(pattern))]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "peers",
            "-rfE",
            "-p",
            "no:cacheprovider",
            *tests,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", summary.VARIABLE: str(table)},
    )
    lines = table.read_text().splitlines() if table.exists() else []
    return [tuple(json.loads(line)) for line in lines], result.returncode == 0


def install(folder: Path, bare: tuple[str, ...], whole: tuple[str, ...]) -> None:
    if (folder / "complete").exists():
        return
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
    if whole:
        subprocess.run([*pip, *whole], check=True)
    subprocess.run([*pip, "--no-deps", *bare], check=True)
    (folder / "complete").touch()


if __name__ == "__main__":
    main()
