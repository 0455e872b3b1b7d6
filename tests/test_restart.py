"""scripts/restart: which exit codes start a command again, and what a signal does."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

RESTART = Path(__file__).parent.parent / "scripts" / "restart"
# Ends with the first code in a file, which it takes out; the last code stays.
NEXT_CODE = 'read code < codes; [ "$(wc -l < codes)" = 1 ] || sed -i 1d codes; echo . >> calls; exit $code'


@pytest.mark.parametrize(
    ("codes", "calls", "code"),
    [([0], 1, 0), ([2], 1, 2), ([75, 75, 0], 3, 0), ([1, 75, 137, 0], 4, 0), ([75] * 20 + [0], 21, 0), ([1], 11, 1)],
)
def test_started_again_while_it_helps(tmp_path, codes, calls, code):
    (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
    environment = {**os.environ, "RESTART_SECONDS": "0"}
    command = [RESTART, "bash", "-c", NEXT_CODE]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == code
    assert (tmp_path / "calls").read_text().count(".") == calls
    assert ended.stderr.count("starting again") == calls - 1


def test_a_signal_is_passed_on_and_ends_it(tmp_path):
    saves = 'trap "sleep 0.3; echo saved; exit 75" TERM; touch ready; while true; do sleep 0.05; done'
    with subprocess.Popen([RESTART, "bash", "-c", saves], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == ("saved\n", 75)
