"""A sheet of samples is no larger than what can be held and opened again."""

from __future__ import annotations

import pytest
import typer

from concertina.client import ImageFormat
from tools.gallery import check_size

IMAGE = ImageFormat(width=30, height=14, palette=b"")


def test_a_sheet_has_a_largest_scale() -> None:
    check_size(IMAGE, count=7, columns=4, scale=128)
    with pytest.raises(typer.BadParameter, match=r"in 4 columns, 129 times as large.*128"):
        check_size(IMAGE, count=7, columns=4, scale=129)
    with pytest.raises(typer.BadParameter, match="or fewer samples and columns"):
        check_size(IMAGE, count=1, columns=10_000_000, scale=1)
