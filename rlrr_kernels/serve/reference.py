"""The page that describes the interface: the OpenAPI description as HTML, with nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: interface</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ max-width: 52rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
  h2 {{ margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 1rem; }}
  code, pre {{ font-family: ui-monospace, monospace; font-size: .92em; }}
  pre {{ overflow-x: auto; padding: .75rem; border: 1px solid #8886; border-radius: .4rem; }}
  table {{ border-collapse: collapse; width: 100%; }}
  th, td {{ text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #8884; }}
</style>
<main>
<h1>{title} {version}</h1>
<p>{description} This page as data: <a href="openapi.json"><code>openapi.json</code></a>. Errors are
<code>{{"detail": "..."}}</code>.</p>
{operations}
</main>
</html>
"""


def reference_page(openapi: Mapping[str, Any]) -> str:
    """The OpenAPI description ``openapi`` as a page."""
    info = {key: escape(openapi["info"].get(key, "")) for key in ("title", "version", "description")}
    return _PAGE.format(**info, operations="\n".join(_operations(openapi)))


def _operations(openapi: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            for paragraph in operation.get("description", "").split("\n\n"):
                yield f"<p>{escape(paragraph)}</p>"
            parameters = [
                (p["name"], p.get("description", "") + ("" if p["required"] else " (optional)"))
                for p in operation.get("parameters", ())
            ]
            yield from _table("Parameter in the query", parameters)
            body = operation.get("requestBody")
            if body is not None:
                yield f"<p>Body: {escape(body['description'])}.</p>"
            answers = [(status, answer["description"]) for status, answer in operation["responses"].items()]
            yield from _table("Status", answers)
            yield from _example(operation["responses"].get("200", {}), openapi)


def _table(title: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    if rows:
        yield f"<table><thead><tr><th scope='col'>{title}</th><th scope='col'>Meaning</th></tr></thead><tbody>"
        for name, text in rows:
            yield f"<tr><td><code>{escape(name)}</code></td><td>{escape(text)}</td></tr>"
        yield "</tbody></table>"


def _example(answer: Mapping[str, Any], openapi: Mapping[str, Any]) -> Iterator[str]:
    schema = answer.get("content", {}).get("application/json", {}).get("schema")
    if schema:
        yield f"<p>Answer:</p><pre>{escape(json.dumps(_value(schema, openapi), indent=2))}</pre>"


def _value(schema: Mapping[str, Any], openapi: Mapping[str, Any]) -> Any:
    """A value that ``schema`` describes, of its examples."""
    if "$ref" in schema:
        return _value(openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]], openapi)
    if "examples" in schema:
        return schema["examples"][0]
    if schema.get("type") == "object":
        return {name: _value(entry, openapi) for name, entry in schema.get("properties", {}).items()}
    if schema.get("type") == "array":
        return [_value(schema["items"], openapi)]
    return "..."
