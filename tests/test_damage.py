"""No damage to a file is silent (tests/damage.py)."""

import pytest
from damage import KINDS, count_silent


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_silent(kind: str) -> None:
    for place, counts in count_silent(*KINDS[kind], trials=300).items():
        assert counts.keys() <= {"told", "harmless"}, (place, counts)
        assert counts["told"] > 290, (place, counts)
