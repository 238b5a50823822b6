"""Random settings of a LoRA adapter, over everything of PEFT's format that concerns a causal Gemma."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TABLES = ["embed_tokens", "lm_head"]
EXPRESSIONS = [
    r".*\.(q|v)_proj",
    r"model\.layers\.0\.self_attn\.(q|k|v|o)_proj",
    r".*mlp.*(gate|down)_proj",
    r".*(embed_tokens|up_proj)",
    r"lm_head|.*\.k_proj",
    r".*self_attn\.\w+",
]
EXCLUDED = [["o_proj"], ["layers.0.mlp.up_proj", "k_proj"], r".*\.0\..*v_proj"]
SAVED = [
    ["norm"],  # every norm: PEFT compares plain ends of names
    ["model.norm"],
    ["input_layernorm"],
    ["post_attention_layernorm", "lm_head"],
    ["lm_head"],
    ["embed_tokens"],
    ["embed_tokens", "lm_head"],
    ["mlp"],
    ["layers.0.mlp", "norm"],
    ["o_proj"],
    ["self_attn"],
]


def random_options(rng, model, targeted):
    """Keyword arguments of LoraConfig; `targeted(options)` gives the modules that PEFT matches, for the patterns."""
    some = lambda share: rng.random() < share  # noqa: E731
    layers, square = (
        model.config.num_layers,
        model.config.hidden_size == model.config.layers[0].num_heads * model.config.layers[0].head_dim,
    )
    options = {
        "task_type": "CAUSAL_LM",
        "r": int(rng.choice([1, 2, 3, 4, 5, 8, 32])),
        "lora_alpha": [1, 2, 3, 8, 16, 24, 0.5][rng.integers(7)],
        "target_modules": random_targets(rng, layers),
        "use_rslora": some(0.4),
        "use_dora": some(0.35),
        "fan_in_fan_out": some(0.15),
        "bias": ["none", "none", "all", "lora_only"][rng.integers(4)],
        "lora_dropout": float(rng.choice([0.0, 0.1])),
    }
    if square and some(0.6):
        options["r"] = model.config.hidden_size  # the factors of square weights are square as well
    if not options["use_dora"] and some(0.15):
        options["lora_bias"] = True
    if some(0.3):
        options["exclude_modules"] = EXCLUDED[rng.integers(len(EXCLUDED))]
    if isinstance(options["target_modules"], list) and some(0.35):
        chosen = sorted({int(i) for i in rng.integers(layers, size=2)})
        options["layers_to_transform"] = chosen if some(0.6) else chosen[0]
        options["layers_pattern"] = [None, "layers", ["h", "layers"]][rng.integers(3)]
    if some(0.35):
        options["modules_to_save"] = list(SAVED[rng.integers(len(SAVED))])
    if some(0.25):
        options["trainable_token_indices"] = random_tokens(rng, model)
    if model.config.tie_word_embeddings and some(0.35):
        options["ensure_weight_tying"] = True
    names = targeted(options)
    if some(0.4):
        options["rank_pattern"] = random_pattern(rng, names, lambda: int(rng.integers(1, 9)))
    if some(0.4):
        options["alpha_pattern"] = random_pattern(rng, names, lambda: int(rng.integers(1, 33)))
    return options


def random_targets(rng, layers):
    """A list of endings of names, an expression, or "all-linear"."""
    kind = rng.random()
    if kind < 0.15:
        return "all-linear"
    if kind < 0.35:
        return EXPRESSIONS[rng.integers(len(EXPRESSIONS))]
    chosen = [name for name in ATTENTION + MLP if rng.random() < 0.4]
    chosen += [name for name in TABLES if rng.random() < 0.25]
    if rng.random() < 0.25:
        chosen.append(f"model.layers.{rng.integers(layers)}.self_attn.q_proj")
    return chosen or [f"layers.{rng.integers(layers)}.mlp.down_proj"]


def random_tokens(rng, model):
    """A list, or names and lists: of the embedding, of the head, of both, alike or not. Some are in the batch."""
    seen, V = model.tokens[model.real], model.config.vocab_size
    draw = lambda: sorted({int(i) for i in [*rng.choice(seen, 2), *rng.integers(V, size=2)]})  # noqa: E731
    both = draw()
    kinds = [
        draw(),
        {"embed_tokens": draw()},
        {"lm_head": draw()},
        {"embed_tokens": both, "lm_head": both},
        {"embed_tokens": draw(), "lm_head": draw()},
    ]
    return kinds[rng.integers(len(kinds))]


def random_pattern(rng, names, value):
    """Expressions for the ends of some matched names, each of which matches something.

    In the order of the alphabet: the first match counts, and PEFT sorts them when it writes them.
    """
    pattern = {}
    for name in rng.permutation(names)[:2].tolist():
        parts = name.split(".")
        forms = [parts[-1], name, "^" + name.replace(".", r"\."), ".".join(parts[-2:]), rf".*{parts[-1][-4:]}"]
        pattern[forms[rng.integers(len(forms))]] = value()
    return dict(sorted(pattern.items()))
