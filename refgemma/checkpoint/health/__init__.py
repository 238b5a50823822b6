"""What is wrong with a model folder, found without loading it."""
