"""SVG: no text can break it, and what is an element stays one."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment

from daft_domainbed.results.svg import Svg, write_element

TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=0xD7FF))


@given(text=TEXTS, name=TEXTS, number=st.floats(-1e6, 1e6))
def test_text_is_read_as_it_was_given(text: str, name: str, number: float) -> None:
    inner = write_element("path", d=name, stroke_width=number)
    outer = ElementTree.fromstring(write_element("text", text, inner, class_=name))
    assert (outer.text or "", outer.get("class")) == (text, name)
    assert outer[0].attrib == {"d": name, "stroke-width": f"{number:.1f}"}


def test_only_what_is_an_element_is_written_as_it_is() -> None:
    page = Environment(autoescape=True).from_string("{{ drawing }} {{ text }}")
    shown = page.render(drawing=write_element("a"), text="<a/>")
    assert shown == "<a/> &lt;a/&gt;"
    assert write_element("g", "<a/>", Svg("<a/>")) == "<g>&lt;a/&gt;<a/></g>"


def test_an_element_without_content_closes_itself() -> None:
    assert (write_element("path", x=1), write_element("path", "", x=1)) == ('<path x="1"/>', '<path x="1"></path>')
