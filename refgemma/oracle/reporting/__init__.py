"""Findings as text and as a picture."""
