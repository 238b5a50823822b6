"""Decisions shown in the terminal, as a picture, as a page.

Each function returns what it shows, a table of rich, the bytes of an image file or the text of an HTML file, and leaves
it to the caller where that goes.
"""

from refgemma.sampling.show.page import page
from refgemma.sampling.show.picture import picture
from refgemma.sampling.show.table import candidates, overview

__all__ = ["candidates", "overview", "page", "picture"]
