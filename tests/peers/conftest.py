# Holds no tests and imports torch, which the default run must not need (doctest collection imports every file).
collect_ignore = ["eager.py"]
