"""Tool calls as plain text: how tools enter a prompt, and how a call is read out of an answer.

Gemma 1 to 3 have no tool tokens and no tool role, so all of this is convention. Where each part comes from:

documented
    One user turn holds a preamble, the functions as JSON (name, description, JSON Schema parameters), the question. Two
    styles of call, ``[name(key=value)]`` and ``{"name": ..., "parameters": {...}}``: ai.google.dev, "Function calling
    with Gemma". Tools come flat or as ``{"type": "function", "function": {...}}``, and a call is reported as a name and
    an ``arguments`` object: the Workers AI documentation.
observed
    vLLM's Gemma 3 chat template replays calls as ``[name(key=value)]`` and wraps each result, in a user turn, in
    ``<tool_response>`` lines.
assumed
    The wording of the preamble (the shipped model was trained on exactly this one), that results of one round share one
    user turn, and that a call with an undeclared or missing argument is malformed.

Nothing here is evaluated: Python-style calls are parsed to a syntax tree, of which only literals are accepted.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from refgemma.errors import InputError

Style = Literal["python", "json"]

FORMATS: dict[str, str] = {
    "python": "[name(key=value)]",
    "json": '{"name": "...", "parameters": {...}}',
}
PREAMBLE = (
    "You can call functions. To call one, answer only {format}. Else answer in words.\nFunctions:\n{declarations}\n\n"
)
LONGEST_CALL = 16_384  # characters; bounds the parser's work; no real call is longer


class ToolCallError(InputError):
    """An answer that was meant as a tool call and is not a valid one."""


def normalize_tools(tools: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bring tool declarations to their flat form."""
    flat: list[dict[str, Any]] = []
    for tool in tools:
        body = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        if not isinstance(body, Mapping):
            raise InputError(f"tool is {tool!r}: expected an object with name, description and parameters")
        name = body.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(
                f"tool name is {name!r}: expected letters, digits and underscores, not starting with a digit"
            )
        if any(name == other["name"] for other in flat):
            raise InputError(f"tool {name!r} is declared twice: names must differ")
        parameters = body.get("parameters") or {}
        if not isinstance(parameters, Mapping) or not isinstance(parameters.get("properties", {}), Mapping):
            raise InputError(f"parameters of tool {name!r} are {parameters!r}: expected a JSON Schema object")
        flat.append({key: body[key] for key in ("name", "description", "parameters") if body.get(key)})
    return flat


def render_preamble(tools: Iterable[Mapping[str, Any]], *, style: Style = "python") -> str:
    """Text that announces tools, to be put before the first user turn's own text."""
    _check_style(style)
    declarations = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in normalize_tools(tools))
    if not declarations:
        return ""
    return PREAMBLE.format(format=FORMATS[style], declarations=declarations)


def render_calls(calls: Iterable[Mapping[str, Any]], *, style: Style = "python") -> str:
    """Text of a model turn that calls tools."""
    _check_style(style)
    calls = list(calls)
    if style == "json":
        objects = [{"name": call["name"], "parameters": call["arguments"]} for call in calls]
        return json.dumps(objects[0] if len(objects) == 1 else objects, ensure_ascii=False)
    texts = []
    for call in calls:
        arguments = ", ".join(f"{key}={_python_literal(value)}" for key, value in call["arguments"].items())
        texts.append(f"{call['name']}({arguments})")
    return f"[{', '.join(texts)}]"


def render_results(contents: Iterable[Any]) -> str:
    """Text of the user turn that answers tool calls."""
    texts = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in contents]
    return "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts)


def to_turns(
    messages: Sequence[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]] = (), *, style: Style = "python"
) -> list[dict[str, str]]:
    """Rewrite a conversation with tools as plain turns for the chat template."""
    preamble = render_preamble(tools, style=style)
    turns: list[dict[str, str]] = []
    after_result = False
    for message in messages:
        content: Any
        role, content = str(message["role"]), message.get("content")
        if role == "tool":
            role, content = "user", render_results([content])
        elif message.get("tool_calls"):
            content = render_calls([_flat_call(call) for call in message["tool_calls"]], style=style)
        content = "" if content is None else str(content)
        if role == "user" and preamble:
            content, preamble = preamble + content, ""
        if role == "user" and after_result:
            turns[-1]["content"] += "\n" + content
        else:
            turns.append({"role": role, "content": content})
        after_result = message["role"] == "tool"
    if preamble:
        raise InputError("the conversation has tools and no user message: expected one, to hold the declarations")
    return turns


