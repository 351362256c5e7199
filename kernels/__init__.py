"""Triton kernels of atsnn, imported as ``atsnn.kernels``."""

if __name__ != "atsnn.kernels":
    raise ImportError(
        f"this package must be imported as 'atsnn.kernels', got {__name__!r}: install atsnn "
        "(pip install -e . --no-build-isolation) instead of putting its root on sys.path"
    )
