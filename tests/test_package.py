"""What a user gets: names at the top of the package, and files in the source archive."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import rlhf_fast
from rlhf_fast import losses, ops

ROOT = Path(__file__).parents[1]


def test_ops_and_losses_can_be_had_from_the_top():
    assert rlhf_fast.preference_loss is ops.preference_loss
    assert rlhf_fast.kto_loss is losses.kto_loss
    assert {"__version__", "ops", "gae", "dpo_loss"} <= set(dir(rlhf_fast))
    with pytest.raises(AttributeError, match="no attribute 'gea'"):
        rlhf_fast.gea  # noqa: B018


def test_no_name_hides_another():
    modules = {path.stem for path in (ROOT / "rlhf_fast").iterdir()}
    assert not modules & {*ops.__all__, *losses.__all__}
    assert not set(ops.__all__) & set(losses.__all__)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, rlhf_fast; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_source_archive_can_be_built(tmp_path):
    """It holds what the build needs: `pip install` of an archive without csrc/ fails."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    package = [
        p for suffix in ("py", "j2", "typed") for p in (ROOT / "rlhf_fast").rglob(f"*.{suffix}")
    ]
    for path in [ROOT / "CMakeLists.txt", ROOT / "setup.py", *sources, *package]:
        assert str(path.relative_to(ROOT)) in held, path
    assert not [name for name in held if name.startswith("tests/")], "half a suite cannot run"