def parse_calls(text: str, tools: Iterable[Mapping[str, Any]], *, fenced: bool = False) -> list[dict[str, Any]]:
    """Read the tool calls out of a model's answer."""
    declared = {tool["name"]: tool for tool in normalize_tools(tools)}
    text = text.strip()
    if fenced and (block := re.fullmatch(r"```(?:tool_code|json)\n(.*)\n```", text, re.DOTALL)):
        text = block[1].strip()
    if not declared or len(text) > LONGEST_CALL:
        return []
    if re.match(r"\[\s*[A-Za-z_][\w.]*\s*\(", text):
        calls = _parse_python(text)
    elif re.match(r"(\[\s*)?\{", text):
        calls = _parse_json(text)
    else:
        return []
    for call in calls:
        _check_call(call, declared)
    return calls


def _parse_python(text: str) -> list[dict[str, Any]]:
    """``[name(key=literal, ...), ...]`` and nothing around it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # an unknown escape in the model's string is not an error
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolCallError(f"{_short(text)} is not a valid list of calls: expected {FORMATS['python']}") from None
    if not isinstance(tree, ast.List):
        raise ToolCallError(f"{_short(text)} has something after the list of calls: expected {FORMATS['python']} alone")
    calls = []
    for node in tree.elts:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ToolCallError(f"{_short(ast.unparse(node))} is not a call: expected name(key=value)")
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ToolCallError(f"call of {node.func.id!r} has an argument without a name: expected name(key=value)")
        arguments = _unique([(str(keyword.arg), _literal(keyword.value)) for keyword in node.keywords])
        calls.append({"name": node.func.id, "arguments": arguments})
    return calls


def _literal(node: ast.expr) -> Any:
    """Value of a syntax tree made of constants, lists and dicts with string keys."""
    match node:
        case ast.Constant(value=None | str() | bool() | int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if value is not True:
            return -value
        case ast.List(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            if all(isinstance(name, str) for name in names):
                return _unique(list(zip(map(str, names), map(_literal, values), strict=True)))
    raise ToolCallError(
        f"{_short(ast.unparse(node))} is not a literal: expected a string, number, True, False, None, [] or {{}}"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs whose names all differ: which of two values was meant cannot be guessed."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ToolCallError(f"{_short(name)} is given twice: expected one value per name")
    return dict(pairs)


def _parse_json(text: str) -> list[dict[str, Any]]:
    """One object with ``name`` and ``parameters`` (or ``arguments``), or a list of them."""

    def no_constant(name: str) -> Any:
        raise InputError(f"{name} is not JSON")

    try:
        parsed = json.loads(text, parse_constant=no_constant, object_pairs_hook=_unique)
    except ToolCallError:
        raise
    except (ValueError, RecursionError):
        raise ToolCallError(f"{_short(text)} is not valid JSON: expected {FORMATS['json']}") from None
    calls = []
    for item in parsed if isinstance(parsed, list) else [parsed]:
        fields = item if isinstance(item, dict) else {}
        given = [fields[key] for key in ("parameters", "arguments") if key in fields]
        if (
            len(given) != 1
            or len(fields) != 2
            or not isinstance(given[0], dict)
            or not isinstance(fields.get("name"), str)
        ):
            raise ToolCallError(f"{_short(json.dumps(item))} is not a call: expected {FORMATS['json']}")
        calls.append({"name": fields["name"], "arguments": given[0]})
    return calls


def _check_call(call: Mapping[str, Any], declared: Mapping[str, Mapping[str, Any]]) -> None:
    """Only declared tools, only declared arguments, all required ones."""
    name, arguments = call["name"], call["arguments"]
    if name not in declared:
        raise ToolCallError(
            f"the answer calls {_short(name)}, which the request does not declare: it declares {', '.join(declared)}"
        )
    schema = declared[name].get("parameters", {})
    unknown = [key for key in arguments if "properties" in schema and key not in schema["properties"]]
    missing = [key for key in schema.get("required", ()) if key not in arguments]
    if unknown or missing:
        problems = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(
            unknown
        )
        raise ToolCallError(
            f"call of {name!r} {' and '.join(problems)}: its parameters are {', '.join(schema.get('properties', {}))}"
        )


def _flat_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """``{name, arguments}`` from that form or OpenAI's, whose arguments are JSON in a string."""
    body = call.get("function", call)
    arguments = body.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(body.get("name"), str) or not isinstance(arguments, Mapping):
        raise InputError(f"tool call is {_short(repr(dict(body)))}: expected a name and an arguments object")
    return {"name": body["name"], "arguments": arguments}


def _python_literal(value: Any) -> str:
    """A JSON value in Python's spelling, strings in double quotes."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python_literal(str(k))}: {_python_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_python_literal, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _check_style(style: str) -> None:
    if style not in FORMATS:
        raise InputError(f"style is {style!r}: expected 'python' or 'json'")


def _short(text: str) -> str:
    """A quotation that fits one line of an error message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
