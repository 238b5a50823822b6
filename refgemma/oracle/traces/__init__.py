"""Traces: every named tensor of one run, recorded through the tap of `refgemma.model.forward`, in memory or a file."""
