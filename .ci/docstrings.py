"""Check that what is public has a complete numpydoc docstring: exported names, their methods, `ops` and `forward`.

Public is what the `__all__` of refgemma and of its packages lists. Run ``python .ci/docstrings.py``; prints what is
missing, and exits 1 if anything is.
"""

import importlib
import inspect
import pkgutil
import sys

from numpydoc.validate import validate

import refgemma

# Examples, See Also, an extended summary and a dot after a type are welcome and not required; a summary may be a noun
# phrase, which SS05 takes for a verb where it begins with a plural.
OPTIONAL = {"EX01", "SA01", "ES01", "GL01", "SS05", "SS06", "RT02", "YD01"}
INTERNAL = ("refgemma.__main__", "refgemma.cli")


def public():
    """Dotted names of all public functions and classes, and of the public methods of these."""
    names = {"refgemma.model.forward"}
    for module in pkgutil.walk_packages(refgemma.__path__, "refgemma."):
        if module.name in INTERNAL or module.name.startswith("refgemma.cli."):
            continue
        loaded = importlib.import_module(module.name)
        exported = getattr(loaded, "__all__", ())
        if module.name.startswith("refgemma.ops."):
            exported = [
                n for n, x in vars(loaded).items() if n[0] != "_" and getattr(x, "__module__", "") == module.name
            ]
        names |= {f"{module.name}.{name}" for name in exported}
    names |= {f"refgemma.{name}" for name in refgemma.__all__}
    for name in sorted(names):
        thing = resolve(name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            yield name, thing
            for attribute, method in vars(thing).items():
                if attribute[0] != "_" and inspect.isfunction(method):
                    yield f"{name}.{attribute}", method


def resolve(name):
    """The object of a dotted name."""
    parts = name.split(".")
    thing = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(thing, part):
            importlib.import_module(".".join(parts[:i]))
        thing = getattr(thing, part)
    return thing


def main():
    """Print a line for each shortcoming, with the place of the docstring."""
    found, seen = 0, set()
    for name, thing in public():
        if thing in seen:
            continue
        seen.add(thing)
        result = validate(name)
        records = {"PR01"} if inspect.isclass(thing) and "\n    Attributes\n" in (thing.__doc__ or "") else set()
        for code, message in result["errors"]:  # a record documents its fields as attributes
            if code not in OPTIONAL | records:
                found += 1
                print(f"{result['file']}:{result['file_line']}: {name}: {code} {message}")
    print(f"{len(seen)} public docstrings, {found} shortcomings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
