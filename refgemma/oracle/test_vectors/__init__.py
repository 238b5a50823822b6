"""Inputs, exact outputs and bounds of single operations, written as files."""
