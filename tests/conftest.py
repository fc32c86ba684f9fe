"""Shared set-up: every random number seeded, one thread, nothing global left behind."""

from __future__ import annotations

import os

import pytest
import torch

from tests.on_device import OnDevice

torch.set_num_threads(1)
DEVICE = os.environ.get("ALPHA_OPTIM_TEST_DEVICE", "cpu")


def pytest_configure(config):
    if DEVICE != "cpu":
        OnDevice(DEVICE).__enter__()  # for the whole run: tests are collected under it, too


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
