"""The frame of every HTML page: one file with its style sheets, script and data inside, and a policy against requests.

Nothing is fetched: the policy allows inline styles and the one script, known by its hash, and nothing else.
"""

import base64
import hashlib
import json
from html import escape
from importlib import resources
from typing import Any


def document(name: str, title: str, body: str, *, data: Any = None, colours: str = "") -> str:
    """A complete HTML document that makes no request.

    Args:
        name: of its style sheet and script; NAME.css follows the page.css of all pages, NAME.js, if there is one, runs
            behind the body.
        title: plain text.
        body: HTML, `main` included.
        data: what the script is to find as JSON under the id "data", None for nothing.
        colours: style sheet of what only the data decides.

    Raises:
        ValueError: `data` holds a number that is not finite.
    """
    css = _asset("page.css") + _asset(f"{name}.css") + colours
    script = _asset(f"{name}.js") if resources.files(__package__).joinpath(f"{name}.js").is_file() else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    if data is not None:
        embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        body += f'\n<script type="application/json" id="data">{embedded}</script>'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{css}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def variables(light: dict[str, str], dark: dict[str, str]) -> str:
    """A style sheet that gives colours names, on light and on dark paper: {"m0": "#123456"} is var(--m0)."""
    first, second = ("; ".join(f"--{name}: {colour}" for name, colour in colours.items()) for colours in (light, dark))
    return f":root {{ {first} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {second} }} }}\n"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
