"""Processes wait for each other for longer than a collective may, and end together when one of them fails."""

import pytest
from test_processes import output, started

from dsv2_jax.parallel import processes

# A command whose work is `body`, in each process, inside `first_before_others`.
SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import jax, numpy as np
from dsv2_jax import cli
from dsv2_jax.config import Processes, check
from dsv2_jax.parallel import processes
from jax.experimental import multihost_utils

def main():
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    index = int(options["--processes.index"])
    with processes.joined(Processes(coordinator=options["--processes.coordinator"], count=2, index=index)):
        with processes.first_before_others("data"):
            {body}
        found = multihost_utils.process_allgather(np.int32(index))
        print("met", found.tolist())

cli.main(main)
"""


def meet(folder, body, timeout):
    """Two processes of the script: their exit codes and what they said."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(processes.__file__).rsplit("/dsv2_jax/", 1)[0], body=body))
    with started(folder / "run", [str(script)], 2, 1) as those:
        codes = [process.wait(timeout=timeout) for process in those]
    return codes, [output(folder / "run", index) for index in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_a_process_may_prepare_for_longer_than_a_collective_waits(tmp_path, slow):
    """Gloo's first rendezvous times out after 30 seconds."""
    codes, said = meet(tmp_path, f"time.sleep(40 * (index == {slow}))", 120)
    assert codes == [0, 0], said
    assert all("met [0, 1]" in text for text in said)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_in_one_process_ends_both_in_a_line(tmp_path, failing):
    codes, said = meet(tmp_path, f'check(index != {failing}, "the text is empty")', 25)
    assert codes == [2, 2], said
    assert said[failing].splitlines()[-1] == "error: the text is empty"
    assert said[1 - failing].splitlines()[-1] == f"error: process {failing}, data: the text is empty"


@pytest.mark.slow
def test_a_failure_in_one_process_ends_the_other_in_a_line(tmp_path):
    codes, said = meet(tmp_path, "1 / (index - 1)", 25)
    assert codes == [1, 1], said
    assert "ZeroDivisionError" in said[1] and "Traceback" not in said[0]
    assert "process 0 of 2 exits" in said[0] and "(process 1, data: ZeroDivisionError: division by zero)" in said[0]
