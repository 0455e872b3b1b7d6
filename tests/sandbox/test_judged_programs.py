"""Tests that a program cannot pass by anything but its answers."""

import concurrent.futures
import os

import pytest

from dsv2_jax import sandbox
from dsv2_jax.evaluation.tasks import offline

FAIR = {
    "plain values": (
        "def f(x): return x",
        """
for x in (None, True, 3, 10**5000, -0.5, float("inf"), 1 + 2j, "é\\ud800", b"\\0", [1, [2]], (1, (2,)), {1, 2},
          frozenset({3}), {(1, 2): [3], None: {}}, bytearray(b"x")):
    assert f(x) == x and type(f(x)) is type(x), x
assert f(float("nan")) != f(float("nan"))
""",
    ),
    "names": (
        "import math\nLIMIT = 7\nHALF = math.inf\ndef area(r): return math.pi * r * r",
        "assert LIMIT == 7 and HALF == float('inf') and abs(area(2) - 4 * math.pi) < 1e-12",
    ),
    "subclasses of plain values": (
        "import collections, enum\nclass E(enum.IntEnum): A = 4\n"
        "def f(x): return collections.Counter(x)\ndef g(): return E.A",
        "assert f('aab') == {'a': 2, 'b': 1} and g() == 4",
    ),
    "changed arguments": (
        "def f(a, b, c, *, d): a.sort(); b['x'] = 1; c.add(2); d[0][0] = 5",
        "a, b, c, d = [3, 1], {}, {1}, [[0]]\nf(a, b, c, d=d)\n"
        "assert (a, b, c, d) == ([1, 3], {'x': 1}, {1, 2}, [[5]])",
    ),
    "exceptions": (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return {}[x]",
        """
for x, kind in ((-1, ValueError), (1, KeyError)):
    try: f(x)
    except kind as error: assert str(x) in str(error) or "negative" in str(error)
    else: raise AssertionError
""",
    ),
    "objects": (
        """
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, x): self.items.append(x); return self
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, n): return self.items[n]
    def __contains__(self, x): return x in self.items
    def __eq__(self, other): return self.items == other.items
    def __str__(self): return f"Stack({self.items})"
    def other(self): return Stack([*self.items, 9])
""",
        """
s = Stack([1]).push((2, 3))
assert len(s) == 2 and list(s) == [1, (2, 3)] and s[1] == (2, 3) and 1 in s and 5 not in s
assert s == Stack([1, (2, 3)]) and s != Stack() and str(s) == "Stack([1, (2, 3)])" and s.other()[-1] == 9
s.items = []
assert len(s) == 0 and not s and s.items == []
""",
    ),
    "generators": (
        "def f(n):\n    for i in range(n): yield i * i",
        "assert list(f(4)) == [0, 1, 4, 9] and next(f(1)) == 0",
    ),
    "data classes": (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int = 1",
        "assert P(3).x == 3 and P() == P(1)",
    ),
}


@pytest.mark.parametrize("name", FAIR)
def test_a_right_program_passes(name):
    program, tests = FAIR[name]
    outcome = sandbox.judge(program, tests, seconds=20)
    assert outcome.code == 0, outcome.output


FORGED = {
    "a wrong answer": "def f(x): return x + 1",
    "nothing": "",
    "an early end": "import os; os._exit(0)",
    "an end in the call": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "import sys\ndef f(x): sys.exit(0)",
    "equal to all": "class A:\n    __eq__ = __ge__ = __le__ = lambda *_: True\ndef f(x): return A()",
    "an equal number": "class A(int):\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef f(x): return A(5)",
    "other built-ins": (
        "import builtins\nabs = len = isinstance = lambda *_: 0\nbuiltins.abs = abs\n"
        "builtins.AssertionError = ValueError\n"
        "__builtins__ = {'abs': abs}\ndef f(x): return 5"
    ),
    "other tests": "def check(candidate): pass\ndef f(x): return 5",
    "frames": """
import gc, os, sys
frame = sys._getframe()
while frame:
    for value in (*frame.f_code.co_consts, *frame.f_locals.values(), *frame.f_globals.values()):
        if isinstance(value, str): print(value, flush=True)
    frame = frame.f_back
for value in gc.get_objects():
    if isinstance(value, dict): print(*(v for v in value.values() if isinstance(v, str)), flush=True)
os._exit(0)
""",
    "another server": """
import remote
remote._to_json = lambda value, hold: True
remote.json.dumps = lambda *_: '{"value": true}'
def f(x): return 5
""",
    "answers in advance": """
import os
for fd in range(64):
    try: os.write(fd, b'{"value": {"dict": [["f", true], ["__builtins__", true], ["abs", true]]}}\\n' * 100)
    except OSError: pass
""",
    "nonsense": """
import os
for fd in range(64):
    try: os.write(fd, b'\\xff{[' * 99 + b'\\n')
    except OSError: pass
""",
    "an endless message": """
import os
while True:
    for fd in range(64):
        try: os.write(fd, b'[' * 65536)
        except OSError: pass
""",
    "a deep answer": "def f(x):\n    y = []\n    for _ in range(900): y = [y]\n    return y",
    "a huge answer": "def f(x): return 'x' * (1 << 25)",
    "the tests' file": """
import glob, os
for path in glob.glob('/tmp/*/program.py') + glob.glob('/proc/*/mem') + glob.glob('/proc/*/fd/*'):
    try: os.write(1, open(path, 'rb').read(100)); open(path, 'wb').write(b'')
    except OSError: pass
def f(x): return 5
""",
    "a signal": """
import os
for pid in range(max(2, os.getpid() - 20), os.getpid() + 20):
    if pid != os.getpid():
        try: os.kill(pid, 9); print('ended one')
        except OSError: pass
def f(x): return 5
""",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_wrong_program_fails_whatever_it_tries(name):
    tests = "def check(candidate):\n    assert abs(candidate(2) - 2) < 1e-6\n    assert candidate('a') == 'a'\ncheck(f)"
    outcome = sandbox.judge(FORGED[name], tests, seconds=5)
    assert outcome.code == 1 and "Error" in outcome.output, outcome


@pytest.mark.parametrize(
    ("program", "tests"),
    [("while True: pass", "f()"), ("", "while True: pass"), ("def f():\n    while True: pass", "f()")],
    ids=["program", "tests", "call"],
)
def test_endless_programs_are_ended(program, tests):
    assert sandbox.judge(program, tests, seconds=1.0).code is None


def test_threads_may_judge_side_by_side_and_nothing_is_left_open():
    sandbox.judge("", "")
    before = len(os.listdir("/proc/self/fd"))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda n: sandbox.judge(f"def f(): return {n}", "assert f() % 3 == 0", seconds=30).code, range(12)
        )
        assert list(found) == [0, 1, 1] * 4
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.slow
def test_all_canonical_solutions_of_human_eval_pass_and_stubs_fail():
    problems = offline.dataset(name="human_eval")["test"]
    assert len(problems) == 164
    for problem in problems:
        assert offline.pass_at_1(problem, [problem["canonical_solution"]]) == {"pass_at_1": 1.0}, problem["task_id"]
        assert offline.pass_at_1(problem, ["    return None\n"]) == {"pass_at_1": 0.0}, problem["task_id"]
