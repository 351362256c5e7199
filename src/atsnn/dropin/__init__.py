"""Existing spiking models made fast: their modules computed by atsnn's kernels."""

from .walk import Change, Report, accelerate, restore

__all__ = ["Change", "Report", "accelerate", "restore"]
