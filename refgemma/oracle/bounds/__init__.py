"""How far an engine's rounding may take each operation: derived bounds, one for each kind of operation."""
