"""Takes the text out of an HTML page."""

import re
from html.parser import HTMLParser

UNREAD = {"script", "style", "template"}
PARAGRAPHS = {
    "address", "article", "aside", "blockquote", "body", "center", "details", "dialog", "dl", "fieldset", "figure",
    "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hr", "main", "nav", "ol", "p", "pre",
    "section", "table", "title", "ul",
}  # fmt: skip
LINES = {
    "br", "caption", "dd", "div", "dt", "figcaption", "legend", "li", "optgroup", "option", "summary", "tbody",
    "tfoot", "thead", "tr",
}  # fmt: skip
CELLS = {"td", "th"}
WHITE = re.compile(r"[ \t\n\r\f]+")  # HTML's white space; a no-break space is a character
MANY_LINES = re.compile(r" *\n( *\n)+")


def text_of_html(page: str) -> str:
    """Return the text of a page: paragraphs are blank lines apart, scripts and styles are left out.

    White space is collapsed as a browser does, except inside <pre>.
    """
    reader = _TextReader()
    reader.feed(page)
    reader.close()
    text = MANY_LINES.sub("\n\n", "".join(reader.parts)).strip()
    return f"{text}\n" if text else ""


class _TextReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._unread = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unread += tag in UNREAD
        self._break(tag)
        self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._unread = max(0, self._unread - (tag in UNREAD))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        if tag != "br":
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._unread:
            return
        if not self._preformatted:
            data = WHITE.sub(" ", data)
            if not self.parts or self.parts[-1].endswith((" ", "\n", "\t")):
                data = data.removeprefix(" ")
        if data:
            self.parts.append(data)

    def _break(self, tag: str) -> None:
        wanted = "\n\n" if tag in PARAGRAPHS else "\n" if tag in LINES else ""
        if tag in CELLS and self.parts and not self.parts[-1].endswith(("\n", "\t")):
            self.parts.append("\t")
        if not wanted or not self.parts:
            return
        self.parts[-1] = self.parts[-1].rstrip(" \t") if not self._preformatted else self.parts[-1]
        # A new line where there is one already would make a paragraph; a <br> asks for one each time.
        if tag == "br" or not self.parts[-1].endswith("\n"):
            self.parts.append(wanted)
        elif wanted == "\n\n" and self.parts[-1] != "\n\n":
            self.parts.append("\n")
