"""Templates, and what a page of ours may do in a browser."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, *, version: str = "", **content: object) -> str:
    """Return a page; what people wrote is escaped.

    version: of a page that is served: it then holds a script that asks for the version again and again, and
    loads the page anew when that is another one. "": a file, which holds no script.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    page = environment.get_template(template).render(
        style=Markup(style),
        script=Markup(live_script()) if version else "",
        version=version,
        csp=policy(live=bool(version)),
        **content,
    )
    # Half of a cut emoji, as JSON may hold it, is no text: "?" stands for it.
    return page.encode("utf-8", "replace").decode("utf-8")


def live_script() -> str:
    """Return the one script there is: of a page that is served while its run goes."""
    return (_TEMPLATES / "live.js").read_text(encoding="utf-8").strip()


def policy(*, live: bool) -> str:
    """Return the Content-Security-Policy: no request, and no script but the one of a page that is served."""
    rules = [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    if live:
        digest = base64.b64encode(hashlib.sha256(live_script().encode()).digest()).decode()
        rules += [f"script-src 'sha256-{digest}'", "connect-src 'self'"]
    return "; ".join(rules)
