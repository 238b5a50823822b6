"""Records to look at: one that can be followed by hand, and one whose tokens try to break out of a page."""

import numpy as np

from refgemma.sampling import SamplingParams, record_logits

# Markup, ends of scripts and comments, entities, quotes, templates, newlines, bytes of a fox, a family of joined emoji,
# right-to-left text, separators that JavaScript once took for newlines, and an id without a text.
AWKWARD = (
    "</script><script>document.title='broken'</script>",
    "<!--",
    "<script>",
    "&amp;",
    "\u2581\"quoted'",
    "\n",
    "\n\n\n",
    "<0xF0>",
    "<0x9F>",
    "<0xA6>",
    "<0x8A>",
    "$title {{record}}",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\u2581<b>bold</b>",
    "\\u003c",
    "\t",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u2028",
    "",
    "\u2581\u2581",
    "<end_of_turn>",
)
# What they spell in this order, by hand; the id is in brackets.
SPELLED = (
    "</script><script>document.title='broken'</script><!--<script>&amp; \"quoted'\n\n\n\n\U0001f98a$title {{record}}"
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 <b>bold</b>\\u003c\t\u05e9\u05dc\u05d5\u05dd\u2028[18]  <end_of_turn>"
)


def awkward_record(repeats=1):
    """Every awkward token in turn, chosen by another engine, through many steps."""
    V = len(AWKWARD) + 4
    tokens = list(range(len(AWKWARD))) * repeats
    logits = 2 * np.random.default_rng(3).normal(size=(len(tokens), V)).astype(np.float32)
    params = SamplingParams(
        temperature=1.2, min_p=0.02, typical_p=0.95, seed=1, logit_bias={3: 1.5}, banned=[V - 1], presence_penalty=0.2
    )
    piece = dict(enumerate(AWKWARD)).get
    return record_logits(logits, params, tokens=tokens, piece=lambda token: piece(token, ""))


def plain_record(**changes):
    """Four tokens with probabilities 8, 4, 2 and 1 of 15, twice; the draws are 0.5 and 0.6."""
    settings = {"temperature": 0.5, "top_k": 2, "seed": 7, **changes}
    logits = np.log([[8.0, 4.0, 2.0, 1.0], [1.0, 2.0, 4.0, 8.0]])
    names = ("\u2581red", "\u2581green", "blue", "\n")
    return record_logits(logits, SamplingParams(**settings), uniforms=[0.5, 0.6], piece=names.__getitem__)
