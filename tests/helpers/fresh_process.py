"""Run Python in a new process, from the checkout, without what this process has imported."""

import os
import subprocess
import sys

from tests.helpers.source_tree import PROJECT


def run_python(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """`python *arguments` in the project's root; output as text. A failure raises with what was printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode} of python {arguments}\n{done.stdout}\n{done.stderr}")
    return done
