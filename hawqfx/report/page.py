"""From facts to the page: one HTML file with all that it needs in it."""

import html
from importlib.resources import files
from string import Template

from hawqfx.report.facts import Facts

LIBRARIES = ("vega", "vega-lite", "vega-embed", "cytoscape", "dagre")  # in the order in which they build on each other


def page(facts: Facts) -> str:
    """The page, which needs no network.

    Args:
        facts: all that it shows; what comes from models is escaped here, and the page's script writes it as text alone.
    """
    folder = files("hawqfx.report")
    scripts = []
    for name in LIBRARIES:
        library, licence = (
            (folder / "vendor" / f"{name}{end}").read_text(encoding="utf-8") for end in (".min.js", ".LICENSE")
        )
        scripts.append(f"<script>/*! {name}\n{licence}*/\n{library}</script>")
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(facts.title),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        libraries="\n".join(scripts),
        facts=for_script(facts.to_json()),
        code=(folder / "page.js").read_text(encoding="utf-8"),
    )


def for_script(json_text: str) -> str:
    """JSON that may stand in a script element: without the characters that could end it or begin a comment."""
    for character in "<>&\u2028\u2029":
        json_text = json_text.replace(character, f"\\u{ord(character):04x}")
    return json_text
