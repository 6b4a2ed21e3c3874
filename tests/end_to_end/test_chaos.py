"""A short soak; the long one is `python tests/end_to_end/chaos.py --faults 50`."""

import pytest
from chaos import soak


@pytest.mark.slow
def test_a_run_through_faults_is_what_an_undisturbed_one_is(tmp_path):
    counts = soak(tmp_path, number=6, seed=0)
    assert counts.total() == 6
