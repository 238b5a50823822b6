"""How far correct rounding can move the result of each operation."""
