"""Write cupy_api.json: which of NumPy's functions and methods CuPy has, and with which parameters.

    python -m tests.device.make_cupy_api

Needs CuPy installed, but no GPU: it only looks at signatures. In the file a signature is a row of names: ``axis=`` has
a default, a bare ``*`` comes before what must be named, a bare ``/`` after what must not.
"""

import inspect
import json
import re
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("cupy_api.json")

# On the host even in CuPy, or no functions of arrays: files, printing, classes.
LEFT_OUT = {
    *("array2string", "array_repr", "array_str", "base_repr", "binary_repr", "format_float_positional"),
    *("format_float_scientific", "from_dlpack", "frombuffer", "fromfile", "fromfunction", "fromiter", "fromstring"),
    *("genfromtxt", "load", "loadtxt", "save", "savetxt", "savez", "savez_compressed", "show_config"),
    *("broadcast", "flatiter", "ndarray", "poly1d", "ufunc", "vectorize"),
}
# Wrapped by hand in strict_arrays.py, or not wrapped because they leave the device.
METHODS_LEFT_OUT = {"dump", "dumps", "get", "item", "set", "tobytes", "tofile", "toDlpack", "tolist"}


def api(cupy):
    """The table, from an imported CuPy."""
    functions, same = {}, []
    for name in sorted(vars(cupy)):
        ours, theirs = getattr(cupy, name), getattr(np, name, None)
        if name.startswith("_") or name in LEFT_OUT or theirs is None or inspect.ismodule(ours):
            continue
        if ours is theirs:
            same.append(name)
        elif callable(ours) and not inspect.isclass(ours):
            functions[name] = signature_of(ours)
    methods, attributes = {}, []
    for name in dir(cupy.ndarray):
        if name.startswith("_") or name in METHODS_LEFT_OUT or not hasattr(np.ndarray, name):
            continue
        member = getattr(cupy.ndarray, name)
        if callable(member):
            methods[name] = signature_of(member)
        else:
            attributes.append(name)
    special = [name for name in dir(cupy.ndarray) if name.startswith("__") and hasattr(np.ndarray, name)]
    return {
        "cupy": cupy.__version__,
        "functions": functions,
        "numpy's own": same,
        "methods": methods,
        "attributes": attributes,
        "special methods": special,
    }


def signature_of(function):
    """Parameters as a row of names."""
    if hasattr(function, "nin") and hasattr(function, "nout"):  # a ufunc; all of them take the same
        inputs = "x" if function.nin == 1 else "x1 x2"
        return f"{inputs} / out= * casting= dtype="
    try:
        return " ".join(_words(inspect.signature(function).parameters.values()))
    except ValueError:  # compiled: the signature is the first line of the docstring, with the types of C
        inside = re.search(r"\((.*)\)", function.__doc__.strip().partition("\n")[0])[1]
        return " ".join(re.sub(r"=.*", "=", word).split()[-1] for word in inside.split(","))


def _words(parameters):
    before = None
    for p in parameters:
        if before == p.POSITIONAL_ONLY != p.kind:
            yield "/"
        if p.kind == p.KEYWORD_ONLY and before not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL):
            yield "*"
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        yield stars + p.name + ("" if p.default is p.empty else "=")
        before = p.kind
    if before is not None and before == inspect.Parameter.POSITIONAL_ONLY:
        yield "/"


def text(table):
    """As it is written: an entry a line."""
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(words)}" for name, words in value.items())
            lines.append(f'  "{key}": {{\n{rows}\n  }}')
        else:
            lines.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    import cupy

    PATH.write_text(text(api(cupy)), encoding="utf-8")
