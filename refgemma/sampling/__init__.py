"""From logits to a token: settings, the pure steps that act on logits, and one decision.

A sampler here is a list of steps ``logits -> logits`` whose order is visible (`steps_of`); a removed token has a logit
of minus infinity.
"""

from refgemma.sampling.decision import Decision, Stage, decide, steps_of, uniform
from refgemma.sampling.params import SamplingParams

__all__ = ["Decision", "SamplingParams", "Stage", "decide", "steps_of", "uniform"]
