"""One good and one bad request for every keyword of the two pages' schemas, by the keyword's place in the schema."""

from refgemma.workers_ai.pages import page

TOOL = {
    "name": "get_weather",
    "description": "Weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city"}},
        "required": ["city"],
    },
}
USER = {"role": "user", "content": "What is the weather in Paris?"}
FORMS = {"prompt": {"prompt": "What is the capital of Nepal?"}, "messages": {"messages": [USER]}}

# field: keyword: (good value, bad value)
SHARED = {
    "stream": {"type": (True, "true")},
    "max_tokens": {"type": (1, 1.5)},
    "temperature": {"type": (1, "1"), "minimum": (0, -0.1), "maximum": (5, 5.01)},
    "top_p": {"type": (0.5, None), "minimum": (0, -1), "maximum": (2, 2.5)},
    "top_k": {"type": (5.0, 5.5), "minimum": (1, 0), "maximum": (50, 51)},
    "seed": {"type": (7, "7"), "minimum": (1, 0), "maximum": (9_999_999_999, 10_000_000_000)},
    "repetition_penalty": {"type": (1.1, True), "minimum": (0, -0.5), "maximum": (2, 3)},
    "frequency_penalty": {"type": (0, []), "minimum": (0, -2), "maximum": (2, 2.1)},
    "presence_penalty": {"type": (2, {}), "minimum": (0, -0.01), "maximum": (2, 100)},
}


def _but(tree, path, value):
    """A copy of nested dicts in which the value at a path is another."""
    first, *rest = path
    return {**tree, first: _but(tree[first], rest, value) if rest else value}


def _without(tree, path):
    """A copy of nested dicts in which the name at the end of a path is gone."""
    *parents, last = path
    inner = tree
    for name in parents:
        inner = inner[name]
    kept = {name: value for name, value in inner.items() if name != last}
    return _but(tree, parents, kept) if parents else kept


def cases(model):
    """(place of the keyword, good request, bad request) of each keyword; the bad one breaks that keyword alone."""
    schema = page(model).schema
    longest = schema["oneOf"][0]["properties"]["prompt"]["maxLength"]
    yield "type", FORMS["prompt"], []
    yield "oneOf", FORMS["messages"], {}
    yield "oneOf/0/required/prompt", FORMS["prompt"], {"max_tokens": 1}
    yield "oneOf/1/required/messages", FORMS["messages"], {"max_tokens": 1}
    for index, form in enumerate(FORMS):
        for field, keywords in SHARED.items():
            for keyword, (good, bad) in keywords.items():
                place = f"oneOf/{index}/properties/{field}/{keyword}"
                yield place, FORMS[form] | {field: good}, FORMS[form] | {field: bad}
    yield from _texts(longest)
    if "tools" in page(model).fields("messages"):
        yield from _newer()


def _texts(longest):
    prompt, messages = "oneOf/0/properties/", "oneOf/1/properties/messages/"
    yield f"{prompt}prompt/type", {"prompt": "x"}, {"prompt": ["x"]}
    yield f"{prompt}prompt/minLength", {"prompt": "x"}, {"prompt": ""}
    yield f"{prompt}prompt/maxLength", {"prompt": "🌧" * longest}, {"prompt": "x" * (longest + 1)}
    yield f"{prompt}raw/type", FORMS["prompt"] | {"raw": True}, FORMS["prompt"] | {"raw": 1}
    yield f"{prompt}lora/type", FORMS["prompt"] | {"lora": "pirate"}, FORMS["prompt"] | {"lora": 7}
    yield f"{messages}type", {"messages": [USER]}, {"messages": USER}
    yield f"{messages}items/type", {"messages": [USER]}, {"messages": ["Hello"]}
    for name, bad in (("role", 1), ("content", ["Hello"])):
        yield f"{messages}items/properties/{name}/type", {"messages": [USER]}, {"messages": [USER | {name: bad}]}
        yield f"{messages}items/required/{name}", {"messages": [USER]}, {"messages": [_without(USER, [name])]}
    place = f"{messages}items/properties/content/maxLength"
    yield (
        place,
        {"messages": [USER | {"content": "x" * longest}]},
        {"messages": [USER | {"content": "x" * (longest + 1)}]},
    )


def _newer():
    """What the 2B page alone has."""
    for index, form in enumerate(FORMS):
        image, request = f"oneOf/{index}/properties/image/oneOf", FORMS[form]
        yield image, request | {"image": [1, 255]}, request | {"image": True}
        yield f"{image}/0/type", request | {"image": [0]}, request | {"image": {}}
        yield f"{image}/0/items/type", request | {"image": []}, request | {"image": ["1"]}
        yield f"{image}/1/type", request | {"image": "bytes"}, request | {"image": 5}
    yield from _lists()


def _lists():
    functions, tools = "oneOf/1/properties/functions/", "oneOf/1/properties/tools/"

    def with_functions(value):
        return FORMS["messages"] | {"functions": value}

    def with_tools(value):
        return FORMS["messages"] | {"tools": value}

    function = {"name": "f", "code": "return 1"}
    yield f"{functions}type", with_functions([function]), with_functions(function)
    yield f"{functions}items/type", with_functions([function]), with_functions(["f"])
    for name in function:
        place = f"{functions}items/"
        yield f"{place}properties/{name}/type", with_functions([function]), with_functions([function | {name: 1}])
        yield f"{place}required/{name}", with_functions([function]), with_functions([_without(function, [name])])

    yield f"{tools}type", with_tools([TOOL]), with_tools(TOOL)
    yield f"{tools}items/type", with_tools([TOOL]), with_tools(["get_weather"])
    yield f"{tools}items/oneOf", with_tools([TOOL]), with_tools([{"name": "get_weather"}])
    branch = f"{tools}items/oneOf/1/"
    nested = {"type": "function", "function": TOOL}
    for name, bad in (("type", 1), ("function", "f")):
        yield f"{branch}properties/{name}/type", with_tools([nested]), with_tools([nested | {name: bad}])
        yield f"{branch}required/{name}", with_tools([nested]), with_tools([_without(nested, [name])])
    forms = (f"{tools}items/oneOf/0/", TOOL, []), (f"{branch}properties/function/", nested, ["function"])
    for place, tool, above in forms:
        for path, bad in (
            (["name"], 5),
            (["description"], None),
            (["parameters"], []),
            (["parameters", "type"], ["object"]),
            (["parameters", "properties"], []),
            (["parameters", "properties", "city", "type"], 1),
            (["parameters", "properties", "city", "description"], False),
        ):
            inner = _in_schema(path)
            *parents, name = path
            broken, lacking = _but(tool, above + path, bad), _without(tool, above + path)
            yield f"{place}{inner}/type", with_tools([tool]), with_tools([broken])
            parent = f"{_in_schema(parents)}/" if parents else ""
            yield f"{place}{parent}required/{name}", with_tools([tool]), with_tools([lacking])
        parameters = f"{place}properties/parameters/properties/"
        path = [*above, "parameters"]
        for rest, bad in (("required/type", "city"), ("required/items/type", [1])):
            broken = _but(tool, [*path, "required"], bad)
            yield f"{parameters}{rest}", with_tools([tool]), with_tools([broken])
        broken = _but(tool, [*path, "properties"], {"city": "string"})
        yield f"{parameters}properties/additionalProperties/type", with_tools([tool]), with_tools([broken])


def _in_schema(path):
    """Place in the schema of a place in a tool."""
    place = "/".join(f"properties/{name}" for name in path)
    return place.replace("properties/properties/properties/city", "properties/properties/additionalProperties")
