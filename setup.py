"""What pyproject.toml cannot say: the package's page is README.md, changed where it would lead nowhere.

On a package index no relative link or picture works. They become absolute with the repository's address from the
README's `git clone` line. While that line has none, links keep their words and pictures are left out.
"""
import re
from pathlib import Path

from setuptools import setup

# A picture alone or a link, to a file of the repository; and what stands around the address in the clone line.
PICTURE = re.compile(r'!\[[^\]]*\]\((?P<file>[^)]+)\)(?:\n\*.*\*$)?|<img src="(?P<source>[^"]+)"[^>]*>\n*', re.M)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:)([^)]+)\)")
CLONE = re.compile(r"^git clone (https://\S+?)(?:\.git|/)? ", re.M)


def page(text: str) -> str:
    """README.md as it is shown outside of the repository."""
    address = CLONE.search(text)
    if not address:
        return LINK.sub(r"\1", PICTURE.sub("", text))
    text = PICTURE.sub(lambda m: m[0].replace(m["file"] or m["source"],
                                              f"{address[1]}/raw/HEAD/{m['file'] or m['source']}", 1), text)
    return LINK.sub(rf"[\1]({address[1]}/blob/HEAD/\2)", text)


setup(long_description=page(Path(__file__).with_name("README.md").read_text("utf-8")),
      long_description_content_type="text/markdown")
