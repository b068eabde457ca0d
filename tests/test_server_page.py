"""The page at ``/``: open to all, knows nothing, takes nothing from elsewhere, is for everybody."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser

import pytest

from nsa_serve.server.page import FOLDER, PAGE_FILES
from tests.server_fakes import fake_server

HTML = (FOLDER / "index.html").read_text()
SCRIPTS = {path.name: path.read_text() for path in FOLDER.glob("*.js")}
STYLE = (FOLDER / "page.css").read_text()


class Elements(HTMLParser):
    """Every element of a page as (name, attributes)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements(HTML).found
IDS = [attributes["id"] for _, attributes in ELEMENTS if "id" in attributes]


def ask(method, path, **settings):
    async def scenario():
        async with fake_server(**settings) as server:
            return await server.client.request(method, path)

    return asyncio.run(scenario())


@pytest.mark.parametrize("path", sorted(PAGE_FILES))
def test_the_page_needs_no_key_and_forbids_whatever_it_does_not_bring(path):
    response = ask("GET", path, api_keys=("k",))
    assert response.status_code == 200
    assert response.content == PAGE_FILES[path].read_bytes()
    policy = dict(
        rule.strip().partition(" ")[::2]
        for rule in response.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert {policy[kind] for kind in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert policy["frame-ancestors"] == "'none'"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/status", "/traces/x", "/static/", "/static/../app.py"])
def test_with_a_key_nothing_but_the_page_is_open(path):
    assert ask("GET", path, api_keys=("k",)).status_code == 401


def test_the_page_can_be_asked_for_but_not_written_to():
    assert ask("HEAD", "/").status_code == 200
    assert ask("POST", "/").status_code == 405


def test_scripts_are_served_as_scripts():
    assert ask("GET", "/static/main.js").headers["content-type"].startswith("text/javascript")


def test_nothing_comes_from_elsewhere_and_nothing_is_inline():
    sources = [
        attributes[kind]
        for _, attributes in ELEMENTS
        for kind in ("src", "href")
        if kind in attributes
    ]
    assert all(source.startswith(("/static/", "#", "data:,")) for source in sources)
    assert not any(name.startswith("on") for _, attributes in ELEMENTS for name in attributes)
    assert not any("style" in attributes for _, attributes in ELEMENTS)
    for text in (*SCRIPTS.values(), STYLE):
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert "@import" not in text


def test_scripts_never_read_text_as_markup():
    for text in SCRIPTS.values():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_the_key_is_kept_in_the_tab_alone():
    everything = "".join(SCRIPTS.values())
    assert "sessionStorage" in SCRIPTS["api.js"]
    assert not re.search(r"localStorage|document\.cookie|indexedDB", everything)


def test_every_file_that_is_asked_for_is_there():
    named = re.findall(r'"/static/([\w.]+)"', HTML)
    named += [name for text in SCRIPTS.values() for name in re.findall(r'from "\./([\w.]+)"', text)]
    assert {f"/static/{name}" for name in named} == set(PAGE_FILES) - {"/"}


def test_every_element_that_scripts_look_for_is_there():
    wanted = {name for text in SCRIPTS.values() for name in re.findall(r'\$\("([\w-]+)"\)', text)}
    assert wanted <= set(IDS)
    assert len(IDS) == len(set(IDS))


def test_what_can_be_filled_in_or_pressed_has_a_name():
    labelled = {attributes.get("for") for name, attributes in ELEMENTS if name == "label"}
    for name, attributes in ELEMENTS:
        if name in ("textarea", "input") and attributes.get("type") != "checkbox":
            assert attributes["id"] in labelled
        if name in ("canvas", "svg"):
            assert attributes["aria-label"]
        for reference in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(reference) in (None, *IDS)


def test_the_order_of_the_tab_key_is_the_order_of_the_page():
    indices = [attributes["tabindex"] for _, attributes in ELEMENTS if "tabindex" in attributes]
    assert set(indices) <= {"0", "-1"}


def test_both_themes_name_the_same_colours():
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    names = [set(re.findall(r"--[\w-]+(?=:)", theme)) for theme in (light, dark)]
    assert names[0] == names[1]
    used = set(re.findall(r"var\((--[\w-]+)\)", STYLE))
    scripts = "".join(SCRIPTS.values())
    drawn = {f"--{name}" for name in re.findall(r'colour\("(\w+)"', scripts)}
    assert used | drawn <= names[0]


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "ground"),
    [("text", "card"), ("quiet", "card"), ("quiet", "ground"), ("on-accent", "accent"),
     ("bad", "card")],
)  # fmt: skip
def test_text_stands_out_from_its_ground(theme, ink, ground):
    rules = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", rules))
    assert contrast(colours[ink], colours[ground]) >= 4.5
