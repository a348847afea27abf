"""Words of a command line, and Python in a new process, from the checkout, without what this one has imported."""

import os
import subprocess
import sys

from tests.helpers.source_tree import PROJECT


def command_words(settings: dict[str, object]) -> list[str]:
    """`--name value` for each setting, `--name value value` for a list; None leaves it out."""
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run_python(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """`python *arguments` in the project's root; output as text. A failure raises with what was printed."""
    done = _run(arguments, _environment())
    if check and done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode} of python {arguments}\n{done.stdout}\n{done.stderr}")
    return done


def launch(*words: str, gpus: int = 0) -> None:
    """`python -m words` in the project's root, with so many GPUs of ours; a failure raises with its last words."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    done = _run(("-m", *words), _environment() | {"CUDA_VISIBLE_DEVICES": ",".join(ours[:gpus])})
    assert done.returncode == 0, done.stderr[-3000:]


def _run(words: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess:
    how = {"cwd": PROJECT, "env": environment, "capture_output": True, "text": True, "timeout": 800, "check": False}
    return subprocess.run([sys.executable, *words], **how)


def _environment() -> dict[str, str]:
    """One thread, and the packages of this process to be found, ours among them.

    Not the folder that evaluate adds to the path for its copies of metrics: another process has copies of its own.
    """
    copies = os.environ["HF_MOE_CPT_TEST_CACHE"]
    paths = os.pathsep.join([str(PROJECT), *(path for path in sys.path if path and not path.startswith(copies))])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


TWO_RANKS = ("torch.distributed.run", "--nproc_per_node", "2", "--standalone")
