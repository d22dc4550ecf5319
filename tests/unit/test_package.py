"""The package's table of contents."""

from __future__ import annotations

import iot_models


def test_the_package_exports_its_names_sorted_and_nothing_else() -> None:
    public = {name for name, value in vars(iot_models).items() if not name.startswith("_") and not _is_module(value)}

    assert set(iot_models.__all__) == public
    assert iot_models.__all__ == sorted(iot_models.__all__)


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"
