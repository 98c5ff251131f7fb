"""Figures that papers print, repeated: one file a paper."""
