"""Shared by all tests: one thread by default, fresh memory poisoned with NaN, profiles."""

from __future__ import annotations

import os
import warnings

import hypothesis
import pytest
import torch

# Before triton is imported, which asks once. On a GPU the kernels are compiled.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# SpikingJelly and PyTorch warn about optional packages on import; ours must not warn at all.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import spikingjelly.activation_based.neuron  # noqa: F401

hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=400)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` gives NaN, so that what a kernel forgets to write cannot pass unseen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads are what a test says; results must not depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param
