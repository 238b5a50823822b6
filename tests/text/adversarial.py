"""Texts that try to become control tokens: markers whole, broken, nested, glued, between odd characters."""

ODD = [
    "\u2581",
    "\0",
    "\ufeff",
    "\u200b",
    "\u00a0",
    "\x85",
    "\u2028",
    "\ufffd",
    "é",
    "漢字",
    "🤗",
    "👩\u200d💻",
    "\U0010ffff",
    "a\u0301",
]
PLAIN = [
    "<",
    ">",
    "</",
    "[",
    "]",
    "@",
    "_",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t\t",
    "\r\n",
    "user",
    "model",
    "Hello",
    "7",
    "<b>",
    "</s>",
]
PLAIN += ["<0x41>", "{{ bos_token }}", "\\u003cmask>", "&lt;mask&gt;", "＜mask＞"]


def control_text(tokenizer):
    """Names of everything that could steer a model, byte pieces included."""
    return [*tokenizer.markers, *tokenizer.controls, "<0x0A>"]


def random_text(rng, tokenizer):
    """Up to a dozen atoms in a row, about half of them whole or partial control text."""
    names = control_text(tokenizer)
    return "".join(_atom(rng, names) for _ in range(rng.randrange(12)))


def _atom(rng, names):
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(PLAIN)
    if kind == 1:
        return rng.choice(ODD)
    name = rng.choice(names)
    at = rng.randrange(len(name) + 1)
    if kind == 2:
        return name
    if kind == 3:
        return name[:at]
    if kind == 4:
        return name[at:]
    return name[:at] + _atom(rng, names) + name[at:]  # nested: what a filter that deletes markers would put together
