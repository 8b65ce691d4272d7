"""Links from a page to files of the repository beside docs/ become the file's name when the site is built."""

import re

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]*)[^)]*\)")


def on_page_markdown(markdown, **_):
    return OUTSIDE.sub(lambda link: link[1] if link[1] == link[2] else f"{link[1]} (`{link[2]}`)", markdown)
