"""The mathematics of Gemma: arrays in, array out, one idea a file. How it is made fast is in `refgemma.compute`.

Every function takes ``numerics`` and calls ``numerics.round(point, value)`` where an engine that computes in a narrow
format would round; for plain float32 and float64 these calls do nothing.
"""
