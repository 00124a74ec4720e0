"""Some of faults.py's faults, briefly: real commands that are killed, fail, or leak nothing.

`python -m tests.faults` has all of them; what the other tests do within one process is not repeated here.
"""

import pytest
from faults import Lab, inflict, table

# Name of a fault, and what to change of its arguments. A group of processes takes 10 s of one core to start.
SHORTER = {
    "kills": {"count": 2},
    "rank_killed_writing": {"max_steps": 50},
    "nan_ddp": {},
    "val_nan": {},
    "hang_writing_fsdp": {"timeout": 3},
    "ranks_differ": {},
    "launcher_killed": {},
    "together": {},
    "interrupted_twice": {},
    "leak": {},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", SHORTER)
def test_fault(lab, name):
    what, function, arguments = table(short=True)[name]
    row = inflict(lab, name, what, function, {**arguments, **SHORTER[name]})
    assert row["passed"], f"{row['detail']} | {row['message']}"
