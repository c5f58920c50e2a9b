"""The page is one file that asks for nothing, small, and safe whatever the names in it."""

import json
import re
from html.parser import HTMLParser

from hawqfx.report.page import LIBRARIES, for_script, page
from tests.report.made_up import HOSTILE, chain

MOST = 3 * 2**20


class Elements(HTMLParser):
    """The elements of a page, as a browser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        number = len(self.found) - 1
        self.texts[number] = self.texts.get(number, "") + data


def test_nothing_is_fetched() -> None:
    text = page(chain(3))
    for tag, attributes in Elements(text).found:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base"), tag
        assert not {"src", "srcset", "action", "data"} & attributes.keys(), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "default-src 'none'" in text  # the browser refuses what is left


def test_the_page_of_a_thousand_nodes_is_below_three_megabytes() -> None:
    assert len(page(chain(1000)).encode()) < MOST


def test_names_cannot_leave_their_place() -> None:
    """A layer named as the end of a script is text: the elements are those of any other name."""
    harmless, hostile = Elements(page(chain(3))), Elements(page(chain(3, HOSTILE)))
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in harmless.found]
    (number,) = (k for k, (_, attributes) in enumerate(hostile.found) if attributes.get("id") == "facts")
    assert json.loads(hostile.texts[number])["nodes"][0]["name"] == f"{HOSTILE}0"


def test_no_character_ends_a_script() -> None:
    assert json.loads(for_script(json.dumps("</script>&\u2028", ensure_ascii=False))) == "</script>&\u2028"
    assert not set("<>&\u2028") & set(for_script(json.dumps("</script>&\u2028", ensure_ascii=False)))


def test_every_library_is_there_with_its_licence() -> None:
    text = page(chain(1))
    for name in LIBRARIES:
        assert f"/*! {name}\n" in text
    assert text.count("Copyright (c)") >= len(LIBRARIES)
    assert text.count("</script>") == len(LIBRARIES) + 2  # and the facts, and the page's own
