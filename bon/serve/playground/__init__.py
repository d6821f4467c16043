"""The playground: one page, no build step, nothing loaded from elsewhere.

``page.css`` and the scripts are put into ``index.html``: ``request.js`` asks, ``draw.js`` shows.
"""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


_STYLE, _SCRIPT = _read("page.css"), _read("draw.js") + _read("request.js")

PAGE: str = _read("index.html").replace("<style>", f"<style>{_STYLE}").replace("<script>", f"<script>{_SCRIPT}")

# The page's own script and style may run, and nothing else, whatever a candidate says.
POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
