"""What torch is told about a machine."""

import ctypes

import pytest
import torch

from nobackprop import hardware


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc here")
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    class Libc:
        def mallopt(self, option: int, value: int) -> int:
            asked[option] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Libc())
    hardware.prepare(torch.device("cpu"))
    assert asked == {-1: 2**30, -3: 2**30}  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


def test_matrix_products_stay_as_accurate_as_float32() -> None:
    hardware.choose_matmul(torch.device("cpu"))
    a, b = torch.rand(300, 300), torch.rand(300, 300)
    torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), rtol=1e-5, atol=0)
    hardware.choose_matmul(torch.device("cpu"), tolerance=0)
    assert torch.get_float32_matmul_precision() == "highest"
