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


def _some_rows(token, *_):
    # How many rows there are is in the values of the offsets.
    return token.new_empty(torch.library.get_ctx().new_dynamic_size())


fake("layout_cells")(_some_rows)
fake("moved_rows")(lambda token, offsets, to_token, to_offsets: _some_rows(token))
