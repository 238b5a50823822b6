"""Which known bug, or which two, explain a candidate's numbers."""
