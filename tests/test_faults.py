"""Tests real commands under some of the faults of faults.py, shortened; the reference is a run that nothing disturbs.

`python -m tests.faults` inflicts all of them. Faults that other tests cover within one process are left out here.
"""

import pytest
from faults import Lab, inflict, table

# {fault: the arguments to change}. Starting a group of processes takes 10 s of CPU time, so there are few.
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
def test_a_fault_ends_as_it_should(lab, name):
    what, function, arguments = table(short=True)[name]
    row = inflict(lab, name, what, function, {**arguments, **SHORTER[name]})
    assert row["passed"], f"{row['detail']} | {row['message']}"
