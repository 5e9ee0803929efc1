"""The border: what is pure imports without Ray, and the README names every file."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "selective_ray"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__main__", "__init__"))

# They are imported where a network is loaded, or a GPU is used.
ABOUT_TORCH = (
    *("assignment_torch", "augment", "batch_norm", "classifiers", "contrastive", "fixmatch", "inference"),
    *("networks", "neighbors_torch", "optimization", "usl_t", "views"),
)


@pytest.mark.parametrize("blocked", ["ray", "torch"])
def test_modules_at_the_root_import_without(blocked):
    """The command imports Ray only when a stage needs it, and torch only inside the functions that do."""
    script = f"import sys; sys.modules[{blocked!r}] = None\n"
    modules = [module for module in MODULES if blocked != "torch" or module not in ABOUT_TORCH]
    script += "\n".join(f"import selective_ray.{module}" for module in modules)
    script += "\nimport numpy, selective_ray; selective_ray.select(numpy.eye(4), 2)"
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


def test_readme_names_every_file():
    readme = (PACKAGE.parent / "README.md").read_text()
    files = [
        *PACKAGE.rglob("*.py"),
        *(PACKAGE.parent / "benchmarks").glob("*.py"),
        *Path(__file__).parent.glob("*.py"),
    ]
    assert [file.name for file in files if file.name not in readme and file.name != "__init__.py"] == []
