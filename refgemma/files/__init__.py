"""Files of arrays: what a file really is, mapped reading, streamed and atomic writing."""
