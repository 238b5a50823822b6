"""Files to parameters: where a model is looked up, which tensors its files hold, and how they become arrays."""
