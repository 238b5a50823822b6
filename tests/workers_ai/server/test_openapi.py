"""The description is accurate: it has every route with its methods, and nothing else."""

import jsonschema
import pytest
from starlette.routing import Mount, Route

from refgemma.workers_ai.pages import GEMMA_2B, HOSTED, page
from refgemma.workers_ai.server.app import create_app
from tests.tiny_it import tiny_it
from tests.workers_ai.server.live import ACCOUNT, RUN, ask

SLASH = ("/finetunes/", "/finetune-assets/")  # the same routes once more, as the guide writes them


def test_every_route_is_described_and_nothing_else(address):
    paths = ask(address, "/openapi.json").json["paths"]
    described = {(path, method.upper()) for path, item in paths.items() for method in item if method != "parameters"}
    app = create_app(dict.fromkeys(HOSTED, tiny_it()), {})
    (mount,) = [route for route in app.routes if isinstance(route, Mount)]
    prefix = mount.path.replace("{account}", "{account_id}")
    routes = {
        (prefix + route.path, method)
        for route in mount.routes
        if isinstance(route, Route) and not route.path.endswith(SLASH)
        for method in route.methods - {"HEAD"}
    }
    for method in ("POST",):  # a parameter of OpenAPI holds no slash: each model has a path of its own
        routes.remove((f"{prefix}/run/{{model:path}}", method))
        routes |= {(f"{prefix}/run/{name}", method) for name in HOSTED}
    assert described == routes


@pytest.mark.parametrize(
    ("path", "method", "body"),
    [
        (f"/run/{GEMMA_2B}", "post", {"prompt": "What is 17 + 25?", "temperature": 0}),
        (f"/run/{GEMMA_2B}", "post", {"prompt": 5}),
        ("/finetunes", "get", None),
        ("/models/search", "get", None),
    ],
)
def test_replies_are_as_described(address, path, method, body):
    described = ask(address, "/openapi.json").json["paths"]
    reply = ask(address, ACCOUNT + path, body)
    responses = described["/client/v4/accounts/{account_id}/ai" + path][method]["responses"]
    jsonschema.validate(reply.json, responses[str(reply.status)]["content"]["application/json"]["schema"])


def test_the_body_of_a_run_is_the_pages_own_schema(address):
    described = ask(address, "/openapi.json").json["paths"][RUN.replace("0123456789abcdef", "{account_id}")]
    assert described["post"]["requestBody"]["content"]["application/json"]["schema"] == page(GEMMA_2B).schema
