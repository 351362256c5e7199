"""Operators on layouts: integers only, no gradients."""

from __future__ import annotations

import torch

from .. import layout
from .library import composite, fake

composite("token_layout")(layout.token_layout)
composite("layout_cells")(layout.layout_cells)
composite("moved_rows")(layout.moved_rows)


@fake("token_layout")
def _token_layout_fake(active_steps, T):
    B, _ = active_steps.shape
    return torch.empty_like(active_steps), active_steps.new_empty(T * B + 1)


def _some_rows(token, rows):
    # How many rows there are is in the values of the offsets.
    return token.new_empty(torch.library.get_ctx().new_dynamic_size() if rows is None else rows)


@fake("layout_cells")
def _layout_cells_fake(token, offsets, rows=None):
    return _some_rows(token, rows)


@fake("moved_rows")
def _moved_rows_fake(token, offsets, to_token, to_offsets, rows=None):
    return _some_rows(token, rows)
