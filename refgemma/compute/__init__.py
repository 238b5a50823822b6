"""How products and element-wise work are cut into parts and spread over threads: speed, and no mathematics."""
