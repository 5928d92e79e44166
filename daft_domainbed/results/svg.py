"""How an element of a drawing is written, as SVG."""

from __future__ import annotations

from html import escape


class Svg(str):
    """SVG that is written as it is, where other text is escaped; Jinja knows it by its `__html__`."""

    def __html__(self) -> str:
        return self


def write_element(name: str, *inside: str, **attributes: object) -> Svg:
    """Return an element.

    Args:
        name: Name of the element.
        inside: What it holds, elements or text; without any the element closes itself.
        attributes: Its attributes, in their order: `text_anchor` is "text-anchor", `class_` is "class", and a float has
            one decimal.

    Example:
        >>> write_element("text", "a < b", write_element("path", d="M0 0H9"), x=1.25, text_anchor="end")
        '<text x="1.2" text-anchor="end">a &lt; b<path d="M0 0H9"/></text>'
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{_write(value)}"' for key, value in attributes.items())
    content = "".join(map(_write, inside))
    return Svg(f"<{name}{written}>{content}</{name}>" if inside else f"<{name}{written}/>")


def _write(value: object) -> str:
    if isinstance(value, Svg):
        return value
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))
