"""From a model hub to a folder: look a model up, choose a place for it, fetch it; nothing here runs by itself."""

from refgemma.hub.download import fetch
from refgemma.hub.offer import Offer, look_up
from refgemma.hub.place import Place, choose_place

__all__ = ["Offer", "Place", "choose_place", "fetch", "look_up"]
