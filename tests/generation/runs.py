"""Settings that use every step of the sampler, and how to read a run."""

CONTEXT = 64
SETTINGS = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.95,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
    "seed": 11,
    "max_tokens": 12,
}


def results(events):
    """What each row came to, in the order of the prompts."""
    done = {event.row: event.result for event in events if event.result is not None}
    return [done[row] for row in sorted(done)]
