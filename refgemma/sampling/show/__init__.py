"""Decisions shown in the terminal (tables of rich), as a picture (the bytes of an image file), as a page (HTML)."""

from refgemma.sampling.show.page import page as page
from refgemma.sampling.show.picture import picture as picture
from refgemma.sampling.show.table import candidates as candidates
from refgemma.sampling.show.table import overview as overview
