import pytest

from nasfcos.ops import library


@pytest.fixture(params=["compiled", "reference"])
def implementation(request, monkeypatch):
    """Runs a test with the compiled CPU kernels and with the reference implementations."""
    if request.param == "reference":
        monkeypatch.setattr(library, "_CPU_KERNELS", False)
    elif not library.has_compiled("conv3x3", "cpu"):
        pytest.skip("csrc/ is not compiled")
