"""Equality of nested values, bit for bit."""

from collections.abc import Mapping

import torch


def assert_identical(got: object, expected: object, where: str = "") -> None:
    """Equal, entry by entry, and bit for bit."""
    assert type(got) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    elif isinstance(expected, Mapping):
        assert list(got) == list(expected), where
        for key, value in expected.items():
            assert_identical(got[key], value, f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), where
        for place, value in enumerate(expected):
            assert_identical(got[place], value, f"{where}/{place}")
    else:
        assert got == expected, where
