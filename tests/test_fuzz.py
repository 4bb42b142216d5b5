"""Files damaged at random load or are refused by one error: a little of what `fuzz.py` can do."""

import pytest

from .fuzz import KEPT, LOADERS, Fuzz


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files_load_or_are_refused_by_one_error(name, tmp_path):
    fuzz = Fuzz(name, tmp_path / "files")
    for seed in KEPT:
        fuzz.run(seed, 10)
